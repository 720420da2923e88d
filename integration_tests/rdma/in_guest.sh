#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What the guest runs: the C++ tests in folder $1, then pytest with the other arguments, if there are any. Results lie in
# $OUT: a line a program, and pytest's own file.
# What an extension or a program counted lies there, too.
folder="$1"
shift
export GCOV_PREFIX="$OUT/counted"
for test in transfer_test paged_test part_streams_test races_test rdma_test; do
    begun=$(date +%s)
    "$folder/$test" >"$OUT/$test.log" 2>&1
    echo "$test $? $(($(date +%s) - begun))" >>"$OUT/programs"
done
if [ $# -gt 0 ]; then
    python -m pytest -q -p no:cacheprovider --junitxml "$OUT/pytest.xml" "$@"
fi
