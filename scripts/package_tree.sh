#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The package as it is installed, as a tree of links in build/tree: what mypy reads.
set -eu
tree=build/tree/sage_kv_connector
rm -rf "$tree"
mkdir -p "$tree"
for entry in sage_kv_connector/* vendors kernels presets; do
    ln -s "$PWD/$entry" "$tree/"
done
