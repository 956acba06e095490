#!/usr/bin/env bash
# Installs what `make test-embedded` needs beside a C++ compiler and the project's .venv: compilers and emulators from
# Debian's packages, zig from PyPI into .venv. Does nothing where all is there.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "error: $*" >&2
  exit 1
}

packages=()
need() { # PACKAGE COMMAND...: the package is needed if the command fails
  local package=$1
  shift
  "$@" >/dev/null 2>&1 || packages+=("$package")
}

compiles() { # COMPILER OPTION...: a program that uses the C++ library
  echo '#include <new>
int main() { delete new int; }' | "$@" -x c++ - -o /dev/null
}

# The compiler that is there decides which 32-bit library goes with it; gcc-multilib would remove the cross compilers.
version=$( (g++ -dumpversion || echo 12) 2>/dev/null)
need g++ compiles g++
need clang compiles clang++
need libclang-rt-dev compiles clang++ -fsanitize=address
need "lib32stdc++-${version%%.*}-dev" compiles g++ -m32
need libc6-dev-i386 compiles g++ -m32
need g++-aarch64-linux-gnu compiles aarch64-linux-gnu-g++
need g++-arm-linux-gnueabihf compiles arm-linux-gnueabihf-g++
need gcc-arm-none-eabi arm-none-eabi-g++ --version
need libnewlib-arm-none-eabi compiles arm-none-eabi-g++ -mcpu=cortex-m4 -mthumb --specs=rdimon.specs
need libstdc++-arm-none-eabi-newlib compiles arm-none-eabi-g++ -mcpu=cortex-m4 -mthumb --specs=rdimon.specs
need qemu-user qemu-riscv64 --version
need qemu-user-static qemu-x86_64-static --version
need qemu-system-arm qemu-system-arm --version
need nodejs node --version
need chromium chromium --version

if ((${#packages[@]})); then
  as_root=()
  if [[ $(id -u) != 0 ]]; then
    command -v sudo >/dev/null || fail "expected root or sudo to install: ${packages[*]}"
    as_root=(sudo)
  fi
  command -v apt-get >/dev/null || fail "no apt-get here: install by hand what these Debian packages hold: ${packages[*]}"
  log=$(mktemp)
  export DEBIAN_FRONTEND=noninteractive
  install=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends)
  echo "installing ${packages[*]}"
  { "${as_root[@]}" apt-get -q update && "${install[@]}" "${packages[@]}"; } >"$log" 2>&1 ||
    fail "apt-get could not install ${packages[*]}: $(grep -m1 '^E: ' "$log" || tail -n1 "$log") (all of it: $log)"
  rm -f "$log"
fi

python=.venv/bin/python
[[ -x $python ]] || fail "no .venv here: run make venv first"
requirement=$(sed -n 's/^embedded = \["\(.*\)"\]$/\1/p' pyproject.toml)
"$python" -c "import ziglang" 2>/dev/null ||
  "$python" -m pip install --quiet --disable-pip-version-check "$requirement" ||
  fail "pip could not install $requirement"
