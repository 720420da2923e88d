#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# A wheel for every Linux whose C and C++ libraries are not older than this one's (manylinux), in the folder $1.
set -eu
plain=$(mktemp -d)
trap 'rm -rf "$plain"' EXIT
python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$plain" .
mkdir -p "$1"
python -m auditwheel repair --wheel-dir "$1" "$plain"/*.whl
