#!/usr/bin/env bash
# The kernel tests on 64-bit Arm, under an emulator, with each instruction set: the library is cross-compiled, and Python
# and numpy for Arm are unpacked into build/arm, nothing is installed.  Needs Debian with: apt-get install qemu-user
# g++-aarch64-linux-gnu, and dpkg --add-architecture arm64 && apt-get update.  PYTHON: an interpreter of this machine with nanobind and pip.
#
#     tests/arm/run.sh [pytest arguments; tests/kernels by default]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}
ARM=$PWD/build/arm
VERSION=3.11 # of Debian 12
LIBRARIES=(libc6 libstdc++6 libgcc-s1 zlib1g libexpat1 libffi8 libssl3 libbz2-1.0 liblzma5 libuuid1 libsqlite3-0 libcrypt1)

if [ ! -x "$ARM/python" ]; then
  mkdir -p "$ARM/packages" "$ARM/root"
  (cd "$ARM/packages" && apt-get download -qq "${LIBRARIES[@]/%/:arm64}" \
    "python$VERSION-minimal:arm64" "libpython$VERSION-minimal:arm64" "libpython$VERSION-stdlib:arm64" "libpython$VERSION-dev:arm64")
  for package in "$ARM"/packages/*.deb; do dpkg -x "$package" "$ARM/root"; done
  "$PYTHON" -m pip install --quiet --target "$ARM/site" --python-version "$VERSION" --only-binary=:all: \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
    numpy ml_dtypes pytest pytest-timeout hypothesis msgspec
  printf '#!/bin/sh\nexec qemu-aarch64 -L "%s" "%s" "$@"\n' "$ARM/root" "$ARM/root/usr/bin/python$VERSION" >"$ARM/python"
  chmod +x "$ARM/python"
fi

cmake -S . -B "$ARM/build" -G Ninja -DCMAKE_TOOLCHAIN_FILE="$PWD/tests/arm/toolchain.cmake" \
  -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" \
  -DPython_INCLUDE_DIR="$ARM/root/usr/include/python$VERSION" -DCMAKE_CXX_FLAGS="-I$ARM/root/usr/include" >/dev/null
cmake --build "$ARM/build"
rm -rf "$ARM/package" && mkdir -p "$ARM/package"
cp -r src/penjing "$ARM/package/" && rm -f "$ARM"/package/penjing/_native.*.so
cp "$ARM"/build/native/_native.*.so "$ARM/package/penjing/_native.cpython-${VERSION/./}-aarch64-linux-gnu.so"

# Tests start other interpreters: they too must go through the emulator.
for isa in neon scalar; do
  PENJING_ISA=$isa PYTHONPATH="$ARM/package:$ARM/site" "$ARM/python" -c \
    "import sys; sys.executable = '$ARM/python'; import pytest; sys.exit(pytest.main(sys.argv[1:]))" \
    "${@:-tests/kernels}" -q -p no:cacheprovider --timeout 3000
done
