#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What the guest runs: the C++ tests named in $2 of folder $1, then pytest with the other arguments, if there are any.
# Results lie in $OUT: a line a program, and pytest's own file; and what an extension or a program counted.
folder="$1" programs="$2"
shift 2
export GCOV_PREFIX="$OUT/counted"
for test in $programs; do
    "$folder/$test" >"$OUT/$test.log" 2>&1
    echo "$test $?" >>"$OUT/programs"
done
if [ $# -gt 0 ]; then
    python -m pytest -q -p no:cacheprovider --junitxml "$OUT/pytest.xml" "$@"
fi
