#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Format and lint of Python and C++, and types; changes nothing.
set -eu
ruff format --check .
ruff check .
mypy
clang-format --dry-run --Werror sage_kv_connector/csrc/*.cc sage_kv_connector/csrc/*.h \
  sage_kv_connector/kernels/cpu/*.cc sage_kv_connector/kernels/cpu/*.h \
  sage_kv_connector/vendors/emulator/csrc/* \
  sage_kv_connector/kernels/*.h sage_kv_connector/kernels/cuda/*.h sage_kv_connector/kernels/cuda/*.cu* \
  sage_kv_connector/kernels/ascend/*.* sage_kv_connector/kernels/cambricon/*.h sage_kv_connector/kernels/kunlunxin/*.h \
  tests/kernels/*.cc tests/vendors/headers/*.h tests/cpp/*.cc tests/cpp/*.h
