#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Build and run the C++ tests under each sanitizer, and for 64-bit Arm under an emulator where both are
# installed (Debian/Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user). $1: build folder.
set -eu
for sanitizer in address,undefined thread; do
    folder="$1/cpp-$(echo "$sanitizer" | tr , -)"
    cmake -S . -B "$folder" -G Ninja -DSAGE_KVT_TESTS=ON -DSAGE_KVT_SANITIZE="$sanitizer" >&2
    cmake --build "$folder" >&2
    ctest --test-dir "$folder" --output-on-failure
done
if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then
    folder="$1/cpp-aarch64"
    cmake -S . -B "$folder" -G Ninja -DSAGE_KVT_TESTS=ON -DCMAKE_BUILD_TYPE=Release \
        -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
        -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
        "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu" >&2
    cmake --build "$folder" >&2
    ctest --test-dir "$folder" --output-on-failure
else
    echo "64-bit Arm: not tested, its compiler or emulator is not installed"
fi
