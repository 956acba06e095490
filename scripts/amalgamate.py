"""Write the runtime as two files, cellstep.h and cellstep.cpp, for a firmware project to drop in.

    python scripts/amalgamate.py DIRECTORY

The pair is the engine for small targets, the loader and the runtime in the caller's memory: no heap, no files, no
threads, one instruction set, whatever the compiler is told to use. Its numbers are those of the library to the bit.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADER = ROOT / "csrc/runtime/include/cellstep/runtime.h"
#: In the order of a single file. What each includes of cellstep's comes before it.
SOURCES = [
    "csrc/core/image.cpp",
    "csrc/core/compact.cpp",
    "csrc/runtime/model.cpp",
    "csrc/runtime/session.cpp",
    "csrc/runtime/pool.cpp",
]
INCLUDE = re.compile(r'#include "([^"]+)"\n')

HEADER_HEAD = """\
/* cellstep {version}, https://github.com/cellstep: made by scripts/amalgamate.py; change the sources and not this. */
{license}
/* The pair of cellstep.h and cellstep.cpp has no heap. */
#if !defined(CELLSTEP_NO_HEAP)
#define CELLSTEP_NO_HEAP
#endif

"""

SOURCE_HEAD = """\
// cellstep {version}: made by scripts/amalgamate.py; change the sources and not this.
{license}
//
// Compile as C++17, best with -fno-exceptions -fno-rtti -fno-math-errno -fno-trapping-math -fno-threadsafe-statics
// -ffunction-sections -fdata-sections, and link with --gc-sections: what is not called takes no room. To make it
// smaller still, define
//   CELLSTEP_FLOAT32_ONLY  to leave out bfloat16, float16 and int8 weights;
//   CELLSTEP_PLAIN_ONLY    to leave out every option of a layer (bidirectional, proj_size, peephole, layer_norm,
//                          coupled, residual, return_cell_states, fast_activations, other activations, cell_clip,
//                          zoneout); dense layers, scaling, skips and learned initial states stay;
//   CELLSTEP_NO_TEXTS      to leave out what cellstep_status_text says.
// A model that wants what is left out is refused with a status of its own. CELLSTEP_STRICT makes every multiply-add
// round twice, as on processors that cannot fuse them, so that all targets give the same bits.
#define CELLSTEP_COMPACT
#if !defined(CELLSTEP_VERSION_STRING)
#define CELLSTEP_VERSION_STRING "{version}"
#endif

#if defined(__FAST_MATH__)
#error "compile without -ffast-math, which changes results and loses NaN and infinity"
#endif
// What is fused is written as a call of fma(), so that no compiler decides about bits.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

"""


def version():
    found = re.search(r"project\(cellstep VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())
    assert found, "expected project(cellstep VERSION ...) in CMakeLists.txt"
    return found[1]


def license_line(opening, closing=""):
    lines = (ROOT / "LICENSE").read_text().strip().splitlines()
    name = lines[0].strip()
    holder = next((line.strip() for line in lines if line.strip().lower().startswith("copyright")), "")
    return f"{opening} {name}. {holder}{closing}".rstrip()


def inlined(path, seen):
    """The text of a file with cellstep's own includes replaced by theirs, each once."""
    if path in seen:
        return ""
    seen.add(path)

    def replace(match):
        name = match[1]
        if name == "cellstep/runtime.h":
            return '#include "cellstep.h"\n'
        return inlined(ROOT / "csrc" / name, seen)

    text = path.read_text().replace("#pragma once\n", "")
    return INCLUDE.sub(replace, text)


def amalgamate(directory):
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    about = {"version": version()}
    header = HEADER_HEAD.format(license=license_line("/*", " */"), **about) + HEADER.read_text()
    (directory / "cellstep.h").write_text(header)
    seen: set[Path] = set()
    text = SOURCE_HEAD.format(license=license_line("//"), **about)
    text += "\n".join(inlined(ROOT / source, seen) for source in SOURCES)
    # One mention of our own header and of each standard one is enough.
    lines, included = [], set()
    for line in text.splitlines():
        if line.startswith("#include ") and not line.startswith("#include <arm") and "intrin" not in line:
            if line in included:
                continue
            included.add(line)
        lines.append(line)
    (directory / "cellstep.cpp").write_text(re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n")


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(f"usage: {Path(sys.argv[0]).name} DIRECTORY")
    amalgamate(sys.argv[1])


if __name__ == "__main__":
    main()
