#!/bin/sh
# Makes the page: build.sh MODEL.cellstep [DIRECTORY]. Needs the PyPI package ziglang; PYTHON names the interpreter.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
model=${1:?usage: build.sh MODEL.cellstep [DIRECTORY]}
directory=${2:-$here/build}
python=${PYTHON:-python3}

mkdir -p "$directory"
"$python" "$here/../../scripts/amalgamate.py" "$directory"
# The module imports nothing, and its exports are the functions of cellstep.h.
"$python" -m ziglang c++ -target wasm32-wasi -mcpu=generic+simd128 -mexec-model=reactor -O3 -std=c++17 \
  -fno-exceptions -fno-rtti -fno-threadsafe-statics -fno-math-errno -fno-trapping-math -ffp-contract=off \
  -fvisibility=hidden "$directory/cellstep.cpp" -o "$directory/cellstep.wasm" \
  -s -Wl,--export-dynamic -Wl,--export=__heap_base
cp "$model" "$directory/forecaster.cellstep"
cp "$here/../../python/cellstep/data/sand_point_tmy3.csv" "$directory/series.csv"
cp "$here/index.html" "$here/cellstep.js" "$here/page.js" "$directory/"
rm "$directory/cellstep.h" "$directory/cellstep.cpp"
echo "python3 -m http.server --bind 127.0.0.1 --directory $directory"
