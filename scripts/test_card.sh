#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The card: its rates under node where there is one, then the tests that are named: the page in a browser, its dashboard.
set -eu
if command -v node >/dev/null; then
    node --test web/card/tests/*.test.js
else
    echo "node was not found: the tests of rates are skipped (Debian/Ubuntu: apt-get install nodejs)" >&2
fi
python -m pytest -q --durations 10 "$@"
