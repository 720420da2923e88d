# SPDX-License-Identifier: Apache-2.0
"""A peer of ``bench transfer`` that ends at this: ``failing_peer.py start|run|small|verify BLOCK TOTAL``."""

from __future__ import annotations

import json
import sys
import time

ANSWERS = {
    "run": {"gbytes_per_s": 1.0},
    "small": {"small_op_us_p50": 1.0, "small_op_us_p99": 2.0},
    "verify": {"verified": True},
}


def main() -> None:
    when = sys.argv[1]
    if when == "start":
        sys.exit("libsomething.so.1 can't be opened")
    print(json.dumps({"name": "peer", "version": "1"}), flush=True)
    print("ready", flush=True)
    for line in sys.stdin:
        word = line.strip()
        if word == "quit":
            return
        if word == when:
            sys.exit(f"no {word} today")
        if when == "nonsense":
            print("[info] a line for people", flush=True)
            continue
        if when == "hang":
            time.sleep(60)
        if when == "loud":
            sys.stderr.write("a warning\n" * 20_000)
        print(json.dumps(ANSWERS[word]), flush=True)


if __name__ == "__main__":
    main()
