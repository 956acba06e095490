"""The road of an amplifier model: its file, `cellstep convert`, the example program over a WAV file."""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_with_cmake, run_command
from test_convert_audio import Torch, guitarml, nam, rtneural_keras

import cellstep
from cellstep.convert.audio import from_audio, prewarm_steps

ROOT = Path(__file__).parents[2]
FORMATS = {"float": (3, 32), "16 bits": (1, 16), "24 bits": (1, 24), "32 bits": (1, 32)}

#: Counts the allocations of a program and writes their number to the file that COUNT_TO names.
COUNTER = """
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
extern void* __libc_malloc(size_t);
static unsigned long count;
void* malloc(size_t size) { ++count; return __libc_malloc(size); }
__attribute__((destructor)) static void tell(void) {
    FILE* file = fopen(getenv("COUNT_TO"), "w");
    if (file) fprintf(file, "%lu", count);
}
"""


@pytest.fixture(scope="module")
def effect(tmp_path_factory):
    directory = tmp_path_factory.mktemp("effect")
    build_with_cmake(
        ROOT / "examples/audio", directory, "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Wpedantic -Wconversion -Werror"
    )
    return directory / "effect"


def sound(samples=1000):
    """Not a whole number of blocks."""
    return np.random.default_rng(0).uniform(-0.9, 0.9, samples).astype(np.float32)


def write_wav(path, samples, kind="float", *, channels=1, rate=48000, extra=b"", extensible=False):
    code, bits = FORMATS[kind]
    if code == 3:
        data = samples.astype("<f4").tobytes()
    else:
        whole = np.clip(np.rint(samples.astype(np.float64) * 2 ** (bits - 1)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        data = b"".join(int(value).to_bytes(bits // 8, "little", signed=True) for value in whole)
    width = bits // 8 * channels
    layout = struct.pack("<HHIIHH", 0xFFFE if extensible else code, channels, rate, rate * width, width, bits)
    if extensible:
        layout += struct.pack("<HHIH14s", 22, bits, 4, code, bytes.fromhex("000000001000800000aa00389b71"))
    chunks = b"WAVE" + extra
    for name, content in ((b"fmt ", layout), (b"data", data)):
        chunks += name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
    path.write_bytes(b"RIFF" + struct.pack("<I", len(chunks)) + chunks)
    return path


def read_wav(path):
    """Format, bits and samples as float64 of a file with a header of 44 bytes."""
    data = path.read_bytes()
    code, channels, _, _, width, bits = struct.unpack_from("<HHIIHH", data, 20)
    (size,) = struct.unpack_from("<I", data, 40)
    assert data[:4] == b"RIFF" and data[36:40] == b"data" and channels == 1 and width == bits // 8
    assert len(data) == 44 + size + size % 2 == 8 + struct.unpack_from("<I", data, 4)[0]
    content = data[44 : 44 + size]
    if code == 3:
        return code, bits, np.frombuffer(content, "<f4")
    values = [int.from_bytes(content[k : k + width], "little", signed=True) for k in range(0, size, width)]
    return code, bits, np.array(values) / 2.0 ** (bits - 1)


def play(effect, model, x, directory, *knobs):
    write_wav(directory / "in.wav", x)
    done = subprocess.run(
        [effect, model, directory / "in.wav", directory / "out.wav", *map(str, knobs)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return read_wav(directory / "out.wav")[2], done.stdout


def sources(rng):
    """Documents of every format that `convert` reads, and options of the command."""
    pytorch = {name: value.tolist() for name, value in Torch().state_dict().items() if not name.startswith("dense")}
    pytorch["hidden.weight"], pytorch["hidden.bias"] = pytorch["hidden.weight"][:1], pytorch["hidden.bias"][:1]
    return {
        "keras.json": (rtneural_keras(rng)[0], []),
        "pytorch.json": (pytorch, ["--dense-activations", "tanh"]),
        "amp.nam": (nam(rng)[0], []),
        "proteus.json": (guitarml()[0], []),
    }


NAMES = ["keras.json", "pytorch.json", "amp.nam", "proteus.json"]


@pytest.mark.parametrize("name", NAMES)
def test_from_a_file_to_sound(effect, name, tmp_path):
    document, options = sources(np.random.default_rng(1))[name]
    source, model = tmp_path / name, tmp_path / "amp.cellstep"
    source.write_text(json.dumps(document))
    done = run_command("cellstep", "convert", source, model, *options)
    assert done.returncode == 0 and "amp.cellstep" in done.stdout, done.stderr
    x = sound()
    y, printed = play(effect, model, x, tmp_path)
    assert np.array_equal(y, cellstep.runtime.Session(model).run(x[:, None])[:, 0])
    assert re.search(r"real-time factor: \d+", printed) and "due in 1333 us" in printed

    chain = from_audio(document, dense_activations=["tanh"] if options else None)
    silence = torch.zeros(1, prewarm_steps(document), 1)
    assert silence.shape[1] == (24000 if name == "amp.nam" else 0)
    with torch.no_grad():
        state = chain.initial_state(1)
        if silence.shape[1]:
            _, state = chain.run(silence, state)
        expected, _ = chain.run(torch.tensor(x).reshape(1, -1, 1), state)
    assert np.array_equal(y, expected[0, :, 0].numpy())


def test_settle_is_chosen(effect, tmp_path):
    source = tmp_path / "amp.nam"
    source.write_text(json.dumps(nam(np.random.default_rng(1))[0]))
    x = sound()
    heard = []
    for steps in (0, 100):
        done = run_command("cellstep", "convert", source, tmp_path / "amp.cellstep", "--settle", steps)
        assert done.returncode == 0, done.stderr
        heard.append(play(effect, tmp_path / "amp.cellstep", x, tmp_path)[0])
    chain = from_audio(source)
    with torch.no_grad():
        _, state = chain.run(torch.zeros(1, 100, 1), chain.initial_state(1))
        expected, _ = chain.run(torch.tensor(x).reshape(1, -1, 1), state)
    assert np.array_equal(heard[1], expected[0, :, 0].numpy()) and not np.array_equal(heard[0], heard[1])


def test_knobs(effect, tmp_path):
    source, model = tmp_path / "amp.json", tmp_path / "amp.cellstep"
    source.write_text(json.dumps(guitarml(inputs=3)[0]))
    assert run_command("cellstep", "convert", source, model).returncode == 0
    x = sound()
    y, _ = play(effect, model, x, tmp_path, 0.25, 0.75)
    rows = np.stack([x, np.full_like(x, 0.25), np.full_like(x, 0.75)], 1)
    assert np.array_equal(y, cellstep.runtime.Session(model).run(rows)[:, 0])


@pytest.fixture
def louder(tmp_path):
    """A model whose output goes past 1."""
    document, _ = rtneural_keras(np.random.default_rng(1))
    cellstep.export(from_audio(document | {"out_gain": 20}), tmp_path / "louder.cellstep")
    return tmp_path / "louder.cellstep"


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_formats_of_samples(effect, louder, kind, extensible, tmp_path):
    """The output has the input's format, and whole numbers are clipped."""
    code, bits = FORMATS[kind]
    extra = b"LIST\x03\0\0\0abc\0"
    write_wav(tmp_path / "in.wav", sound(777), kind, extra=extra, extensible=extensible)
    done = subprocess.run(
        [effect, louder, tmp_path / "in.wav", tmp_path / "out.wav"], capture_output=True, text=True, check=True
    )
    assert "777 samples at 48000 Hz" in done.stdout
    found_code, found_bits, y = read_wav(tmp_path / "out.wav")
    assert (found_code, found_bits) == (code, bits)
    x = sound(777).astype(np.float64)
    if code == 1:
        x = np.rint(x * 2.0 ** (bits - 1)) / 2.0 ** (bits - 1)
    expected = cellstep.runtime.Session(louder).run(x.astype(np.float32)[:, None])[:, 0].astype(np.float64)
    assert np.abs(expected).max() > 1
    if code == 1:
        top = 2.0 ** (bits - 1)
        expected = np.clip(np.rint(expected * top), -top, top - 1) / top
    assert np.array_equal(y, expected)


def test_what_is_wrong_is_one_line(effect, louder, tmp_path):
    good = write_wav(tmp_path / "in.wav", sound())
    data = good.read_bytes()
    (tmp_path / "not.wav").write_bytes(b"no sound at all")
    (tmp_path / "no-samples.wav").write_bytes(data[:36])
    (tmp_path / "empty.wav").write_bytes(data[:40] + bytes(4))
    (tmp_path / "mp3.wav").write_bytes(data[:20] + b"\x55\0" + data[22:])
    (tmp_path / "no-rate.wav").write_bytes(data[:24] + bytes(4) + data[28:])
    (tmp_path / "first.wav").write_bytes(data[:12] + data[36:])
    write_wav(tmp_path / "stereo.wav", sound(), channels=2)
    cellstep.export(cellstep.nn.Chain(cellstep.nn.LSTM(1, 2), answers="every").eval(), tmp_path / "two.cellstep")
    for arguments, message in [
        ([tmp_path / "none.cellstep"], "cannot be opened"),
        ([good], "begins with CELLSTEP"),
        ([tmp_path / "two.cellstep"], "expected a model of one output; .* has 2"),
        ([louder, good, tmp_path / "out.wav", "0.5"], "expected 0 knobs.*; got 1"),
        ([louder, good, tmp_path / "out.wav", "loud"], "expected knobs that are numbers; got 'loud'"),
        ([louder, tmp_path / "none.wav", tmp_path / "out.wav"], "expected a mono WAV file .*; it cannot be read"),
        ([louder, tmp_path / "not.wav", tmp_path / "out.wav"], "it has another header"),
        ([louder, tmp_path / "no-samples.wav", tmp_path / "out.wav"], "it has no samples"),
        ([louder, tmp_path / "empty.wav", tmp_path / "out.wav"], "expected samples; the file has none"),
        ([louder, tmp_path / "mp3.wav", tmp_path / "out.wav"], "it has format 85 of 32 bits"),
        ([louder, tmp_path / "no-rate.wav", tmp_path / "out.wav"], "it names no sample rate"),
        ([louder, tmp_path / "first.wav", tmp_path / "out.wav"], "its samples come before their format"),
        ([louder, tmp_path / "stereo.wav", tmp_path / "out.wav"], "it has 2 channels"),
        ([louder, good, tmp_path / "no" / "out.wav"], "expected a file that can be written"),
    ]:
        done = subprocess.run([effect, *arguments], capture_output=True, text=True)
        assert done.returncode == 1, (arguments, done)
        assert re.fullmatch(f"error: .*{message}.*\n", done.stderr), (arguments, done.stderr)
    assert subprocess.run([effect], capture_output=True).returncode == 2
    # A recording that was cut off plays as far as it goes.
    (tmp_path / "cut.wav").write_bytes(data[: 44 + 4 * 100 + 3])
    done = subprocess.run([effect, louder, tmp_path / "cut.wav", tmp_path / "out.wav"], capture_output=True, text=True)
    assert done.returncode == 0 and "100 samples" in done.stdout
    for place in range(44):
        broken = bytearray(data)
        broken[place] ^= 0xFF
        (tmp_path / "broken.wav").write_bytes(bytes(broken))
        done = subprocess.run([effect, louder, tmp_path / "broken.wav", tmp_path / "out.wav"], capture_output=True)
        assert done.returncode in (0, 1), place


def test_a_string_is_plucked_where_no_file_is_given(effect, louder):
    done = subprocess.run([effect, louder], capture_output=True, text=True)
    assert done.returncode == 0 and "480000 samples" in done.stdout


def test_figures_beside_rtneural(effect, tmp_path):
    chain = cellstep.nn.Chain(cellstep.nn.LSTM(1, 20), cellstep.nn.Dense(20, 1), answers="every").eval()
    cellstep.export(chain, tmp_path / "amp.cellstep")
    assert "on another machine: 0.243 us" in play(effect, tmp_path / "amp.cellstep", sound(), tmp_path)[1]


@pytest.mark.skipif(sys.platform != "linux", reason="counts by LD_PRELOAD and glibc's names")
def test_blocks_allocate_nothing(effect, louder, tmp_path):
    """A sound of ten times as many blocks takes as many allocations: those of files and tables."""
    (tmp_path / "counter.c").write_text(COUNTER)
    library = tmp_path / "counter.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", tmp_path / "counter.c", "-o", library], check=True)
    counts = []
    for blocks in (100, 1000):
        write_wav(tmp_path / "in.wav", sound(64 * blocks))
        count = tmp_path / "count"
        environment = os.environ | {"LD_PRELOAD": str(library), "COUNT_TO": str(count)}
        subprocess.run([effect, louder, tmp_path / "in.wav", tmp_path / "out.wav"], check=True, env=environment)
        counts.append(int(count.read_text()))
    # The file's bytes are read into a vector that doubles, so ten times the bytes cost four allocations more.
    assert 0 < counts[0] <= counts[1] <= counts[0] + 8


def test_formats_are_told_apart(tmp_path):
    rng = np.random.default_rng(1)
    for name, (document, _) in sources(rng).items():
        path = tmp_path / name
        path.write_text(json.dumps(document))
        assert from_audio(path).output_size == 1
    with pytest.raises(ValueError, match="expected dense_activations for RTNeural's PyTorch layout alone"):
        from_audio(nam(rng)[0], dense_activations=["tanh"])
    for rate, steps in ((44100, 22050), (None, 24000), ("x", 24000), (True, 24000), (-1, 24000)):
        assert prewarm_steps(nam(rng)[0] | {"sample_rate": rate}) == steps
    done = run_command("cellstep", "convert", tmp_path / "amp.nam", tmp_path / "amp.wav")
    assert done.returncode == 2 and "expected a path that ends in" in done.stderr
    (tmp_path / "gru.json").write_text(json.dumps({"architecture": "WaveNet"}))
    done = run_command("cellstep", "convert", tmp_path / "gru.json", tmp_path / "amp.cellstep")
    assert done.returncode == 2 and "expected a .nam file of architecture LSTM; got 'WaveNet'" in done.stderr
    assert done.stderr.count("\n") == 1
