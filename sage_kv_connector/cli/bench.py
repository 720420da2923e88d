# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench``: our transport beside its peers and the physical limit."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from sage_kv_connector.cli import bench_engine
from sage_kv_connector.cli.bench_ab import ab, report, stable
from sage_kv_connector.cli.bench_failure import said_of
from sage_kv_connector.cli.bench_idle import bench_idle_command, bench_unfetched_command
from sage_kv_connector.cli.options import AsJson, BackendChoice, SecurityLevels, lengths, security_levels
from sage_kv_connector.console import emit

bench = typer.Typer(
    help="Measure our transport beside its peers and the physical limit.", no_args_is_help=True
)
for command in (
    bench_engine.control,
    bench_engine.beside,
    bench_engine.rate,
    bench_engine.sessions,
    bench_engine.telemetry,
    ab,
    report,
    stable,
):
    bench.command()(command)


def _contenders(text: str, *more: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    allowed = ("nixl", "mooncake", "limit", *more)
    unknown = sorted(set(names) - set(allowed))
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: allowed are {', '.join(allowed)}")
    return names


@bench.command("transfer")
def bench_transfer_command(
    backend: BackendChoice = "shm",
    block_bytes: Annotated[int, typer.Option(min=64, help="size of a shuffled block")] = 65536,
    total_bytes: Annotated[int, typer.Option(min=4096, help="bytes of one run")] = 256 << 20,
    against: Annotated[str, typer.Option(help="any of nixl,mooncake,limit,ib_write_bw")] = "limit",
    repeats: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 7,
    security: SecurityLevels = "none",
    as_json: AsJson = False,
) -> None:
    """Move shuffled blocks between two processes; ours, the limit and the peers in one run."""
    from sage_kv_connector.bench.contender import ContenderError
    from sage_kv_connector.bench.transfer import bench_transfer, transfer_rows

    if total_bytes % block_bytes:
        raise typer.BadParameter(
            f"--total-bytes {total_bytes} must be a multiple of --block-bytes {block_bytes}"
        )
    with said_of(ContenderError):
        levels = security_levels(security, backend)
        contenders = _contenders(against, "ib_write_bw")
        result = bench_transfer(backend, block_bytes, total_bytes, contenders, repeats, levels)
    emit(result, as_json=as_json, title="transfer", rows=transfer_rows(result))
    raise typer.Exit(int(not result["verified"]))


@bench.command("handover")
def bench_handover_command(
    against: Annotated[str, typer.Option(help="any of nixl,mooncake")] = "",
    tokens: Annotated[str, typer.Option(help="prompt lengths, separated by commas")] = "2048,8192,32768",
    repeats: Annotated[int, typer.Option(min=1, help="interleaved rounds of each length")] = 5,
    backend: BackendChoice = "shm",
    target_dtype: Annotated[str, typer.Option(help="our dtype on the wire, as in the options")] = "auto",
    real_attention: Annotated[
        bool,
        typer.Option("--real-attention", help="do not stub prefill's attention: minutes at 32768 tokens"),
    ] = False,
    security: SecurityLevels = "none",
    as_json: AsJson = False,
) -> None:
    """Decode's time to first token after prefill answered, through real vLLM servers; ours and the peers'."""
    from sage_kv_connector.bench.handover import bench_handover, handover_rows
    from sage_kv_connector.config import KVTransportConfig
    from sage_kv_connector.launch.process import ServerError

    prompts = lengths(tokens)
    try:
        KVTransportConfig.load({"target_dtype": target_dtype}, "--target-dtype")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with said_of(ServerError):
        result = bench_handover(
            _contenders(against),
            prompts,
            repeats,
            backend,
            target_dtype=target_dtype,
            real_attention=real_attention,
            security=security_levels(security, backend),
        )
    emit(result, as_json=as_json, title="hand-over", rows=handover_rows(result))


@bench.command("tpot")
def bench_tpot_command(
    tokens: Annotated[int, typer.Option(min=1, help="tokens of the prompts that are handed over")] = 2048,
    a_second: Annotated[float, typer.Option(min=0.1, max=1000, help="hand-overs a second")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="rounds; each times one answer three times")] = 7,
    backend: BackendChoice = "shm",
    as_json: AsJson = False,
) -> None:
    """Time per output token of a request on a real decode server while others are handed over."""
    from sage_kv_connector.bench.tpot import bench_tpot, tpot_rows
    from sage_kv_connector.launch.process import ServerError

    with said_of(ServerError):
        result = bench_tpot(tokens, a_second, rounds, backend)
    emit(result, as_json=as_json, title="tpot", rows=tpot_rows(result))
    raise typer.Exit(int(not result["right"]))


@bench.command("routed")
def bench_routed_command(
    tokens: Annotated[str, typer.Option(help="prompt lengths, separated by commas")] = "2048,8192,32768",
    repeats: Annotated[int, typer.Option(min=1, help="interleaved rounds of each length")] = 5,
    backend: BackendChoice = "shm",
    against: Annotated[str, typer.Option(help="nixl: its pull and its push mode")] = "",
    as_json: AsJson = False,
) -> None:
    """Time to the first token through vLLM's own router: ours at once, ours prefill first, NIXL's pull and push."""
    from sage_kv_connector.bench.routed import bench_routed, routed_rows
    from sage_kv_connector.launch.process import ServerError

    if against not in ("", "nixl"):
        raise typer.BadParameter(f"--against {against!r}: allowed is nixl")
    with said_of(ServerError):
        result = bench_routed(lengths(tokens), repeats, backend, peers=against == "nixl")
    emit(result, as_json=as_json, title="routed", rows=routed_rows(result))
    raise typer.Exit(int(not all(row["right"] for row in result["rows"])))


class Layout(StrEnum):
    """Orders of elements in a page that ``bench convert`` knows."""

    rows = "rows"
    cpu_vec = "cpu-vec"
    cpu_amx = "cpu-amx"


class ConvertDevice(StrEnum):
    """Where ``bench convert`` runs."""

    cpu = "cpu"
    cuda = "cuda"
    hip = "hip"


@bench.command("convert")
def bench_convert_command(
    total_bytes: Annotated[int, typer.Option(min=1 << 20, help="bf16 source; more than the cache")] = 256
    << 20,
    layout: Annotated[Layout, typer.Option(help="order of elements in a page")] = Layout.rows,
    device: Annotated[
        ConvertDevice, typer.Option(help="cuda, hip: the device's kernels against a copy inside it")
    ] = ConvertDevice.cpu,
    emulated: Annotated[
        bool, typer.Option("--emulated", help="a device: on an emulator of the vendor's library")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 5,
    torch_too: Annotated[bool, typer.Option("--torch/--no-torch", help="compare with torch")] = True,
    as_json: AsJson = False,
) -> None:
    """Convert paged KV on one thread; ours, a copy of the pages and torch in one run."""
    if device is not ConvertDevice.cpu:
        _bench_kernels({"cuda": "nvidia", "hip": "hygon"}[device.value], 0, emulated, as_json)
        return
    from sage_kv_connector.bench.convert import bench_convert, convert_rows

    result = bench_convert(total_bytes, layout.value, repeats, with_torch=torch_too)
    emit(result, as_json=as_json, title="convert", rows=convert_rows(result))
    raise typer.Exit(int(not all(one["bit_identical"] for one in result["results"].values())))


def _bench_kernels(vendor: str, device: int, emulated: bool, as_json: bool) -> None:
    from sage_kv_connector.bench.device_kernels import bench_kernels, kernel_rows
    from sage_kv_connector.devices.runtime import DeviceError, RuntimeUnavailable
    from sage_kv_connector.kernels.registry import KernelsUnavailable
    from sage_kv_connector.vendors import open_runtime
    from sage_kv_connector.vendors.emulator import EmulatorSettings

    # On a card as much as its caches don't hold; an emulated one is as slow as a CPU.
    tokens, layers, repeats = (512, 2, 1) if emulated else (32768, 4, 7)
    with said_of(DeviceError, RuntimeUnavailable, KernelsUnavailable, ValueError):
        settings = EmulatorSettings(memory_bytes=256 << 20) if emulated else None
        result = bench_kernels(open_runtime(vendor, settings), device, tokens, layers, repeats)
    emit(result, as_json=as_json, title="kernels", rows=kernel_rows(result))
    raise typer.Exit(int(not result["verified"]))


@bench.command("device")
def bench_device_command(
    vendor: Annotated[str, typer.Option(help="as `sage-kvt doctor` lists them")] = "nvidia",
    device: Annotated[int, typer.Option(min=0, help="the runtime's number")] = 0,
    page_bytes: Annotated[int, typer.Option(min=256, help="bytes of a page of one layer's K or V")] = 65536,
    total_bytes: Annotated[int, typer.Option(min=1 << 20, help="bytes of one run")] = 512 << 20,
    repeats: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 7,
    emulated: Annotated[
        bool, typer.Option("--emulated", help="on an emulator of the vendor's library")
    ] = False,
    count: Annotated[
        bool, typer.Option("--count", help="calls, copies and bytes of hand-overs instead (emulated)")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Pages between a device and pinned memory by our lanes, against one plain copy by the same runtime."""
    if count:
        _count_device(vendor, emulated, as_json)
        return
    from sage_kv_connector.bench.device import bench_device, device_rows
    from sage_kv_connector.devices.runtime import DeviceError, RuntimeUnavailable
    from sage_kv_connector.vendors import open_runtime
    from sage_kv_connector.vendors.emulator import EmulatorSettings

    with said_of(DeviceError, RuntimeUnavailable, ValueError):
        settings = EmulatorSettings(memory_bytes=total_bytes + (1 << 20)) if emulated else None
        runtime = open_runtime(vendor, settings)
        if device >= runtime.device_count():
            raise ValueError(f"--device is {device}, {runtime.api} has {runtime.device_count()}")
        result = bench_device(runtime, device, page_bytes, total_bytes, repeats)
    emit(result, as_json=as_json, title="device", rows=device_rows(result))
    raise typer.Exit(int(not result["verified"]))


def _count_device(vendor: str, emulated: bool, as_json: bool) -> None:
    from sage_kv_connector.bench.device_count import count_device, count_rows
    from sage_kv_connector.bench.device_pair import HandOverFailed
    from sage_kv_connector.devices.runtime import RuntimeUnavailable

    if not emulated:
        raise typer.BadParameter("--count counts what an emulator is asked for: give --emulated too")
    with said_of(HandOverFailed, RuntimeUnavailable, ValueError):
        result = count_device(vendor)
    emit(result, as_json=as_json, title="device, counted", rows=count_rows(result))
    raise typer.Exit(int(not result["verified"]))


bench.command("idle")(bench_idle_command)
bench.command("unfetched")(bench_unfetched_command)


@bench.command("sage")
def bench_sage_command(
    total_bytes: Annotated[int, typer.Option(min=1 << 20, help="bytes of one run")] = 256 << 20,
    repeats: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 7,
    as_json: AsJson = False,
) -> None:
    """sageLLM's KVTransferEngine and pipeline over our backend, beside its own SocketTransferBackend."""
    from sage_kv_connector.bench.sage import MOST_HANDLES, BenchError, bench_sage, sage_rows

    if total_bytes % MOST_HANDLES:
        raise typer.BadParameter(f"--total-bytes {total_bytes} must be a multiple of {MOST_HANDLES}")
    with said_of(BenchError, ImportError, RuntimeError):
        result = bench_sage(total_bytes, repeats)
    emit(result, as_json=as_json, title="sageLLM transfers", rows=sage_rows(result))


@bench.command("store")
def bench_store_command(
    page_bytes: Annotated[int, typer.Option(min=64, help="bytes of a page")] = 1 << 20,
    pages: Annotated[int, typer.Option(min=1, help="pages of one batch")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 7,
    as_json: AsJson = False,
) -> None:
    """A batch of pages into a store in another process and back; shm, tcp and a plain copy in one run."""
    from sage_kv_connector.bench.store import BenchError, bench_store, store_rows

    with said_of(BenchError, RuntimeError):
        result = bench_store(page_bytes, pages, repeats)
    emit(result, as_json=as_json, title="store", rows=store_rows(result))
    raise typer.Exit(int(not result["verified"]))
