#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The wheel, in a fresh environment whose PATH has no compiler: what is in it, doctor, presets, a recorded machine, and
# a transfer between two processes. $1: build folder.
set -eu
root=$PWD
folder="$root/$1/wheel-test"
rm -rf "$folder"
mkdir -p "$folder/wheel"
python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$folder/wheel" .
wheel=$(ls "$folder"/wheel/*.whl)
if python -m zipfile -l "$wheel" | grep -E 'sage_kv_connector/(csrc|kernels/cpu)/'; then
    echo "the wheel holds sources of the data plane" >&2
    exit 1
fi
python -m venv "$folder/env"
PATH="$folder/env/bin"
python -m pip install --quiet --disable-pip-version-check "$wheel"
if command -v c++ || command -v g++ || command -v cc; then
    echo "there is a compiler on the path" >&2
    exit 1
fi
cd "$folder" # not the checkout: what is imported must be the installed package
sage-kvt doctor
sage-kvt presets list
sage-kvt probe --from-recording "$root/tests/hardware/recordings/nvidia"
python -c "
from importlib.resources import files
import sage_kv_connector.kernels.golden as golden
from sage_kv_connector.vendors import VENDORS, descriptor_text
assert next(golden.golden_vectors('fp8_e4m3')) and all(map(descriptor_text, VENDORS))
assert (files('sage_kv_connector.vendors') / 'hygon' / 'emulator.cc').is_file()
"
python "$root/examples/move_numpy_pages.py"
