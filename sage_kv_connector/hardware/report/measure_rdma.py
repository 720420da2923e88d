# SPDX-License-Identifier: Apache-2.0
"""An RDMA port against itself, with perftest's ``ib_write_bw`` and ``ib_write_lat``.

Through the port's own loopback: it shows what the NIC and its PCIe link do, not the cable.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time

from sage_kv_connector.hardware.probing.profile import Measurement
from sage_kv_connector.hardware.probing.tool_output import ToolFormatError, plain_lines

#: Seconds of one run of perftest.
LIMIT = 20.0


def parse_perftest(command: str, output: str, column: str) -> float:
    """A value of perftest's table by its column's name; sizes are in the first column.

    Columns can have a space ("BW average[Gb/sec]"), so they are found by the unit in brackets.
    Raises ToolFormatError.
    """
    header: list[str] | None = None
    last = (0, "")
    for number, line in plain_lines(output):
        text = line.strip()
        if not text:
            continue
        last = (number, line)
        if text.startswith("#bytes"):
            header = _columns(text)
            if column not in header:
                raise ToolFormatError(command, number, line, f"a column {column!r}")
        elif header is not None and text[0].isdigit():
            values = text.split()
            if len(values) < header.index(column) + 1:
                raise ToolFormatError(command, number, line, f"{len(header)} values")
            try:
                return float(values[header.index(column)])
            except ValueError:
                raise ToolFormatError(command, number, line, f"a number under {column!r}") from None
    raise ToolFormatError(command, *last, "a table that begins with #bytes, and a row")


def _columns(header: str) -> list[str]:
    columns: list[str] = []
    for word in header.split():
        # "BW average[Gb/sec]" are two words of one column, as is "99% percentile[usec]".
        if columns and columns[-1] in ("BW", "99%", "99.9%"):
            columns[-1] += f" {word}"
        else:
            columns.append(word)
    return columns


def measure_port(device: str, port: int) -> tuple[list[Measurement], list[str]]:
    """Bandwidth and latency of a port, and notes on what could not be had."""
    found: list[Measurement] = []
    notes: list[str] = []
    for tool, options, column, unit, factor in (
        (
            "ib_write_bw",
            ("-s", "1048576", "-n", "200", "--report_gbits"),
            "BW average[Gb/sec]",
            "bytes/s",
            1e9 / 8,
        ),
        ("ib_write_lat", ("-s", "8", "-n", "1000"), "t_typical[usec]", "us", 1.0),
    ):
        path = shutil.which(tool)
        if path is None:
            notes.append(f"{tool} (perftest) is not here: not measured")
            continue
        argv = [path, "-d", device, "-i", str(port), "-F", "-p", str(_free_port()), *options]
        output, said = against_itself(argv)
        if output is None:
            notes.append(f"{tool}: {said}")
            continue
        try:
            value = parse_perftest(tool, output, column) * factor
        except ToolFormatError as error:
            notes.append(str(error))
            continue
        how = f"{tool} through the port's own loopback"
        found.append(
            Measurement(
                name="RDMA", subject=device, value=value, unit="us" if unit == "us" else "bytes/s", how=how
            )
        )
    return found, notes


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number: int = server.getsockname()[1]
        return number


def against_itself(argv: list[str], address: str = "127.0.0.1") -> tuple[str | None, str]:
    """Run a server and a client of perftest here; the client's output, or None and why."""
    server = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + LIMIT
        while True:
            client = subprocess.run(
                [*argv, address], capture_output=True, text=True, timeout=LIMIT, check=False
            )
            # The server needs a moment to listen; perftest's client does not wait for it.
            refused = "connect" in client.stderr.lower() and client.returncode != 0
            if not refused or server.poll() is not None or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        if client.returncode != 0:
            first = (client.stderr or client.stdout).strip().splitlines()
            return None, f"exit status {client.returncode}{': ' + first[0][:200] if first else ''}"
        return client.stdout, ""
    except subprocess.TimeoutExpired:
        return None, f"no result within {LIMIT:g} s"
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGKILL)
        server.wait(5)
