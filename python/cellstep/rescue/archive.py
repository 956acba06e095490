"""A TorchScript archive as data: the zip, its tensors and its tree of objects. No code of the file is run.

Two layouts are read. Torch since 1.4 writes ``data.pkl`` and ``constants.pkl`` with one file a storage; torch 1.0 to
1.3 wrote ``model.json``, tensors in a table, and ``attributes.pkl``. A pickle may name the few types that torch itself
writes into such files; anything else in it is refused.
"""

import itertools
import json
import math
import os
import pickletools
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

_TEXT_LIMIT = 16 << 20  # bytes of a pickle, of model.json or of all code together
_TOTAL_LIMIT = 8 << 30  # bytes of all entries together, as the zip states them
_RATIO_LIMIT = 100  # of those bytes to the file's; weights hardly shrink
_ENTRY_LIMIT = 100_000
_DEPTH_LIMIT = 100  # of objects within objects
_OPCODE_LIMIT = 1_000_000  # of a pickle
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

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_T = TypeVar("_T")


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
        limit = min(_TOTAL_LIMIT, _TEXT_LIMIT + _RATIO_LIMIT * self.path.stat().st_size)
        if len(entries) > _ENTRY_LIMIT or sum(entry.file_size for entry in entries) > limit:
            self.refuse(f"at most {_ENTRY_LIMIT:,} entries of {limit:,} bytes", "more", "do not trust this file")
        ends = sorted((entry.header_offset, entry.header_offset + 30 + entry.compress_size) for entry in entries)
        if any(end > begin for (_, end), (begin, _) in itertools.pairwise(ends)):
            self.refuse("entries that lie one after another", "some that overlap", "do not trust this file")
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


@dataclass(frozen=True)
class _Name:
    """A name that a pickle gives, as text: nothing is looked up by it."""

    text: str


@dataclass(frozen=True)
class _Storage:
    values: Tensor
    name: str


#: What a pickle may name beside the classes of its own code and the kinds of storage.
_NAMES = {
    "collections OrderedDict",
    "torch device",
    *(f"torch._utils {name}" for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")),
    *(f"torch.jit._pickle build_{kind}list" for kind in ("int", "tensor", "double", "bool")),
    "torch.jit._pickle build_tensor_from_id",
    "torch.jit._pickle restore_type_tag",
    "__main__ TensorID",  # as torch 1.0 called build_tensor_from_id
    "__main__ IntList",  # and build_intlist
}


class _Unpickler:
    """The stack machine of a pickle, for the few opcodes and names that torch writes. It calls nothing by name."""

    def __init__(self, files: _Files, folder: str, table: list[Tensor]) -> None:
        self._files, self._folder, self._table = files, folder, table
        self._storages: dict[str, Tensor] = {}
        self._tensors: dict[Any, Tensor] = {}
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under each mark
        self._memo: dict[int, Any] = {}

    def load(self, data: bytes) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count > _OPCODE_LIMIT:
                raise ValueError(f"more than {_OPCODE_LIMIT:,} opcodes")
            if opcode.name == "STOP":
                (answer,) = self._stack
                return answer
            self._do(opcode.name, argument)
        raise ValueError("a pickle without an end")

    def _do(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"):
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "MARK":
            self._below.append(stack)
            self._stack = []
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS"):
            self._stack = self._below.pop()
            if name == "TUPLE":
                self._stack.append(tuple(stack))
            elif name == "LIST":
                self._stack.append(stack)
            elif name == "APPENDS":
                self._top(list).extend(stack)
            else:
                if name == "DICT":
                    self._stack.append({})
                self._fill(self._top(dict), stack)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            items = tuple(stack[-count:])
            if len(items) != count:
                raise ValueError("a tuple of more than there is")
            stack[-count:] = [items]
        elif name == "APPEND":
            item = stack.pop()
            self._top(list).append(item)
        elif name == "SETITEM":
            items = (stack[-2], stack[-1])
            del stack[-2:]
            self._fill(self._top(dict), items)
        elif name == "GLOBAL":
            stack.append(self._name(argument))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "REDUCE":
            arguments = stack.pop()
            if not isinstance(arguments, tuple):
                raise ValueError("a call without arguments")
            stack[-1] = self._call(stack[-1], arguments)
        elif name == "NEWOBJ":
            arguments = stack.pop()
            kind = self._top(_Name).text
            if not kind.startswith("__torch__.") or arguments != ():
                raise ValueError(f"an object of {kind}")
            stack[-1] = Object(kind)
        elif name == "BUILD":
            state = stack.pop()
            item = self._top(Object)
            if item.state:
                raise ValueError("an object with two states")
            keyed = isinstance(state, dict) and all(isinstance(key, str) for key in state)
            item.state = state if keyed else {"": state}
        elif name != "PROTO":
            raise ValueError(f"the pickle opcode {name}")

    def _top(self, kind: type[_T]) -> _T:
        item = self._stack[-1]
        if type(item) is not kind:
            raise ValueError(f"a {type(item).__name__} where a {kind.__name__} belongs")
        return item

    def _fill(self, into: dict[Any, Any], items: Sequence[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (bool, int, float, str):
                raise ValueError("a key that is neither text nor number")
            into[key] = value

    def _name(self, text: str) -> _Name:
        module, _, name = text.partition(" ")
        if module == "__torch__" or module.startswith("__torch__."):
            return _Name(f"{module}.{name}")
        if text not in _NAMES and not (module == "torch" and name in _STORAGES):
            raise ValueError(f"the name {module}.{name}"[:200])
        return _Name(text)

    def _call(self, callee: Any, args: tuple[Any, ...]) -> Any:
        name = callee.text.rpartition(" ")[2] if isinstance(callee, _Name) else ""
        if name in ("_rebuild_tensor", "_rebuild_tensor_v2") and len(args) >= 4:
            storage, offset, sizes, strides = args[:4]
            if not isinstance(storage, _Storage):
                raise ValueError("a tensor without a storage")
            key = (storage.name, offset, sizes, strides)
            if key not in self._tensors:  # two names of one tensor give one object
                self._tensors[key] = self._files.view(storage.values, offset, sizes, strides, storage.name)
            return self._tensors[key]
        if name == "OrderedDict" and not args:
            return {}
        if name in ("build_tensor_from_id", "TensorID") and len(args) == 1:
            (index,) = args
            if type(index) is not int or not 0 <= index < len(self._table):
                raise ValueError(f"tensor {index} of {len(self._table)}"[:100])
            return self._table[index]
        if name.startswith(("build_", "_rebuild_parameter", "restore_type_tag", "device", "IntList")) and args:
            return args[0]
        raise ValueError(f"a call of {name or type(callee).__name__}")

    def _storage(self, key: Any) -> _Storage:
        if not isinstance(key, tuple) or len(key) < 5:
            raise ValueError("a storage without type or name")
        tag, kind, entry, _, numel = key[:5]
        if tag != "storage" or not isinstance(kind, _Name) or type(entry) is not str or type(numel) is not int:
            raise ValueError("a storage without type or name")
        dtype = _STORAGES.get(kind.text.removeprefix("torch "))
        if dtype is None:
            raise ValueError(f"a storage of {kind.text}")
        name = f"{self._folder}/{entry}"
        if name not in self._storages:
            empty = numel == 0 and not self._files.has(name)
            self._storages[name] = torch.empty(0, dtype=dtype) if empty else self._files.storage(name, dtype)
        values = self._storages[name]
        if values.dtype != dtype or not 0 <= numel <= values.numel():
            got = f"{values.numel():,} of {values.dtype}"
            self._files.refuse(f"{numel} values of {dtype} in '{name}'"[:200], got, "copy the file again")
        return _Storage(values, name)


def _unpickle(files: _Files, name: str, folder: str, table: list[Tensor]) -> Any:
    try:
        return _Unpickler(files, folder, table).load(files.read(name))
    except _Refused:
        raise
    except ValueError as error:
        files.refuse(f"the types of a TorchScript archive in '{name}'", _text(error), "do not trust this file")
    except (LookupError, OverflowError, RuntimeError, TypeError) as error:
        files.refuse(f"a pickle as torch writes it in '{name}'", _text(error), "do not trust this file")


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
