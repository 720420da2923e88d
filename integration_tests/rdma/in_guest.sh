#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What the guest runs: the C++ tests named in $2 of folder $1, one of them again over a second card of kind $3, whose
# link goes down; then pytest with the other arguments, if there are any.
# Results lie in $OUT: a line a program, and pytest's own file; and what an extension or a program counted.
folder="$1" programs="$2" device="$3"
shift 3
export GCOV_PREFIX="$OUT/counted"
for test in $programs; do
    "$folder/$test" >"$OUT/$test.log" 2>&1
    echo "$test $?" >>"$OUT/programs"
done
{
    ip link show dummy0 || ip link add dummy0 type dummy
    ip address add 10.8.0.1/24 dev dummy0
    ip link set dummy0 up
    rdma link add "${device}1" type "$device" netdev dummy0 && "$folder/rdma_test" 4 dummy0
} >"$OUT/two_cards.log" 2>&1
echo "two_cards $?" >>"$OUT/programs"
if [ $# -gt 0 ]; then
    python -m pytest -q -p no:cacheprovider --junitxml "$OUT/pytest.xml" "$@"
fi
