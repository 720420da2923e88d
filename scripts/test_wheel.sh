#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The wheel, in a fresh environment whose PATH has no compiler: what is in it, doctor, presets, a recorded machine, and
# a transfer between two processes. $1: build folder.
set -eu
root=$PWD
folder="$root/$1/wheel-test"
rm -rf "$folder"
sh scripts/build_wheel.sh "$folder/wheel"
wheel=$(ls "$folder"/wheel/*.whl)
case $wheel in *manylinux*) ;; *)
    echo "$wheel is for this machine alone" >&2
    exit 1
    ;;
esac
if python -m zipfile -l "$wheel" | grep -E 'sage_kv_connector/(csrc|kernels/cpu)/'; then
    echo "the wheel holds sources of the data plane" >&2
    exit 1
fi
# Charts are there where npm built them, and then with the library's licence.
charts=$(python -m zipfile -l "$wheel" | grep -c 'card/built/charts\.' || true)
if [ "$charts" != "$(ls sage_kv_connector/telemetry/reading/card/built/charts.* 2>/dev/null | wc -l)" ]; then
    echo "the wheel has $charts of the card's built files" >&2
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
from sage_kv_connector.telemetry.reading.card.page import page_files
assert {'index.html', 'card.js'} <= set(page_files()) and ('charts.js' in page_files()) == ($charts == 3)
assert (files('sage_kv_connector') / 'dashboards' / 'kv-transport.json').is_file()
assert (files('sage_kv_connector.vendors') / 'hygon' / 'emulator.cc').is_file()
"
python "$root/examples/move_numpy_pages.py"
