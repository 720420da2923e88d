# SPDX-License-Identifier: Apache-2.0
"""How fast the kernels of a CUDA device convert, against a copy inside the device.

GB/s are bytes read plus bytes written, of both, so 1.0 of the copy is the memory's own limit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sage_kv_connector.format.wire_format import WireFormat
from sage_kv_connector.kernels.plane import KVPlane, Range
from sage_kv_connector.kernels.registry import kernels_for

FORMATS = (
    WireFormat("fp8_e4m3", "channel"),
    WireFormat("fp8_e4m3", "token"),
    WireFormat("fp8_e4m3", "head"),
    WireFormat("int4", "channel"),
    WireFormat("int4", "token", zero_point=True),
)


def measure_convert(
    tokens: int = 131072, heads: int = 8, dim: int = 128, page_tokens: int = 16, repeats: int = 20
) -> list[dict[str, Any]]:
    """Encode and decode a bf16 plane with every format; one row each. Needs torch with a CUDA device."""
    import torch

    kernels = kernels_for("hip" if torch.version.hip else "cuda")
    pages = torch.randn(tokens // page_tokens, page_tokens, heads, dim, dtype=torch.bfloat16, device="cuda")
    table = torch.randperm(len(pages)).numpy()
    plane, spans = KVPlane(pages, table, "bf16"), (Range(0, len(table) * page_tokens), Range(0, heads))
    other = torch.empty_like(pages)
    copied = 2 * pages.nbytes / _seconds(lambda: other.copy_(pages), repeats)
    rows = []
    for fmt in FORMATS:
        wire = kernels.encode(plane, *spans, fmt)
        moved = pages.nbytes + wire.nbytes
        for verb, call in (
            ("encode", lambda fmt=fmt: kernels.encode(plane, *spans, fmt)),
            ("decode", lambda fmt=fmt, wire=wire: kernels.decode(wire, plane, *spans, fmt)),
        ):
            speed = moved / _seconds(call, repeats)
            rows.append({
                "kernels": kernels.name, "verb": verb, "format": f"{fmt.dtype} {fmt.granularity}",
                "zero_point": fmt.zero_point, "gb_per_s": speed / 1e9, "copy_gb_per_s": copied / 1e9,
                "of_copy": speed / copied,
            })  # fmt: skip
    return rows


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median time of a call on the device."""
    import torch

    times: list[float] = []
    for turn in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(10_000_000)  # the host queues all of the call meanwhile
        start.record()
        call()
        end.record()
        end.synchronize()
        if turn >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]
