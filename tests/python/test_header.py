"""The deploy file as a C header: the same bytes, in place, in C99 and in C++17."""

import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_forecaster, random_steps
from test_artifacts import whole_chain

import cellstep
from cellstep.exporters.deploy import image
from cellstep.exporters.header import header_text, read_header
from cellstep.runtime import ModelError, Session

DIRECTORY = Path(cellstep.ops.library_path).parent
INCLUDE = next(
    (
        folder
        for folder in (
            Path(cellstep.__file__).parent / "include",
            Path(__file__).parents[2] / "csrc" / "runtime" / "include",
        )
        if (folder / "cellstep" / "runtime.h").exists()
    ),
    None,
)
LANGUAGES = {"C99": ("cc", "-std=c99", "c"), "C11": ("cc", "-std=c11", "c"), "C++17": ("c++", "-std=c++17", "c++")}

MODELS = {
    "float32": make_forecaster,
    "all options": whole_chain,
    "bfloat16": lambda: cellstep.quantize(make_forecaster(), "bfloat16"),
    "float16": lambda: cellstep.quantize(make_forecaster(), "float16"),
    "int8": lambda: cellstep.quantize(make_forecaster(), "int8"),
}


def export_both(model, directory, stem="m", **options):
    for suffix in (".cellstep", ".h"):
        cellstep.export(model, directory / f"{stem}{suffix}", **options)
    return (directory / f"{stem}.cellstep").read_bytes(), directory / f"{stem}.h"


@pytest.mark.parametrize("name", MODELS)
def test_a_header_holds_the_bytes_of_the_deploy_file(name, tmp_path):
    data, path = export_both(MODELS[name](), tmp_path)
    assert read_header(path) == data
    artifact, header = cellstep.load(tmp_path / "m.cellstep"), cellstep.load(path)
    x = np.random.default_rng(0).standard_normal((2, 7, artifact.input_size)).astype(np.float32)
    assert np.array_equal(artifact(x), header(x))
    assert header.weights == artifact.weights and header.feature_names == artifact.feature_names
    assert header.selftest() == artifact.selftest()


def test_a_header_takes_the_options_of_the_deploy_file(tmp_path):
    data, path = export_both(make_forecaster(), tmp_path, fast_activations=True)
    assert read_header(path) == data
    with pytest.raises(ValueError, match="expected fast_activations=False for a quantized model"):
        cellstep.export(MODELS["int8"](), tmp_path / "n.h", fast_activations=True)
    with pytest.raises(ValueError, match="expected a float32 model for a deploy file"):
        cellstep.export(make_forecaster().double(), tmp_path / "n.h")
    assert not (tmp_path / "n.h").exists()


PROGRAM = r"""
#include <cellstep/runtime.h>
#include <stdio.h>
#include "{header}"

int main(void) {{
    cellstep_model* model;
    cellstep_session* session;
    float error = 0.0f;
    static float x[{steps} * {inputs}], y[{steps} * {outputs}];
    if ((uintptr_t){name} % 64) return 2;
    if (cellstep_model_load_in_place({name}, {name}_size, &model) != CELLSTEP_OK) return 3;
    if (cellstep_model_selftest(model, &error) != CELLSTEP_OK) return 4;
    if (cellstep_session_create(model, &session) != CELLSTEP_OK) return 5;
    /* Names of a model in place lie in the array. */
    if (cellstep_model_feature_name(model, 0) < (const char*){name}) return 6;
    if (cellstep_model_feature_name(model, 0) >= (const char*){name} + {name}_size) return 7;
    if (fread(x, sizeof(float), {steps} * {inputs}, stdin) != {steps} * {inputs}) return 8;
    for (int t = 0; t < {steps}; ++t) cellstep_session_step(session, x + t * {inputs}, y + t * {outputs});
    fwrite(y, sizeof(float), {steps} * {outputs}, stdout);
    cellstep_session_destroy(session);
    cellstep_model_destroy(model);
    return 0;
}}
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the compilers are called with options of gcc and clang")
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", ["float32", "all options", "int8"])
def test_a_header_is_compiled_and_used_in_place(name, language, tmp_path):
    compiler, standard, kind = LANGUAGES[language]
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    model = MODELS[name]()
    model.feature_names = [f'/* "{k}" */ \\ ??/\n*/' for k in range(model.input_size)]
    data, path = export_both(model, tmp_path, "48k-über model.v2")
    session = Session(data)
    x = np.random.default_rng(0).standard_normal((20, session.input_size)).astype(np.float32)
    source = tmp_path / "main.txt"
    source.write_text(
        PROGRAM.format(
            header=path.name,
            name="model_48k_ber_model_v2_model",
            steps=len(x),
            inputs=session.input_size,
            outputs=session.output_size,
        )
    )
    program = tmp_path / "program"
    (library,) = (path for path in DIRECTORY.iterdir() if re.fullmatch(r"libcellstep_runtime\.(so|dylib)", path.name))
    command = [compiler, standard, "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-x", kind, source, "-x", "none"]
    command += [library, f"-I{INCLUDE}", f"-I{tmp_path}", f"-Wl,-rpath,{DIRECTORY}", "-o", program]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    done = subprocess.run([program], input=x.tobytes(), capture_output=True)
    assert done.returncode == 0, done.returncode
    assert done.stdout == session.run(x).tobytes()


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("m", "m_model"),
        ("int", "int_model"),
        ("model", "model"),
        ("tide_model", "tide_model"),
        ("a--b__c", "a_b_c_model"),
        ("_Reserved_", "Reserved_model"),
        ("48k", "model_48k_model"),
        ("ß", "model_model"),
        ("*/", "model_model"),
    ],
)
def test_the_array_is_named_after_the_file(stem, name):
    data = image(make_forecaster(2, 3, 1))
    text = header_text(data, stem)
    assert f"static const uint32_t {name}[" in text and f"enum {{ {name}_size = {len(data)} }};" in text
    comment, rest = text.split("\n */\n", 1)
    assert comment.startswith("/*") and "*/" not in comment and "/*" not in comment[2:] and text.isascii()


def test_other_headers_are_refused(tmp_path):
    path = tmp_path / "m.h"
    cellstep.export(make_forecaster(2, 3, 1), path)
    text = path.read_text()
    size = int(re.search(r"_size = (\d+)", text)[1])
    word = text.index("0x", text.index("] = {") + 400)
    for wrong in (
        "",
        "#pragma once\n",
        text[: len(text) // 2],
        text.replace(f"_size = {size}", f"_size = {size + 4}"),
        text.replace(f"_size = {size}", f"_size = {size - 4}"),
        text.replace(f"_size = {size}", "_size = 0"),
        text[:word] + text[word + 12 :],
        text[:word] + "0x100000000" + text[word + 10 :],
    ):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="expected a header that cellstep.export wrote"):
            cellstep.load(path)
    # One that is whole and damaged is refused by the loader.
    path.write_text(text[:word] + "0xffffffff" + text[word + 10 :])
    with pytest.raises(ModelError, match="cannot load"):
        cellstep.load(path)
    with pytest.raises(FileNotFoundError):
        cellstep.load(tmp_path / "none.h")


def test_a_header_is_verified_beside_the_other_artifacts(tmp_path):
    model = make_forecaster()
    export_both(model, tmp_path)
    windows = random_steps(model, 4, 12).numpy()
    report = cellstep.verify(model, [tmp_path / "m.h"], windows)
    assert (report.rows[-1].name, report.rows[-1].artifact) == ("Session", "m.h")
    assert report.rows[-1].bits == report.rows[1].bits and not report.failures


def test_bytes_are_the_same_on_any_machine(tmp_path):
    """Words are what a little-endian machine reads of the file, which the library demands."""
    data, path = export_both(make_forecaster(2, 3, 1), tmp_path)
    first = re.search(r"\{\s*(0x[0-9a-f]{8}), (0x[0-9a-f]{8})", path.read_text())
    assert struct.pack("<2I", int(first[1], 16), int(first[2], 16)) == b"CELLSTEP" == data[:8]


def test_a_header_from_the_command_line(tmp_path):
    model = make_forecaster(2, 3, 1)
    cellstep.save(model, tmp_path / "m.safetensors")
    program = "import sys; from cellstep.cli import main; sys.argv[0] = 'cellstep'; main()"
    command = [sys.executable, "-c", program, "export", tmp_path / "m.safetensors", tmp_path / "m.h"]
    done = subprocess.run([*map(str, command), "--fast-activations"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "m.h: " in done.stdout
    cellstep.export(model, tmp_path / "m.cellstep", fast_activations=True)
    assert read_header(tmp_path / "m.h") == (tmp_path / "m.cellstep").read_bytes()
