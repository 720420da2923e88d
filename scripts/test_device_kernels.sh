#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Every CUDA and HIP kernel, all pairs of dtypes, through each compiler that is installed (some minutes).
set -eu
cd "$(dirname "$0")/../kernels/cuda"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for source in fp8_convert.cu int4_pack.cu; do
  if command -v nvcc >/dev/null; then
    for arch in sm_80 sm_90; do
      nvcc -std=c++17 -arch=$arch -Werror all-warnings -cubin -o "$out/kernel" $source
      echo "$source: nvcc $arch"
    done
  else
    echo "$source: nvcc is not installed"
  fi
  if command -v hipcc >/dev/null; then
    for arch in gfx906 gfx908 gfx90a gfx1030; do
      HIP_PLATFORM=amd hipcc -std=c++17 -O3 --genco --offload-arch=$arch -ffp-contract=off -Wall -Werror \
        -x hip -o "$out/kernel" $source
      echo "$source: hipcc $arch"
    done
  else
    echo "$source: hipcc is not installed"
  fi
done
