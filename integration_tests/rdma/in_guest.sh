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
# Once soft-RoCE (Linux 6.1) sent while its link was down, it sets up no connection any more: it is made anew each time.
# siw shows that a path comes back.
rounds="1 1 1 1"
[ "$device" = siw ] && rounds=4
two_cards() {
    ip link show dummy0 || ip link add dummy0 type dummy || return 1
    ip address add 10.8.0.1/24 dev dummy0
    for count in $rounds; do
        ip link set dummy0 up
        rdma link add "${device}1" type "$device" netdev dummy0 || return 1
        "$folder/rdma_test" "$count" dummy0 || return 1
        rdma link delete "${device}1"
    done
}
two_cards >"$OUT/two_cards.log" 2>&1
echo "two_cards $?" >>"$OUT/programs"
if [ $# -gt 0 ]; then
    python -m pytest -q -p no:cacheprovider --junitxml "$OUT/pytest.xml" "$@"
fi
