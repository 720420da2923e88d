# SPDX-License-Identifier: Apache-2.0
"""Device to device between two processes (emulated devices): direct, staged where that can't be, and ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.engine.core import EngineCore
from sage_kv_connector.vendors import VENDORS
from tests.engine.converting_side import Shape
from tests.engine.device_side import DeviceSide
from tests.engine.paged_side import eventually
from tests.engine.test_conversion import TOKENS, pages_for
from tests.vendors.rig import Rig

PAGES = 24
#: The prefill process: offers "t" when told, and tells what its counters say.
CHILD = """
import json, sys
from tests.engine.converting_side import Shape
from tests.engine.test_pcie_processes import prefill_side
from tests.engine.test_conversion import TOKENS, pages_for, write_content
side = prefill_side(sys.argv[1], json.loads(sys.argv[2]))
pages = pages_for(side, 1)
write_content(side, pages, range(TOKENS))
side.upload()
print(json.dumps([side.core.engine_id, side.core.addresses]), flush=True)
for line in sys.stdin:
    if line == "offer\\n":
        source = side.offer("t", pages)
        side.ready("t", source, slice(None), len(pages))
        side.core.finish("t")
        print("offered", flush=True)
    elif line == "outcome\\n":
        print(json.dumps(side.released.get(timeout=20).ok), flush=True)
side.core.close()
"""


def make_core(options: dict[str, Any], **kwargs: Any) -> EngineCore:
    core = EngineCore(KVTransportConfig.load({"backend": "pcie", **options}), **kwargs)
    core.start()
    return core


def prefill_side(vendor: str, settings: dict[str, Any]) -> DeviceSide:
    rig = Rig(vendor, memory_bytes=64 << 20, **settings)
    side = DeviceSide(make_core, Shape(order="nhd"), PAGES, rig)
    rig.control.set(virtual_memory=False)  # of the KV cache alone: what we allocate has handles
    return side


class Prefill(NamedTuple):
    process: subprocess.Popen[str]
    peer: PeerAddress

    def say(self, word: str) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@contextmanager
def prefill_process(vendor: str, **settings: Any) -> Iterator[Prefill]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, vendor, json.dumps(settings)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout
    try:
        engine, addresses = json.loads(process.stdout.readline())
        yield Prefill(process, PeerAddress(engine, 0, tuple(addresses)))
        process.stdin.close()
        process.wait(20)
    finally:
        process.kill()
        process.wait()


@contextmanager
def decode_side(vendor: str, **options: Any) -> Iterator[DeviceSide]:
    side = DeviceSide(make_core, Shape(order="nhd"), PAGES, Rig(vendor, memory_bytes=64 << 20), **options)
    try:
        yield side
    finally:
        side.core.close()


def fetch(prefill: Prefill, decode: DeviceSide) -> list[int]:
    here = pages_for(decode, 2)
    decode.subscribe(prefill.peer, "t", range(TOKENS), here, finished=True)
    return here


def check(decode: DeviceSide, here: list[int]) -> None:
    decode.download()
    for layer in range(4):
        for plane in (0, 1):
            for head in range(4):
                rng = np.random.default_rng([layer, plane, head])
                from sage_kv_connector.format.reference import from_float

                raw = from_float(rng.normal(size=(TOKENS, 32)).astype(np.float32), "bf16")
                np.testing.assert_array_equal(decode.elements(layer, plane, head, range(TOKENS), here), raw)


@pytest.mark.parametrize("vendor", VENDORS)
def test_pages_go_from_device_to_device(vendor: str) -> None:
    with decode_side(vendor) as decode, prefill_process(vendor) as prefill:
        prefill.say("offer")
        here = fetch(prefill, decode)
        outcome = decode.outcomes.get(timeout=20)
        assert outcome.ok, outcome.error
        assert outcome.stats is not None and (outcome.stats.backend, outcome.stats.mode) == ("pcie", "ipc")
        check(decode, here)
        counters = decode.core.counters()
        assert counters["d2d_bytes"] == outcome.stats.nbytes and counters["h2d_bytes"] == 0
        assert json.loads(prefill.say("outcome")) is True


@pytest.mark.parametrize("vendor", VENDORS)
def test_memory_that_has_no_handle_is_staged(vendor: str) -> None:
    with decode_side(vendor) as decode, prefill_process(vendor, virtual_memory=True) as prefill:
        prefill.say("offer")
        here = fetch(prefill, decode)
        outcome = decode.outcomes.get(timeout=20)
        assert outcome.ok, outcome.error
        assert outcome.stats is not None and outcome.stats.backend != "pcie"
        check(decode, here)


@pytest.mark.parametrize(
    ("vendor", "settings", "options"),
    [
        ("cambricon", {}, {}),
        ("ascend", {"ipc": False}, {}),
        ("ascend", {}, {"integrity": "crc"}),
        ("ascend", {}, {"target_dtype": "fp32"}),
    ],
)
def test_what_can_t_go_directly_is_staged_in_host_memory(
    vendor: str, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    with decode_side("ascend", **options) as decode, prefill_process(vendor, **settings) as prefill:
        prefill.say("offer")
        here = fetch(prefill, decode)
        outcome = decode.outcomes.get(timeout=20)
        assert outcome.ok, outcome.error
        check(decode, here)
        counters = decode.core.counters()
        assert counters.get("d2d_bytes", 0) == 0 and counters["h2d_bytes"] > 0


def test_a_killed_prefill_ends_the_transfer(tmp_path: Path) -> None:
    with decode_side("hygon") as decode, prefill_process("hygon") as prefill:
        decode.rig.control.hold("d2d")
        prefill.say("offer")
        fetch(prefill, decode)
        eventually(lambda: decode.core.counters()["device_offers"] > 0)
        prefill.process.kill()
        prefill.process.wait()
        decode.rig.control.release()
        outcome = decode.outcomes.get(timeout=20)
        assert not outcome.ok and "lost" in outcome.error, outcome
        eventually(lambda: decode.core.counters()["sessions"] == 0)


def test_a_failed_copy_names_the_vendors_error() -> None:
    with decode_side("nvidia") as decode, prefill_process("nvidia") as prefill:
        prefill.say("offer")
        decode.rig.control.set(dma_error_after_copies=3)
        fetch(prefill, decode)
        outcome = decode.outcomes.get(timeout=20)
        assert not outcome.ok and "nvidia: " in outcome.error, outcome
        assert json.loads(prefill.say("outcome")) is False
        assert decode.core.counters()["subscriptions"] == 0
