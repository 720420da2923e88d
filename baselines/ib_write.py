# SPDX-License-Identifier: Apache-2.0
"""perftest's ``ib_write_bw`` and ``ib_write_lat`` on this machine's first RDMA port: ``ib_write.py rdma BLOCK TOTAL``.

What a card does with writes of one size from one buffer to another: no scattered blocks, no checks, nobody who wants
the bytes. Each answer is a run of its own, between two processes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from sage_kv_connector.bench.pair import SMALL_BYTES, SMALL_OPS, say
from sage_kv_connector.hardware.report.measure_rdma import against_itself, parse_perftest
from sage_kv_connector.integrations.common.free_port import free_port

#: Whatever the processor's frequency does; by the connection manager, without which iWARP has no connection.
OPTIONS = ("-F", "-R")


def address() -> str:
    """An IP address of the first RDMA device's interface."""
    for device in sorted(Path("/sys/class/infiniband").glob("*/ports/1/gid_attrs/ndevs/0")):
        interface = device.read_text().strip()
        told = subprocess.run(
            ["ip", "-j", "addr", "show", interface], capture_output=True, text=True, check=True
        )
        for one in json.loads(told.stdout)[0]["addr_info"]:
            if one["family"] == "inet":
                return str(one["local"])
    sys.exit("no RDMA device with an IP address was found")


def measured(tool: str, column: str, size: int, count: int) -> float:
    argv = [tool, *OPTIONS, "-p", str(free_port()), "-s", str(size), "-n", str(count)]
    output, why = against_itself(argv, address())
    if output is None:
        sys.exit(f"{tool}: {why}")
    return parse_perftest(tool, output, column)


def main() -> None:
    block, total = int(sys.argv[2]), int(sys.argv[3])
    told = subprocess.run(["ib_write_bw", "--version"], capture_output=True, text=True).stdout
    version = re.search(r"[\d.]+", told)
    say({"name": "ib_write_bw", "version": version[0] if version else "?"})
    say("ready")
    for line in sys.stdin:
        match line.strip():
            case "run":
                # perftest's MB are of 2**20 bytes.
                megabytes = measured("ib_write_bw", "BW average[MB/sec]", block, max(5, total // block))
                say({"gbytes_per_s": megabytes * 2**20 / 1e9})
            case "small":
                column = "t_typical[usec]"
                say({"small_op_us_p50": measured("ib_write_lat", column, SMALL_BYTES, SMALL_OPS)})
            case "verify":
                say({"verified": None})
            case "quit":
                break


if __name__ == "__main__":
    main()
