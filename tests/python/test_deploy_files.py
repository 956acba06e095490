"""Deploy files are trusted never: each wrong one is refused with the code that says why, and none is read past its end.

Files lie in memory whose last byte is the last one that may be read: behind it begins a page that may not.
"""

import ctypes
import mmap
import struct
import sys
import zlib
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from conftest import make_forecaster
from test_artifacts import whole_chain
from test_session import Library, pointer

import cellstep
from cellstep.exporters.deploy import image
from cellstep.nn import LSTM, Chain, Dense, Skip
from cellstep.runtime import Session

OK, ARGUMENT, MAGIC, VERSION, LENGTH, CHECKSUM, FORMAT, DTYPE, NONFINITE, ALIGNMENT = 0, 1, 4, 5, 6, 7, 8, 9, 10, 11
SELFTEST, NEWER = 12, 17
INPUT_SCALING, LSTM_LAYER, DENSE, OUTPUT_SCALING, FEATURE_NAMES, OUTPUT_NAMES, TEST_VECTOR, SKIP = range(1, 9)


@dataclass
class Record:
    fields: list  # kind, layout, four sizes, flags, activations
    data: bytes
    offset: int | None = None  # where it lies, unless it lies where it must
    length: int | None = None  # what it says of its length, unless the truth
    zeros: tuple = (0, 0)

    @property
    def kind(self):
        return self.fields[0]


@dataclass
class File:
    """The parts of a deploy file, after the table in csrc/core/image.h."""

    header: list  # magic, version, checksum, length, and ten numbers from the number of records on
    records: list
    tail: bytes = b""
    gap: int = 0  # more bytes than need be before the first data
    fixed: dict = field(default_factory=dict)

    HEADER = "<8sIIQ10I"
    RECORD = "<8I4Q"
    NAMES = ("magic", "version", "checksum", "length", "records", "dtype", "inputs", "outputs", "layers", "h", "c")
    NAMES += ("window", "horizon", "answers")

    @classmethod
    def of(cls, data):
        header = list(struct.unpack_from(cls.HEADER, data))
        records = []
        for place in range(header[4]):
            *fields, offset, length, _, _ = struct.unpack_from(cls.RECORD, data, 64 + 64 * place)
            records.append(Record(fields, data[offset : offset + length]))
        return cls(header, records)

    def set(self, **values):
        """Numbers of the header that assembling must not mend."""
        self.fixed.update(values)
        return self

    def find(self, kind):
        return next(record for record in self.records if record.kind == kind)

    def assembled(self):
        table, body = b"", b"\0" * self.gap
        begin = 64 + 64 * len(self.records)
        for record in self.records:
            body += bytes(-(begin + len(body)) % 64)
            offset = begin + len(body) if record.offset is None else record.offset
            length = len(record.data) if record.length is None else record.length
            table += struct.pack(self.RECORD, *(v % 2**32 for v in record.fields), offset, length, *record.zeros)
            body += record.data
        body = table + body + self.tail
        values = dict(zip(self.NAMES, self.header, strict=True))
        values.update(records=len(self.records), length=64 + len(body))
        values.update(self.fixed)
        values["checksum"] = 0
        whole = struct.pack(self.HEADER, *values.values()) + body
        checksum = self.fixed.get("checksum", zlib.crc32(whole))
        return whole[:12] + struct.pack("<I", checksum) + whole[16:]


class Guarded:
    """Memory that ends where reading ends."""

    def __init__(self, pages=8):
        self.size = pages * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, self.size + mmap.PAGESIZE)
        self.begin = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(self.begin + self.size), mmap.PAGESIZE, 0) == 0

    def place(self, data):
        self.memory[self.size - len(data) : self.size] = data
        return self.begin + self.size - len(data)


@pytest.fixture(scope="module")
def library():
    return Library()


@pytest.fixture(scope="module")
def guarded():
    if sys.platform == "win32":
        pytest.skip("no mprotect here")
    return Guarded()


@pytest.fixture(scope="module")
def load(library, guarded):
    """The status of a file that lies at the end of readable memory; a model that comes with an error is an error."""

    def load(data):
        handle = ctypes.c_void_p(1)
        if len(data) % 8:  # in place it would not be aligned
            status = library("model_load_memory", data, len(data), ctypes.byref(handle))
        else:
            address = ctypes.c_void_p(guarded.place(data))
            status = library("model_load_in_place", address, len(data), ctypes.byref(handle))
        assert (handle.value is not None) == (status == OK)
        text = library.calls.cellstep_status_text(status)
        assert text and b"\n" not in text and (status == OK or b": " in text)
        if handle:
            library("model_destroy", handle)
        return status

    return load


def chain_with_all():
    model = whole_chain()
    model.window = 5
    return model


def small():
    model = Chain(LSTM(2, 8), Dense(8, 2), Skip([1, 0]), answers="every").eval()
    model.feature_names = ["a", "b"]
    return model


@pytest.fixture(params=["forecaster", "whole chain", "float16", "int8"])
def data(request):
    torch.manual_seed(0)
    if request.param == "forecaster":
        return image(make_forecaster(2, 3, 1))
    if request.param == "whole chain":
        return image(chain_with_all())
    return cellstep.quantize(make_forecaster(3, 20, 2), request.param).image.numpy().tobytes()


def test_a_file_that_is_taken_apart_and_put_together_is_the_same(data, load):
    assert File.of(data).assembled() == data
    assert load(data) == OK


def test_a_short_file_is_refused_though_its_header_agrees_and_its_checksum_is_right(data, load):
    """Cut anywhere, with the length and the checksum of what is left."""
    for size in range(0, len(data)):
        cut = bytearray(data[:size])
        if size >= 24:
            struct.pack_into("<Q", cut, 16, size)
            struct.pack_into("<I", cut, 12, 0)
            struct.pack_into("<I", cut, 12, zlib.crc32(bytes(cut)))
        assert load(bytes(cut)) == (LENGTH if size < 64 else FORMAT), size


def test_lengths_that_disagree(data, load):
    whole = len(data)
    for length in (0, 63, whole - 1, whole + 1, whole + 64, 2 * whole, 2**32 + whole, 2**63, 2**64 - 1):
        assert load(File.of(data).set(length=length).assembled()) == LENGTH
    for tail in (1, 8, 64, 4096):
        file = File.of(data)
        file.tail = bytes(tail)
        assert load(file.assembled()) == FORMAT  # bytes that belong to no record


def test_versions(data, load, library):
    for version, status in ((0, VERSION), (2, VERSION), (4, NEWER), (2**31, NEWER), (2**32 - 1, NEWER)):
        assert load(File.of(data).set(version=version).assembled()) == status
        # Whatever else is in it: a newer file may have another form altogether.
        assert load(data[:8] + struct.pack("<I", version) + b"\xff" * 84) == status
    text = library.calls.cellstep_status_text(NEWER).decode()
    assert "newer than this library" in text and "update the library" in text
    assert "older than this library" in library.calls.cellstep_status_text(VERSION).decode()


def test_magic_checksum_and_dtype(data, load):
    assert load(File.of(data).set(magic=b"CELLSTEQ").assembled()) == MAGIC
    assert load(b"\0" * 4096) == MAGIC
    assert load(File.of(data).set(checksum=0).assembled()) == CHECKSUM
    assert load(File.of(data).set(dtype=2).assembled()) == DTYPE
    assert load(File.of(data).set(dtype=1).assembled()) == FORMAT  # float64 has other lengths
    assert load(image(make_forecaster(2, 3, 1).double())) == DTYPE


def test_memory_that_is_not_aligned(library):
    data = image(make_forecaster(2, 3, 1))
    memory = np.zeros(len(data) + 16, np.uint8)
    for shift in range(8):
        begin = -memory.ctypes.data % 8 + shift
        memory[begin : begin + len(data)] = np.frombuffer(data, np.uint8)
        handle = ctypes.c_void_p()
        address = ctypes.c_void_p(memory.ctypes.data + begin)
        status = library("model_load_in_place", address, len(data), ctypes.byref(handle))
        assert status == (ALIGNMENT if shift else OK)
        assert bool(handle) == (shift == 0)
        library("model_destroy", handle)


def test_counts_of_records(data, load):
    count = struct.unpack_from("<I", data, 24)[0]
    for wrong in (0, count - 1, count + 1, len(data) // 64, 2**26, 2**32 - 1):
        assert load(File.of(data).set(records=wrong).assembled()) == FORMAT


def test_offsets(data, load):
    """Each record must lie behind the one before it: no overlap, no hole, nothing outside."""
    truth = File.of(data)
    begins = [struct.unpack_from("<Q", data, 64 + 64 * place + 32)[0] for place in range(len(truth.records))]
    for place, begin in enumerate(begins):
        others = {*begins} - {begin}
        wrong = {0, 64, 64 + 64 * place, begin - 64, begin + 64, begin + 1, begin + 8, begin - 8, len(data)}
        for offset in others | wrong | {2**32 + begin, 2**64 - 64, 2**63, 2**64 - len(truth.records[place].data)}:
            file = File.of(data)
            file.records[place].offset = offset % 2**64
            assert load(file.assembled()) == FORMAT, (place, offset)
    file = File.of(data)
    file.gap = 64
    assert load(file.assembled()) == FORMAT


def test_two_records_on_the_same_bytes(load):
    """Two scalings alike would need no copy; sharing is refused, as is a test vector that is made of weights."""
    file = File.of(image(make_forecaster(2, 2, 1, 2)))
    offsets = [struct.unpack_from("<Q", file.assembled(), 64 + 64 * k + 32)[0] for k in range(len(file.records))]
    place = next(k for k, record in enumerate(file.records) if record.kind == OUTPUT_SCALING)
    file.records[place].offset = offsets[0]
    assert file.records[0].kind == INPUT_SCALING and len(file.records[0].data) == len(file.records[place].data)
    assert load(file.assembled()) == FORMAT


def test_lengths_of_records(data, load):
    for place, record in enumerate(File.of(data).records):
        size = len(record.data)
        for length in (0, size - 1, size + 1, size - 4, size + 4, size + 64, 2**32 + size, 2**63, 2**64 - 1):
            file = File.of(data)
            file.records[place].length = length % 2**64
            assert load(file.assembled()) == FORMAT, (place, length)


def test_reserved_bytes_and_unknown_kinds(data, load):
    for place in range(len(File.of(data).records)):
        for zeros in ((1, 0), (0, 1), (2**63, 0)):
            file = File.of(data)
            file.records[place].zeros = zeros
            assert load(file.assembled()) == FORMAT
        for kind in (0, 9, 31, 32, 2**16, 2**31, 2**32 - 1):
            file = File.of(data)
            file.records[place].fields[0] = kind
            assert load(file.assembled()) == FORMAT


SIZES = (0, 2**16, 2**24, 2**24 + 1, 2**26, 2**28, 2**30, 2**31 - 1, 2**31, 2**32 - 1)


def test_sizes_whose_products_overflow(data, load):
    """In 32 bits 4 * 2^30 is 0: any two sizes at once, and what the data would have to be by a product so cut."""
    for place, record in enumerate(File.of(data).records):
        if record.kind in (FEATURE_NAMES, OUTPUT_NAMES):
            continue
        for first in (0, 1, 2):
            for second in (0, 1, 2):
                for a in SIZES:
                    for b in SIZES if second != first else (0,):
                        file = File.of(data)
                        sizes = file.records[place].fields
                        sizes[2 + first] = a
                        if second != first:
                            sizes[2 + second] = b
                        if sizes != record.fields:
                            assert load(file.assembled()) == FORMAT, (place, sizes)


def test_sizes_of_the_header(data, load):
    names = ("inputs", "outputs", "layers", "h", "c")
    truth = dict(zip(File.NAMES, File.of(data).header, strict=True))
    for name in names:
        for value in {*SIZES, truth[name] - 1, truth[name] + 1, 2 * truth[name]} - {truth[name]}:
            assert load(File.of(data).set(**{name: value}).assembled()) == FORMAT, (name, value)
    for name in ("window", "horizon"):
        for value in (2**24 + 1, 2**31, 2**32 - 1):
            assert load(File.of(data).set(**{name: value}).assembled()) == FORMAT
    assert load(File.of(data).set(answers=3).assembled()) == FORMAT


@pytest.mark.parametrize(("says", "holds"), [(16, 8), (8, 16)])
def test_a_layer_of_another_size_than_the_file_says(says, holds, load):
    """A file of 8 units that says 16, or the other way round, in its header, in its record or in both."""

    def file(units):
        torch.manual_seed(0)
        return File.of(image(Chain(LSTM(1, units), Dense(units, 1), answers="every").eval()))

    for in_header, in_record, in_head in [(1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 1, 1)]:
        wrong = file(holds)
        if in_header:
            wrong.set(h=says, c=says)
        if in_record:
            wrong.find(LSTM_LAYER).fields[3] = says
        if in_head:
            wrong.find(DENSE).fields[2] = says
        assert load(wrong.assembled()) == FORMAT
    # The weights of one layer under the record of another, each with its own length.
    wrong = file(says)
    wrong.find(LSTM_LAYER).data = file(holds).find(LSTM_LAYER).data
    assert load(wrong.assembled()) == FORMAT


def test_orders_and_repetitions_of_records(load):
    data = image(chain_with_all())
    kinds = [record.kind for record in File.of(data).records]
    for kind in {*kinds} - {LSTM_LAYER, DENSE}:
        file = File.of(data)
        file.records.append(file.find(kind))
        assert load(file.assembled()) == FORMAT, kind
    for kind in (LSTM_LAYER, DENSE):
        file = File.of(data)
        file.records = [record for record in file.records if record.kind != kind]
        assert load(file.assembled()) == FORMAT
    for first in range(len(kinds) - 1):
        file = File.of(data)
        file.records[first], file.records[first + 1] = file.records[first + 1], file.records[first]
        last_is_note = {kinds[first], kinds[first + 1]} & {FEATURE_NAMES, OUTPUT_NAMES, TEST_VECTOR}
        assert load(file.assembled()) == (OK if last_is_note else FORMAT), first


def test_columns_that_a_skip_names(load):
    data = image(small())
    for column in (2, 3, 2**16, 2**31, 2**32 - 1):
        file = File.of(data)
        file.find(SKIP).data = struct.pack("<2I", 0, column)
        assert load(file.assembled()) == FORMAT
    # The last record of a file, of fewer columns than the header says: what lies behind it is not read.
    file = File.of(data)
    file.records = [record for record in file.records if record.kind in (LSTM_LAYER, DENSE, SKIP)]
    assert file.records[-1].kind == SKIP and len(file.assembled()) % 8 == 0
    for outputs in (3, 4, 1000, 2**20, 2**24):
        assert load(file.set(outputs=outputs).assembled()) == FORMAT


@pytest.mark.parametrize(
    ("names", "status"),
    [
        (b"a\0b\0", OK),
        (b"\0\0", OK),
        ("ä\0\U0010ffff\0".encode(), OK),
        ("\u0800\0\ud7ff\ue000\0".encode(), OK),
        (b"a\0b", FORMAT),
        (b"ab\0", FORMAT),
        (b"a\0b\0c\0", FORMAT),
        (b"a\0\xff\0", FORMAT),
        (b"a\0\x80\0", FORMAT),
        (b"a\0\xc3\0", FORMAT),  # cut short
        (b"\xe2\x82\0b\0", FORMAT),
        (b"a\0\xf0\x9f\x98\0", FORMAT),
        (b"a\0\xc0\x80\0", FORMAT),  # a zero byte in two bytes
        (b"a\0\xc1\xbf\0", FORMAT),
        (b"a\0\xe0\x9f\xbf\0", FORMAT),
        (b"a\0\xed\xa0\x80\0", FORMAT),  # half of a surrogate pair
        (b"a\0\xf0\x8f\xbf\xbf\0", FORMAT),
        (b"a\0\xf4\x90\x80\x80\0", FORMAT),  # past the last code point
        (b"a\0\xf8\x88\x80\x80\x80\0", FORMAT),
    ],
)
def test_names(names, status, load):
    file = File.of(image(small()))
    file.find(FEATURE_NAMES).data = names
    data = file.assembled()
    assert load(data) == status
    if status == OK:
        assert Session(data).feature_names == names[:-1].decode().split("\0")


def test_every_code_point_is_what_python_takes_it_for(load):
    """Two- and three-byte sequences, whole and broken, against Python's own decoder."""
    generator = np.random.default_rng(0)
    taken = 0
    for _ in range(3000):
        count = int(generator.integers(1, 5))
        lead = int(generator.choice([0x41, 0xC2, 0xDF, 0xE0, 0xE1, 0xED, 0xEF, 0xF0, 0xF3, 0xF4, 0xF5, 0x80]))
        text = bytes([lead, *generator.choice([0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0x7F, 0xC0], count - 1)])
        try:
            text.decode()
            valid = True
        except UnicodeDecodeError:
            valid = False
        file = File.of(image_of_names)
        file.find(FEATURE_NAMES).data = b"a\0" + text + b"\0"
        assert load(file.assembled()) == (OK if valid else FORMAT), text
        taken += valid
    assert 100 < taken < 2900


torch.manual_seed(0)
image_of_names = image(small(), test_vector=False)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_test_vectors(value, load, library):
    data = image(make_forecaster(2, 3, 1))
    for place in (0, 1, 20, -1):  # the tolerance, x and y
        file = File.of(data)
        values = np.frombuffer(file.find(TEST_VECTOR).data, np.float32).copy()
        values[place] = value
        file.find(TEST_VECTOR).data = values.tobytes()
        assert load(file.assembled()) == NONFINITE
    # Finite nonsense is a model, whose self-test fails.
    for place, nonsense in ((0, -1.0), (-1, 1e38), (5, 3e38)):
        file = File.of(data)
        values = np.frombuffer(file.find(TEST_VECTOR).data, np.float32).copy()
        values[place] = nonsense
        file.find(TEST_VECTOR).data = values.tobytes()
        broken = file.assembled()
        assert load(broken) == OK
        handle = ctypes.c_void_p()
        assert library("model_load_memory", broken, len(broken), ctypes.byref(handle)) == OK
        assert library("model_selftest", handle, None) == SELFTEST
        library("model_destroy", handle)


def test_a_small_file_cannot_ask_for_much_memory(load, library):
    """A window of 2^24 steps is what a file may name; it costs memory where it is begun, not where it is loaded."""
    data = File.of(image(make_forecaster(2, 3, 1))).set(window=2**24, horizon=2**24).assembled()
    assert load(data) == OK
    handle, session = ctypes.c_void_p(), ctypes.c_void_p()
    assert library("model_load_memory", data, len(data), ctypes.byref(handle)) == OK
    library.calls.cellstep_memory_required.restype = ctypes.c_size_t
    assert library("memory_required", handle) < 2**20
    assert library("session_create", handle, ctypes.byref(session)) == OK
    library("session_destroy", session)
    library("model_destroy", handle)


# Mapped files


def test_a_mapped_file_is_used_in_place(data, library, tmp_path):
    """On pages that may not be written to."""
    path = tmp_path / "m.cellstep"
    path.write_bytes(data)
    expected = Session(data)
    x = np.random.default_rng(0).standard_normal((20, expected.input_size)).astype(np.float32)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        pages = np.frombuffer(mapped, np.uint8)
        handle, session, error = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_float()
        address = ctypes.c_void_p(pages.ctypes.data)
        assert library("model_load_in_place", address, len(data), ctypes.byref(handle)) == OK
        assert library("model_selftest", handle, ctypes.byref(error)) == OK
        assert error.value == pytest.approx(expected.selftest())
        assert library("session_create", handle, ctypes.byref(session)) == OK
        y = np.zeros((20, expected.output_size), np.float32)
        assert library("session_run", session, pointer(x), 20, pointer(y)) == OK
        name = library.calls.cellstep_model_feature_name(handle, 0)
        assert name is None or pages.ctypes.data < name < pages.ctypes.data + len(data)
        library("session_destroy", session)
        library("model_destroy", handle)
        assert pages.tobytes() == data
        del pages
    assert np.array_equal(y, expected.run(x))
