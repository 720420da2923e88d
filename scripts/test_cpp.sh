#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Build and run the C++ tests under each sanitizer. $1: build folder.
set -eu
for sanitizer in address,undefined thread; do
    folder="$1/cpp-$(echo "$sanitizer" | tr , -)"
    cmake -S . -B "$folder" -G Ninja -DSAGE_KVT_TESTS=ON -DSAGE_KVT_SANITIZE="$sanitizer" >&2
    cmake --build "$folder" >&2
    ctest --test-dir "$folder" --output-on-failure
done
