"""A TorchScript archive as data: the zip, its tensors and its tree of objects. No code of the file is run.

Two layouts are read. Torch since 1.4 writes ``data.pkl`` and ``constants.pkl`` with one file a storage; torch 1.0 to
1.3 wrote ``model.json``, tensors in a table, and ``attributes.pkl``. A pickle may name the few types that torch itself
writes into such files; anything else in it is refused.
"""

import io
import json
import math
import os
import pickle
import pickletools
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor

_TEXT_LIMIT = 16 << 20  # bytes of a pickle, of model.json or of all code together
_TOTAL_LIMIT = 4 << 30  # bytes of all entries together, as the zip states them
_ENTRY_LIMIT = 100_000
_DEPTH_LIMIT = 100  # of objects within objects
_EXPANDED_LIMIT = 1 << 16  # values of a tensor that says the same memory more than once

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
#: Names and numbers of caffe2's TensorProto.DataType, which model.json uses.
_TABLE_TYPES: dict[str | int, torch.dtype] = {
    "FLOAT": torch.float32,
    "INT32": torch.int32,
    "BYTE": torch.uint8,
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT64": torch.int64,
    "FLOAT16": torch.float16,
    "DOUBLE": torch.float64,
    "BFLOAT16": torch.bfloat16,
}
_TABLE_TYPES |= dict(zip((1, 2, 3, 5, 6, 7, 9, 10, 12, 13), list(_TABLE_TYPES.values())[:10], strict=True))

#: What torch's own pickler writes: protocol 2 without extensions, old string kinds and unlimited numbers.
_OPCODES = frozenset(
    "PROTO STOP MARK GLOBAL REDUCE BUILD NEWOBJ BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE "
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND "
    "APPENDS EMPTY_DICT DICT SETITEM SETITEMS".split()  # noqa: SIM905
)


@dataclass(eq=False)
class Object:
    """A module or other object of the file: the name of its class and its attributes."""

    name: str
    state: dict[str, Any] = field(default_factory=dict)
    source: str = ""  # torch 1.0 to 1.3 keeps the code with the module


@dataclass(eq=False)
class Archive:
    """What a file holds: its root object, the constants of its code and its files of code by dotted name."""

    root: Object
    constants: list[Any]
    sources: dict[str, str]


def read_archive(path: str | os.PathLike[str]) -> Archive:
    """Read a TorchScript file of any torch since 1.0.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no TorchScript archive, is damaged, or holds what such a file has no reason to hold.
    """
    files = _Files(Path(path))
    try:
        if files.has("model.json"):
            return _read_table(files)
        if not files.has("data.pkl"):
            files.refuse("an archive with data.pkl or model.json", "neither", "name a file of torch.jit.save")
        if not files.has("constants.pkl"):
            files.refuse("code beside the weights", "a file of torch.save", "name a file of torch.jit.save")
        root = _unpickle(files, "data.pkl", "data", [])
        constants = _unpickle(files, "constants.pkl", "constants", [])
        if not isinstance(root, Object) or not isinstance(constants, (tuple, list)):
            files.refuse("a module in data.pkl and constants in constants.pkl", "other types", "export the model again")
        return Archive(root, list(constants), files.sources("code/"))
    finally:
        files.close()


class _Refused(ValueError):
    """An error that already names what was expected and the file."""


class _Files:
    """The entries of the zip below its one folder, each within bounds and with the checksum that the zip states."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            magic = stream.read(8)
        if magic == b"PYTORCH1":
            self.refuse(
                "an archive of torch 1.0 or later", "one of its preview releases", "save it again with torch 1.0"
            )
        if magic[:4] != b"PK\x03\x04":
            self.refuse("a TorchScript archive, which is a zip file", "something else", "name a file of torch.jit.save")
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
            self.refuse("a whole zip file", _text(error), "copy the file again")
        try:
            self._entries = self._index()
        except BaseException:
            self.close()
            raise
        swapped = self.has("byteorder") and self.read("byteorder", 64).strip() == b"big"
        self.swapped = swapped

    def _index(self) -> dict[str, zipfile.ZipInfo]:
        entries = [entry for entry in self._zip.infolist() if not entry.is_dir()]
        if len(entries) > _ENTRY_LIMIT or sum(entry.file_size for entry in entries) > _TOTAL_LIMIT:
            self.refuse(
                f"at most {_ENTRY_LIMIT:,} entries and {_TOTAL_LIMIT >> 30} GiB", "more", "do not trust this file"
            )
        index: dict[str, zipfile.ZipInfo] = {}
        roots = set()
        for entry in entries:
            parts = entry.filename.split("/")
            if "\\" in entry.filename or any(part in ("", ".", "..") for part in parts):
                self.refuse("plain entry names", repr(entry.filename), "do not trust this file")
            name = "/".join(parts[1:])
            if name in index:
                self.refuse("entries of different names", f"'{name}' twice", "do not trust this file")
            if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                self.refuse("stored or deflated entries", f"another kind in '{name}'", "pack the file again")
            roots.add(parts[0])
            index[name] = entry
        if len(roots) != 1:
            self.refuse("one folder in the archive", str(len(roots)), "name a file of torch.jit.save")
        return index

    def has(self, name: str) -> bool:
        return name in self._entries

    def read(self, name: str, limit: int = _TEXT_LIMIT) -> bytes:
        entry = self._entries.get(name)
        if entry is None:
            self.refuse(f"the entry '{name}'", "an archive without it", "copy the file again")
        if entry.file_size > limit:
            self.refuse(f"at most {limit:,} bytes in '{name}'", f"{entry.file_size:,}", "do not trust this file")
        try:
            data = self._zip.read(entry)
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, NotImplementedError) as error:
            self.refuse(f"a whole entry '{name}'", _text(error), "copy the file again")
        if len(data) != entry.file_size:
            self.refuse(f"{entry.file_size:,} bytes in '{name}'", f"{len(data):,}", "copy the file again")
        return data

    def sources(self, folder: str) -> dict[str, str]:
        """The files of code below a folder, by dotted name."""
        names = [name for name in self._entries if name.startswith(folder) and name.endswith(".py")]
        if sum(self._entries[name].file_size for name in names) > _TEXT_LIMIT:
            self.refuse(f"at most {_TEXT_LIMIT:,} bytes of code", "more", "do not trust this file")
        return {name[len(folder) : -3].replace("/", "."): self.text(name) for name in names}

    def text(self, name: str) -> str:
        try:
            return self.read(name).decode()
        except UnicodeDecodeError as error:
            self.refuse(f"UTF-8 in '{name}'", _text(error), "copy the file again")

    def storage(self, name: str, dtype: torch.dtype) -> Tensor:
        """All values of one entry, in one dimension."""
        data = bytearray(self.read(name, _TOTAL_LIMIT))
        if len(data) % dtype.itemsize:
            self.refuse(f"whole values of {dtype} in '{name}'", f"{len(data):,} bytes", "copy the file again")
        if self.swapped:
            data = bytearray(np.frombuffer(data, np.uint8).reshape(-1, dtype.itemsize)[:, ::-1].tobytes())
        if dtype == torch.bool and any(byte > 1 for byte in set(data)):
            self.refuse(f"zeros and ones in '{name}'", "other values", "copy the file again")
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)

    def view(self, storage: Tensor, offset: Any, sizes: Any, strides: Any, name: str) -> Tensor:
        """Part of a storage, checked to lie within it."""
        numbers = (offset, *sizes, *strides) if isinstance(sizes, tuple) and isinstance(strides, tuple) else (-1,)
        if len(numbers) > 17 or any(type(n) is not int or not 0 <= n < 1 << 48 for n in numbers):
            self.refuse(f"sizes, strides and an offset from 0 on in '{name}'", "other values", "do not trust this file")
        if len(sizes) != len(strides):
            self.refuse(f"a stride a size in '{name}'", f"{sizes} and {strides}", "do not trust this file")
        count = math.prod(sizes)
        last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        if count and last >= storage.numel():
            self.refuse(f"at least {last + 1:,} values in '{name}'", f"{storage.numel():,}", "copy the file again")
        if count > max(storage.numel(), _EXPANDED_LIMIT):
            self.refuse(f"at most {storage.numel():,} values from '{name}'", f"{count:,}", "do not trust this file")
        return storage.as_strided(sizes, strides, offset) if count else torch.empty(sizes, dtype=storage.dtype)

    def refuse(self, expected: str, got: str, advice: str) -> NoReturn:
        raise _Refused(f"expected {expected}; got {got} ('{self.path}'); {advice}")

    def close(self) -> None:
        self._zip.close()


def _text(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


class _Parsed:
    """What a pickle's calls make: kept apart until the pickle is read, so that it can change nothing but these."""

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: str, args: tuple[Any, ...]) -> None:
        self.kind, self.args, self.state = kind, args, None

    def __setstate__(self, state: Any) -> None:
        if not self.kind.startswith("__torch__"):
            raise ValueError(f"a state for {self.kind}")
        self.state = state


class _Callable:
    """A name that a pickle may call; the call is written down and nothing runs."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, *args: Any) -> _Parsed:
        return _Parsed(self.kind, args)

    def __setstate__(self, state: Any) -> NoReturn:
        raise ValueError(f"a state for {self.kind}")


_BUILDERS = {
    *(("torch._utils", name) for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")),
    *(("torch.jit._pickle", f"build_{name}") for name in ("intlist", "tensorlist", "doublelist", "boollist")),
    ("torch.jit._pickle", "build_tensor_from_id"),
    ("torch.jit._pickle", "restore_type_tag"),
    ("torch", "device"),
    ("collections", "OrderedDict"),
    ("__main__", "TensorID"),  # as torch 1.1 called build_tensor_from_id
    ("__main__", "IntList"),  # and build_intlist
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__") and (len(module) == 9 or module[9] == "."):
            # NEWOBJ needs a class; an empty subclass of its own keeps the name that the file gives.
            kind = f"{module}.{name}"
            return type(
                "_ParsedObject", (_Parsed,), {"__slots__": (), "__new__": _new, "__init__": _keep, "kind_": kind}
            )
        if (module, name) in _BUILDERS:
            return _Callable(name)
        if module == "torch" and name in _STORAGES:
            return _Parsed("storage type", (_STORAGES[name],))
        raise ValueError(f"the name {module}.{name}"[:200])

    def persistent_load(self, key: Any) -> Any:
        return _Parsed("storage", key if isinstance(key, tuple) else (key,))


def _new(cls: Any, *args: Any) -> _Parsed:
    made = cast(_Parsed, object.__new__(cls))
    _Parsed.__init__(made, cls.kind_, args)
    return made


def _keep(self: Any, *args: Any) -> None:
    """The values are already there."""


def _unpickle(files: _Files, name: str, folder: str, table: list[Tensor]) -> Any:
    data = files.read(name)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            # A huge index of the memo would make the reader set aside memory for all below it.
            if opcode.name not in _OPCODES or (opcode.name == "LONG_BINPUT" and int(argument or 0) > len(data)):
                raise ValueError(f"the pickle opcode {opcode.name}")
        parsed = _Unpickler(io.BytesIO(data)).load()
        return _Builder(files, folder, table).build(parsed, 0)
    except _Refused:
        raise
    except ValueError as error:
        files.refuse(f"the types of a TorchScript archive in '{name}'", str(error), "do not trust this file")
    except (
        pickle.UnpicklingError,
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        TypeError,
    ) as error:
        files.refuse(f"a pickle as torch writes it in '{name}'", _text(error), "do not trust this file")


class _Builder:
    """Turns what a pickle wrote down into tensors, objects and plain Python values, each thing once."""

    def __init__(self, files: _Files, folder: str, table: list[Tensor]) -> None:
        self._files, self._folder, self._table = files, folder, table
        self._built: dict[int, Any] = {}
        self._storages: dict[str, Tensor] = {}

    def build(self, value: Any, depth: int) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if depth > _DEPTH_LIMIT:
            raise ValueError(f"objects within objects more than {_DEPTH_LIMIT} deep")
        if id(value) in self._built:
            return self._built[id(value)]
        made: Any
        if isinstance(value, list):
            # Registered before its items are built: a list may hold itself.
            made = self._built[id(value)] = []
            made.extend(self.build(item, depth + 1) for item in value)
        elif isinstance(value, tuple):
            made = tuple(self.build(item, depth + 1) for item in value)
        elif isinstance(value, dict):
            made = self._built[id(value)] = {}
            made.update((self._key(key, depth), self.build(item, depth + 1)) for key, item in value.items())
        elif isinstance(value, _Parsed) and value.kind.startswith("__torch__"):
            made = self._built[id(value)] = Object(value.kind)
            state = value.state if value.state is not None else value.args
            state = self.build(state, depth + 1)
            made.state = (
                state if isinstance(state, dict) and all(isinstance(key, str) for key in state) else {"": state}
            )
        elif isinstance(value, _Parsed):
            made = self._call(value.kind, value.args, depth)
        else:
            raise ValueError("a name in the place of a value")
        self._built[id(value)] = made
        return made

    def _key(self, key: Any, depth: int) -> Any:
        if isinstance(key, (bool, int, float, str)):
            return key
        return id(self.build(key, depth + 1))  # a tensor as a key is kept apart from the others, not looked at

    def _call(self, kind: str, args: tuple[Any, ...], depth: int) -> Any:
        if kind in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            storage, offset, sizes, strides = args[:4]
            if not isinstance(storage, _Parsed) or storage.kind != "storage":
                raise ValueError("a tensor without a storage")
            values, name = self._storage(*storage.args)
            return self._files.view(values, offset, sizes, strides, name)
        if kind == "OrderedDict":
            if args:
                raise ValueError("a filled OrderedDict")
            return {}
        if kind in ("build_tensor_from_id", "TensorID"):
            (index,) = args
            if type(index) is not int or not 0 <= index < len(self._table):
                raise ValueError(f"tensor {index} of {len(self._table)}"[:100])
            return self._table[index]
        if kind.startswith(("build_", "_rebuild_parameter", "restore_type_tag", "device", "IntList")) and args:
            return self.build(args[0], depth + 1)
        raise ValueError(f"a {kind} in the place of a value")

    def _storage(self, tag: Any, kind: Any, key: Any, _device: Any, numel: Any, *_rest: Any) -> tuple[Tensor, str]:
        if tag != "storage" or not isinstance(kind, _Parsed) or kind.kind != "storage type" or not isinstance(key, str):
            raise ValueError("a storage without type or name")
        name = f"{self._folder}/{key}"
        dtype = kind.args[0]
        if name not in self._storages:
            empty = numel == 0 and not self._files.has(name)
            self._storages[name] = torch.empty(0, dtype=dtype) if empty else self._files.storage(name, dtype)
        values = self._storages[name]
        if values.dtype != dtype or type(numel) is not int or numel > values.numel() or numel < 0:
            got = f"{values.numel():,} of {values.dtype}"
            self._files.refuse(f"{numel} values of {dtype} in '{name}'"[:200], got, "copy the file again")
        return values, name


def _read_table(files: _Files) -> Archive:
    """The layout of torch 1.0 to 1.3: protobuf messages as JSON, in which 64-bit integers are strings."""
    try:
        model = json.loads(files.read("model.json"))
        storages: dict[tuple[str, torch.dtype], Tensor] = {}
        table = [_table_tensor(files, entry, storages) for entry in model.get("tensors", [])]
        attributes = _unpickle(files, "attributes.pkl", "", table) if files.has("attributes.pkl") else ()
        root = _table_module(files, model["mainModule"], table, list(attributes), 0)
    except _Refused:
        raise
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        files.refuse("model.json as torch 1.0 to 1.3 wrote it", _text(error), "export the model again")
    return Archive(root, list(table), files.sources("libs/") | files.sources("code/"))


def _table_tensor(files: _Files, entry: dict[str, Any], storages: dict[tuple[str, torch.dtype], Tensor]) -> Tensor:
    kind = entry.get("dataType", "FLOAT")
    dtype = _TABLE_TYPES.get(kind)
    if dtype is None or entry.get("isQuantized"):
        files.refuse("tensors of plain numbers", str(kind)[:50], "export the model without quantization")
    key = entry["data"]["key"]
    if (key, dtype) not in storages:
        storages[key, dtype] = files.storage(key, dtype)
    sizes, strides = (tuple(int(n) for n in entry.get(name, [])) for name in ("dims", "strides"))
    return files.view(storages[key, dtype], int(entry.get("offset", 0)), sizes, strides, key)


def _table_module(
    files: _Files, entry: dict[str, Any], table: list[Tensor], attributes: list[Any], depth: int
) -> Object:
    if depth > _DEPTH_LIMIT:
        raise ValueError(f"modules within modules more than {_DEPTH_LIMIT} deep")
    module = Object("")
    for attribute in entry.get("attributes", []):
        index = int(attribute["id"])
        module.state[attribute["name"]] = attributes[index] if index >= 0 else None
    for parameter in entry.get("parameters", []):
        index = int(parameter.get("tensorId", 0))
        if index < 0:
            raise ValueError("a tensor before the first")
        module.state[parameter["name"]] = table[index]
    for child in entry.get("submodules", []):
        module.state[child["name"]] = _table_module(files, child, table, attributes, depth + 1)
    arena = entry.get("torchscriptArena", {}).get("key")
    if arena is not None:
        module.source = files.text(arena)
    return module
