# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench idle`` and ``unfetched``: what servers cost that compute nothing."""

from __future__ import annotations

from typing import Annotated

import typer

from sage_kv_connector.cli.bench_failure import said_of
from sage_kv_connector.cli.options import AsJson
from sage_kv_connector.console import emit


def bench_idle_command(
    seconds: Annotated[float, typer.Option(min=1.0, help="how long to watch")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """CPU that idle servers take with our connector, and without one."""
    from sage_kv_connector.bench.idle import bench_idle, idle_rows
    from sage_kv_connector.launch.process import ServerError

    with said_of(ServerError):
        result = bench_idle(seconds)
    emit(result, as_json=as_json, title="idle", rows=idle_rows(result))


def bench_unfetched_command(
    seconds: Annotated[float, typer.Option(min=1.0, help="how long to watch each state")] = 20.0,
    offers: Annotated[int, typer.Option(min=2, max=1000, help="unfetched prefills of the last state")] = 100,
    against: Annotated[str, typer.Option(help="nixl: the same of its connector")] = "",
    as_json: AsJson = False,
) -> None:
    """CPU of a prefill server that holds prefills which nobody fetches, and what a new request waits for them."""
    from sage_kv_connector.bench.unfetched import bench_unfetched, unfetched_rows
    from sage_kv_connector.launch.process import ServerError

    if against not in ("", "nixl"):
        raise typer.BadParameter(f"--against {against!r}: allowed is nixl")
    with said_of(ServerError):
        result = bench_unfetched(seconds, offers, peers=against == "nixl")
    emit(result, as_json=as_json, title="unfetched", rows=unfetched_rows(result))
