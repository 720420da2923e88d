# SPDX-License-Identifier: Apache-2.0
"""vLLM's layouts in host memory and on (emulated) devices: what prefill computed reaches decode, byte for byte."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform

from sage_kv_connector.integrations.common.prefill_ranks import PrefillEngine, ranks_of
from tests.integrations.vllm_device import DeviceWorker, LayoutWorker, put_on
from tests.integrations.vllm_layouts import LAYOUTS, Layout
from tests.integrations.vllm_workers import (
    PAGE,
    SPEC,
    TOKENS,
    finished,
    handed_over,
    load,
    offered,
    progress,
)
from tests.vendors.rig import Rig

MakeWorker = Callable[..., LayoutWorker]


#: Another process: for each layout that it reads a line of, a prefill until the next line.
CHILD = """
import json, sys
import pytest
from tests.integrations.vllm_device import DeviceWorker, put_on
from tests.integrations.vllm_layouts import LAYOUTS
from tests.integrations.vllm_workers import TOKENS, finished, offered, progress
from tests.vendors.rig import Rig
rig = Rig("nvidia", memory_bytes=256 << 20)
put_on(rig, pytest.MonkeyPatch())
for line in sys.stdin:
    layout = LAYOUTS[line.strip()]
    worker, tables = DeviceWorker("p", 1, "auto", layout, rig), len(layout.groups)
    worker.step(offers=[offered("t")], progress=[progress("t", (1, 2, 3), TOKENS, tables)])
    worker.step(finished=[finished("t", (1, 2, 3), tables)])
    _, _, _, addresses, node = worker.side.registered()
    pages, rows = worker.pages([1, 2, 3]), worker.rows([1, 2, 3]) if layout.converts else []
    told = [[page.hex() for page in pages], [row.tobytes().hex() for row in rows]]
    print(json.dumps([addresses, node, *told]), flush=True)
    sys.stdin.readline()
    worker.close()
"""


@pytest.fixture(scope="module")
def child() -> Iterator[subprocess.Popen[str]]:
    root = Path(__file__).parents[2]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CHILD], cwd=root, **pipes) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_go_from_device_to_device(
    layout: str, child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig("nvidia", memory_bytes=256 << 20)
    put_on(rig, monkeypatch)
    addresses, node, pages, _ = held_by(child, layout)
    decode = DeviceWorker("d", 2, "auto", LAYOUTS[layout], rig)
    try:
        prefill = PrefillEngine(ranks_of("p", {0: tuple(addresses)}, node))
        first = decode.step(loads=[load(prefill, "t", [4, 6, 5], tables=len(LAYOUTS[layout].groups))])
        assert not decode.until(lambda one: bool(one.received), first).failed
        assert [page.hex() for page in decode.pages([4, 6, 5])] == pages
        assert decode.moved("landed") == sum(len(page) // 2 for page in pages)
    finally:
        decode.close()
        forget(child)


@pytest.mark.parametrize("layout", [name for name, one in LAYOUTS.items() if one.converts])
def test_pages_of_another_size_are_read_from_the_other_device(
    layout: str, child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig("nvidia", memory_bytes=256 << 20)
    put_on(rig, monkeypatch)
    addresses, node, _, rows = held_by(child, layout)
    one = LAYOUTS[layout].of_pages(2 * PAGE)
    decode = DeviceWorker("d", 2, "auto", one, rig)
    try:
        prefill = PrefillEngine(ranks_of("p", {0: tuple(addresses)}, node))
        wanted = load(prefill, "t", [4, 6], tables=len(one.groups))
        pages = tuple(each._replace(tokens=range(TOKENS)) for each in wanted.pages)
        first = decode.step(loads=[replace(wanted, pages=pages)])
        assert not decode.until(lambda step: bool(step.received), first).failed
        assert [row[:TOKENS].tobytes().hex() for row in decode.rows([4, 6])] == rows
        assert decode.side._registered is not None
        counters = decode.side._registered.core.counters()
        assert counters["d2d_launches"] == 2 * counters["d2d_reads"] > 0
        assert counters["h2d_bytes"] == counters["d2d_bytes"] == 0
    finally:
        decode.close()
        forget(child)


def held_by(child: subprocess.Popen[str], layout: str) -> Any:
    """Addresses and node of a prefill of this layout in the child, its pages and rows of tokens in hex."""
    assert child.stdin and child.stdout
    print(layout, file=child.stdin, flush=True)
    return next(json.loads(line) for line in child.stdout if line.startswith("["))  # vLLM logs there, too


def forget(child: subprocess.Popen[str]) -> None:
    assert child.stdin
    print(file=child.stdin, flush=True)


@pytest.fixture(params=["host", "nvidia", "ascend"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWorker]:
    """Workers in host memory, on a device whose kernels convert, and on one where the CPU does."""
    made: list[LayoutWorker] = []
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    rig = None if request.param == "host" else Rig(request.param, memory_bytes=256 << 20)
    if rig is not None:
        put_on(rig, monkeypatch)

    def worker(name: str, layout: Layout, **more: Any) -> LayoutWorker:
        arguments = (name, 1 + len(made), "tcp", layout)
        made.append(
            LayoutWorker(*arguments, **more) if rig is None else DeviceWorker(*arguments, rig, **more)
        )
        return made[-1]

    yield worker
    for one in made:
        one.close()


def fetched(prefill: LayoutWorker, decode: LayoutWorker, source: list[int], target: list[int]) -> bool:
    """Whether decode got the prompt into pages that are another size than prefill's."""
    tables = len(prefill.layout.groups)
    prefill.step(offers=[offered("t")], progress=[progress("t", tuple(source), TOKENS, tables)])
    prefill.step(finished=[finished("t", tuple(source), tables)])
    wanted = load(prefill.prefill(), "t", target, tables=tables)
    pages = tuple(one._replace(tokens=range(TOKENS)) for one in wanted.pages)
    first = decode.step(loads=[replace(wanted, pages=pages)])
    return not decode.until(lambda one: bool(one.received), first).failed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_of_one_layout(layout: str, make: MakeWorker) -> None:
    prefill, decode = make("p", LAYOUTS[layout]), make("d", LAYOUTS[layout])
    assert handed_over(prefill, decode, "t", [1, 2, 3], [4, 6, 5])


@pytest.mark.parametrize("layout", [name for name, one in LAYOUTS.items() if not one.converts])
def test_what_only_goes_as_it_is_is_refused_by_name(
    layout: str, make: MakeWorker, caplog: pytest.LogCaptureFixture
) -> None:
    one = LAYOUTS[layout]
    prefill, decode = make("p", one), make("d", one.of_pages(2 * PAGE))
    assert not fetched(prefill, decode, [1, 2, 3], [4, 6])
    assert "page_size: 32 here, 16 at the peer (incompatible)" in caplog.text


CONVERTING = [name for name, layout in LAYOUTS.items() if layout.converts]


@pytest.mark.parametrize("layout", CONVERTING)
def test_pages_of_another_size(layout: str, make: MakeWorker) -> None:
    one = LAYOUTS[layout]
    prefill, decode = make("p", one), make("d", one.of_pages(2 * PAGE))
    assert fetched(prefill, decode, [1, 2, 3], [4, 6])
    for sent, landed in zip(prefill.rows([1, 2, 3]), decode.rows([4, 6]), strict=True):
        np.testing.assert_array_equal(sent, landed[:TOKENS])


@pytest.mark.parametrize("layout", [name for name in CONVERTING if LAYOUTS[name].dtype == "auto"])
def test_another_dtype_on_the_wire(layout: str, make: MakeWorker) -> None:
    options = {"target_dtype": "fp32"}  # holds every bf16
    prefill, decode = (make(name, LAYOUTS[layout], options=options) for name in ("p", "d"))
    assert handed_over(prefill, decode, "t", [1, 2, 3], [4, 6, 5])
    sent = prefill.moved("sent")
    assert sent == 2 * sum(one.nbytes for one in decode.rows([4, 6, 5]))


OF_SPEC = [name for name, layout in LAYOUTS.items() if layout.kinds == (SPEC,)]


@pytest.mark.parametrize("layout", [name for name in OF_SPEC if name != "LBHNC"])
def test_every_layout_of_k_and_v_meets_every_other(layout: str, make: MakeWorker) -> None:
    prefill, decode = make("p", LAYOUTS[layout]), make("d", LAYOUTS["LBHNC"])
    assert fetched(prefill, decode, [1, 2, 3], [4, 6, 5])
    assert prefill.pages([1, 2, 3]) == decode.pages([4, 6, 5])


@pytest.mark.parametrize("layout", [name for name, one in LAYOUTS.items() if one.dtype == "fp8"])
def test_scales_of_an_fp8_cache_are_honoured(layout: str, make: MakeWorker) -> None:
    scales = {f"0.{layer}": SimpleNamespace(_k_scale_float=0.5, _v_scale_float=4.0) for layer in range(2)}
    prefill, decode = make("p", LAYOUTS[layout], attention=scales), make("d", LAYOUTS["LBHNC"])
    assert fetched(prefill, decode, [1, 2, 3], [4, 6, 5])
    for sent, landed in zip(prefill.rows([1, 2, 3]), decode.rows([4, 6, 5]), strict=True):
        codes = torch.from_numpy(sent).view(torch.float8_e4m3fn).float()
        expected = codes.reshape(TOKENS, SPEC.num_kv_heads, 2, -1) * torch.tensor([0.5, 4.0])[:, None]
        values = torch.from_numpy(landed).view(torch.bfloat16).float()
        np.testing.assert_array_equal(values.numpy(), expected.reshape(TOKENS, -1).numpy())
