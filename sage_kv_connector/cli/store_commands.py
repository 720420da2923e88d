# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt store`` and ``sage-kvt bench store``: their options."""

from __future__ import annotations

from typing import Annotated

import typer

from sage_kv_connector.console import emit, progress

AsJson = Annotated[bool, typer.Option("--json", help="print JSON objects on stdout, all else on stderr")]


def store(
    capacity: Annotated[str, typer.Option(help="memory for KV, such as 8GiB")],
    host: Annotated[
        str, typer.Option(help="address to listen on; others than loopback need a secret")
    ] = "auto",
    port: Annotated[int, typer.Option(min=0, max=65535, help="tcp port; 0: any free one")] = 0,
    option: Annotated[
        list[str] | None, typer.Option(help="another option of the transport, key=value; may be repeated")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Keep KV of others in this process's memory, until SIGINT or SIGTERM.

    Prints one line with its addresses when it serves, and one with its counters when it ended.
    """
    from sage_kv_connector.cli.store import parse_capacity, run_store, say

    try:
        for line in run_store(parse_capacity(capacity), host, port, option or ()):
            say(line, as_json=as_json)
    except (ValueError, OSError) as error:
        progress.print(f"store: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error


def bench_store_command(
    page_bytes: Annotated[int, typer.Option(min=64, help="bytes of a page")] = 1 << 20,
    pages: Annotated[int, typer.Option(min=1, help="pages of one batch")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 7,
    as_json: AsJson = False,
) -> None:
    """A batch of pages into a store in another process and back; shm, tcp and a plain copy in one run."""
    from sage_kv_connector.bench.store import BenchError, bench_store, store_rows

    try:
        result = bench_store(page_bytes, pages, repeats)
    except (BenchError, RuntimeError) as error:
        progress.print(f"bench: {error}")
        raise typer.Exit(1) from error
    emit(result, as_json=as_json, title="store", rows=store_rows(result))
    raise typer.Exit(int(not result["verified"]))
