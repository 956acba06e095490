"""The deploy file as a C header, for programs that have no file system: the same bytes in an array."""

import json
import os
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import cellstep
from cellstep import _runtime
from cellstep.exporters.deploy import deploy_bytes
from cellstep.exporters.files import replacing

if TYPE_CHECKING:
    from cellstep.exporters.torchscript import PackedChain
    from cellstep.nn import Chain

_WORDS_IN_A_LINE = 10
_PREFIX = "model_"  # of names that would not be ours to choose

_TEMPLATE = """\
/*
 * {title}
 * Made by cellstep {version}. Include it in one source file.
 *
{facts}
 *
 * From here to a forecast, with cellstep/runtime.h (in a firmware without a heap: cellstep_model_init and
 * cellstep_session_init, which take your memory):
 *
 *     cellstep_model* model;
 *     cellstep_session* session;
 *     float x[{inputs}], y[{outputs}];
 *     if (cellstep_model_load_in_place({name}, {name}_size, &model) != CELLSTEP_OK) return 1;
 *     if (cellstep_session_create(model, &session) != CELLSTEP_OK) return 1;
 *     cellstep_session_step(session, x, y);
 */
#ifndef CELLSTEP_{guard}_H
#define CELLSTEP_{guard}_H

#include <stdint.h>

/* A cache line: the kernels read the weights in whole vectors. */
#if defined(__cplusplus)
alignas(64)
#elif defined(__STDC_VERSION__) && __STDC_VERSION__ >= 201112L
_Alignas(64)
#elif defined(_MSC_VER)
__declspec(align(64))
#else
__attribute__((aligned(64)))
#endif
static const uint32_t {name}[{words}] = {{
{array}
}};

enum {{ {name}_size = {size} }}; /* bytes; the array is filled up with zeros to whole words */

#endif
"""

_PATTERN = re.compile(
    r"static const uint32_t (?P<name>\w+)\[\d+\]\s*=\s*\{(?P<words>[0-9a-fxA-FX,\s]*)\};\s*"
    r"enum\s*\{\s*(?P=name)_size\s*=\s*(?P<size>\d+)\s*\};"
)


def export_header(model: "Chain | PackedChain", path: Path, fast_activations: bool = False, settle: Any = None) -> None:
    """Write the deploy file of a float32 or quantized model as a C array, for C99 and C++11 and later.

    The array is named after the file: that of ``tide.h`` is ``tide_model``, and ``tide_model_size`` is its size in
    bytes. It is constant and begins at a multiple of 64 bytes, so that a model is used where it lies.

    Args:
        fast_activations, settle: as for ``.cellstep``.

    Raises:
        ValueError: as for ``.cellstep``.
    """
    text = header_text(deploy_bytes(model, fast_activations, settle), path.stem)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="ascii")


def header_text(data: bytes, stem: str) -> str:
    """The header of a deploy file's bytes, whose array is named after ``stem``."""
    name = _identifier(stem)
    info = _runtime.Model.from_bytes(data)
    words = np.frombuffer(data + bytes(-len(data) % 4), "<u4")
    # Words, as a compiler takes a quarter of the time and memory that it needs for bytes.
    digits = [f"0x{word:08x}" for word in words.tolist()]
    rows = [digits[begin : begin + _WORDS_IN_A_LINE] for begin in range(0, len(digits), _WORDS_IN_A_LINE)]
    facts = [
        f"{len(data):,} bytes, {info.weights} weights; the state is {info.num_layers} x {info.h_size} values of h and "
        f"{info.num_layers} x {info.hidden_size} of c.",
        f"x ({info.input_size}), one step: {_names(info.feature_names)}.",
        f"y ({info.output_size}): {_names(info.output_names)}.",
    ]
    if info.window:
        facts.append(f"Trained to answer {info.window} steps.")
    if info.horizon:
        facts.append(f"Forecasts {info.horizon} steps behind the last one seen.")
    lines = [line for fact in facts for line in textwrap.wrap(fact, 110, subsequent_indent="  ")]
    return _TEMPLATE.format(
        title=_comment(json.dumps(stem)) + ": a cellstep model, the bytes of its deploy file.",
        version=cellstep.__version__,
        facts="\n".join(f" * {line}" for line in lines),
        inputs=info.input_size,
        outputs=info.output_size,
        name=name,
        guard=name.upper(),
        words=len(digits),
        array="\n".join("    " + ", ".join(row) + "," for row in rows),
        size=len(data),
    )


def read_header(path: str | os.PathLike[str]) -> bytes:
    """The deploy file in a header that :func:`export_header` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is another header.
    """
    found = _PATTERN.search(Path(path).read_bytes().decode("latin-1"))
    if found:
        try:
            words = [int(word, 16) for word in found["words"].replace(",", " ").split()]
            data = np.array(words, np.uint32).astype("<u4").tobytes()
        except (ValueError, OverflowError):
            data = b""
        if 0 < int(found["size"]) <= len(data) < int(found["size"]) + 4:
            return data[: int(found["size"])]
    raise ValueError(f"expected a header that cellstep.export wrote; got '{os.fspath(path)}'; export the model again")


def _identifier(stem: str) -> str:
    """A name that C and C++ leave to a program: no digit or underscore first, no two underscores, no keyword."""
    name = re.sub("[^A-Za-z0-9]+", "_", stem).strip("_")
    if not re.search("(^|_)model$", name):
        name += "_model"
    return name if re.match("[A-Za-z]", name) else _PREFIX + name.lstrip("_")


def _names(names: list[str]) -> str:
    return ", ".join(_comment(json.dumps(name)) for name in names) or "without names"


def _comment(text: str) -> str:
    """Text that neither ends a comment nor begins one."""
    return text.replace("*/", "*\\/").replace("/*", "/\\*")
