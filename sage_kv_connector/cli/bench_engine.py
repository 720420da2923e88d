# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench control``, ``beside``, ``rate``, ``sessions`` and ``telemetry``: our engine without real servers."""

from __future__ import annotations

from typing import Annotated

import typer

from sage_kv_connector.cli.bench_failure import said_of
from sage_kv_connector.cli.options import AsJson, BackendChoice, lengths, words
from sage_kv_connector.console import emit


def control(
    layers: Annotated[int, typer.Option(min=1, help="layers of the caches")] = 80,
    tokens: Annotated[str, typer.Option(help="prompt lengths, separated by commas")] = "1024",
    backends: Annotated[str, typer.Option(help="any of shm,tcp")] = "shm,tcp",
    modes: Annotated[str, typer.Option(help="any of whole,streamed,converted")] = "whole,streamed,converted",
    dim: Annotated[
        int, typer.Option(min=1, max=65536, help="channels of K, and of V, of a token in a layer")
    ] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="hand-overs of each kind")] = 15,
    against: Annotated[str, typer.Option(help="nixl: its own cost for as many descriptors")] = "",
    as_json: AsJson = False,
) -> None:
    """CPU time that a hand-over takes from the interpreter, on both control threads and the engines' own."""
    from sage_kv_connector.bench.control import MODES, bench_control, control_rows

    words(against or "nixl", "--against", ("nixl",))
    chosen_backends, chosen_modes = (
        words(backends, "--backends", ("shm", "tcp")),
        words(modes, "--modes", MODES),
    )
    result = bench_control(
        chosen_backends, layers, lengths(tokens), chosen_modes, repeats, dim=dim, nixl=against == "nixl"
    )
    emit(result, as_json=as_json, title="control", rows=control_rows(result))
    raise typer.Exit(int(not all(row["right"] for row in result["rows"])))


def beside(
    layers: Annotated[int, typer.Option(min=1, help="layers of the caches")] = 80,
    tokens: Annotated[int, typer.Option(min=1, help="tokens of a prompt")] = 1024,
    a_second: Annotated[float, typer.Option(min=0.1, max=1000, help="streamed hand-overs a second")] = 20,
    backend: BackendChoice = "shm",
    rounds: Annotated[int, typer.Option(min=1, help="rounds with and without")] = 7,
    as_json: AsJson = False,
) -> None:
    """What streamed hand-overs take from a thread that runs Python all the time in prefill's process."""
    from sage_kv_connector.bench.beside import bench_beside, beside_rows

    result = bench_beside(backend, layers, tokens, a_second, rounds)
    emit(result, as_json=as_json, title="beside", rows=beside_rows(result))
    raise typer.Exit(int(not result["right"]))


def rate(
    per_second: Annotated[
        float, typer.Option(min=1, max=10000, help="hand-overs that arrive a second")
    ] = 200,
    seconds: Annotated[float, typer.Option(min=1, help="how long they arrive")] = 10,
    layers: Annotated[int, typer.Option(min=1, help="layers of the caches")] = 80,
    tokens: Annotated[int, typer.Option(min=1, help="tokens of a prompt")] = 1024,
    backends: Annotated[str, typer.Option(help="any of shm,tcp")] = "shm,tcp",
    modes: Annotated[str, typer.Option(help="any of whole,streamed")] = "whole,streamed",
    as_json: AsJson = False,
) -> None:
    """Hand-overs at a fixed rate: whether it is sustained, latency, and interpreter time of each side."""
    from sage_kv_connector.bench.rate import MODES, bench_rate, rate_rows

    chosen = words(backends, "--backends", ("shm", "tcp")), words(modes, "--modes", MODES)
    result = bench_rate(*chosen, layers, tokens, per_second, seconds)
    emit(result, as_json=as_json, title="rate", rows=rate_rows(result))
    raise typer.Exit(int(not all(row["right"] for row in result["rows"])))


def sessions(
    sessions: Annotated[int, typer.Option(min=1, max=65536, help="open sessions")] = 1000,
    seconds: Annotated[float, typer.Option(min=1, help="how long to watch them")] = 10,
    backends: Annotated[str, typer.Option(help="any of shm,tcp")] = "shm,tcp",
    as_json: AsJson = False,
) -> None:
    """What many open sessions between two processes cost while they are idle: CPU, memory, descriptors."""
    from sage_kv_connector.bench.sessions import TooManySessions, bench_sessions, sessions_rows

    with said_of(TooManySessions):
        result = bench_sessions(words(backends, "--backends", ("shm", "tcp")), sessions, seconds)
    emit(result, as_json=as_json, title="sessions", rows=sessions_rows(result))
    raise typer.Exit(int(not all(row["sessions"] == sessions for row in result["rows"])))


def telemetry(
    backends: Annotated[str, typer.Option(help="any of shm,tcp")] = "shm,tcp",
    blocks: Annotated[str, typer.Option(help="bytes of a block, separated by commas")] = "4096,65536,1048576",
    mib: Annotated[int, typer.Option(min=1, help="MiB of a transfer")] = 256,
    tokens: Annotated[int, typer.Option(min=1, help="tokens of a hand-over")] = 2048,
    pairs: Annotated[int, typer.Option(min=2, help="made anew, with and without telemetry")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="of each pair")] = 11,
    as_json: AsJson = False,
) -> None:
    """What counting and timing cost: transfers and hand-overs with telemetry and without, in turns."""
    from sage_kv_connector.bench.telemetry import bench_telemetry, telemetry_rows

    chosen = words(backends, "--backends", ("shm", "tcp"))
    sizes = lengths(blocks, "--blocks")
    if odd := [size for size in sizes if (mib << 20) % size]:
        raise typer.BadParameter(f"--blocks {odd[0]}: {mib} MiB must be a multiple of it")
    result = bench_telemetry(chosen, sizes, mib << 20, tokens, pairs, rounds)
    emit(result, as_json=as_json, title="telemetry", rows=telemetry_rows(result))
    raise typer.Exit(int(not all(row["right"] for row in result["rows"])))
