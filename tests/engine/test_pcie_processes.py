# SPDX-License-Identifier: Apache-2.0
"""Device to device between two processes (emulated devices): direct, staged where that can't be, and ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sage_kv_connector.format.reference import from_float
from sage_kv_connector.vendors import VENDORS
from tests.engine.converting_side import Shape
from tests.engine.device_processes import Prefill, decode_side, prefill_process
from tests.engine.device_side import DeviceSide
from tests.engine.paged_side import eventually
from tests.engine.test_conversion import TOKENS, pages_for

SHAPE = Shape(order="nhd")


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
                raw = from_float(rng.normal(size=(TOKENS, 32)).astype(np.float32), "bf16")
                np.testing.assert_array_equal(decode.elements(layer, plane, head, range(TOKENS), here), raw)


@pytest.mark.parametrize("vendor", VENDORS)
def test_pages_go_from_device_to_device(vendor: str) -> None:
    with decode_side(vendor, SHAPE) as decode, prefill_process(vendor, SHAPE) as prefill:
        prefill.say("offer")
        here = fetch(prefill, decode)
        outcome = decode.outcomes.get(timeout=20)
        assert outcome.ok, outcome.error
        assert outcome.stats is not None and (outcome.stats.backend, outcome.stats.mode) == ("pcie", "ipc")
        check(decode, here)
        counters = decode.core.counters()
        assert counters["d2d_bytes"] == outcome.stats.nbytes and counters["h2d_bytes"] == 0
        assert prefill.say("outcome") is True


@pytest.mark.parametrize("vendor", VENDORS)
def test_memory_that_has_no_handle_is_staged(vendor: str) -> None:
    with decode_side(vendor, SHAPE) as decode, prefill_process(vendor, SHAPE, virtual_memory=True) as prefill:
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
    ],
)
def test_what_can_t_go_directly_is_staged_in_host_memory(
    vendor: str, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    with (
        decode_side("ascend", SHAPE, **options) as decode,
        prefill_process(vendor, SHAPE, **settings) as prefill,
    ):
        prefill.say("offer")
        here = fetch(prefill, decode)
        outcome = decode.outcomes.get(timeout=20)
        assert outcome.ok, outcome.error
        check(decode, here)
        counters = decode.core.counters()
        assert counters.get("d2d_bytes", 0) == 0 and counters["h2d_bytes"] > 0


def test_a_killed_prefill_ends_the_transfer() -> None:
    with decode_side("hygon", SHAPE) as decode, prefill_process("hygon", SHAPE) as prefill:
        decode.rig.control.hold("d2d")
        prefill.say("offer")
        fetch(prefill, decode)
        eventually(lambda: decode.core.counters()["device_offers"] > 0)
        prefill.other.kill()
        decode.rig.control.release()
        outcome = decode.outcomes.get(timeout=20)
        assert not outcome.ok and "lost" in outcome.error, outcome
        eventually(lambda: decode.core.counters()["sessions"] == 0)


def test_a_failed_copy_names_the_vendors_error() -> None:
    with decode_side("nvidia", SHAPE) as decode, prefill_process("nvidia", SHAPE) as prefill:
        prefill.say("offer")
        decode.rig.control.set(dma_error_after_copies=3)
        fetch(prefill, decode)
        outcome = decode.outcomes.get(timeout=20)
        assert not outcome.ok and "nvidia: " in outcome.error, outcome
        assert prefill.say("outcome") is False
        assert decode.core.counters()["subscriptions"] == 0
