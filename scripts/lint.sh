#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Format and lint of Python and C++, and types; changes nothing.
set -eu
ruff format --check .
ruff check .
sh scripts/package_tree.sh
mypy
clang-format --dry-run --Werror $(git ls-files '*.cc' '*.h' '*.cu' '*.cuh' ':!integration_tests')
