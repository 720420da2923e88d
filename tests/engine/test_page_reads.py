# SPDX-License-Identifier: Apache-2.0
"""Converting from device to device between two processes (emulated devices): decode's kernels read prefill's pages."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.devices.runtime import DeviceError
from sage_kv_connector.engine.transfer import page_read
from sage_kv_connector.vendors import VENDORS
from tests.engine.converting_side import Shape
from tests.engine.device_processes import Prefill, decode_side, held_by, prefill_process
from tests.engine.device_side import DeviceSide
from tests.engine.paged_side import eventually
from tests.engine.test_conversion import TOKENS, check, pages_for
from tests.vendors.rig import Rig

#: What differs between the two sides, and the dtype on the wire.
CASES = {
    "fp8": (Shape(), Shape(), "fp8_e4m3"),
    "int4": (Shape(), Shape(), "int4"),
    "pages of 16 to 64": (Shape(), Shape(page_size=64), "auto"),
    "pages of 16 to 64, int4": (Shape(order="nhd"), Shape(page_size=64), "int4"),
    "a slice of heads": (Shape(), Shape(heads=(2, 4)), "auto"),
    "heads of one of two prefills": (Shape(heads=(0, 2)), Shape(), "auto"),
    "half of the layers": (Shape(), Shape(layers=(2, 4)), "fp8_e4m3"),
}


def handed_over(prefill: Prefill, decode: DeviceSide, **how: Any) -> tuple[Outcome, list[int]]:
    prefill.say("offer")
    here = pages_for(decode, 2)
    decode.subscribe(prefill.peer, "t", range(TOKENS), here, finished=True, **how)
    return decode.outcomes.get(timeout=30), here


def landed(
    vendor: str, case: str, **options: Any
) -> tuple[list[np.ndarray[Any, Any]], dict[str, int], dict[str, int]]:
    """Every byte of the decode side, its counters, and the prefill's counts."""
    source, target, wire = CASES[case]
    same, content = held_by(source)
    with (
        decode_side(vendor, target, target_dtype=wire, **options) as decode,
        prefill_process(vendor, source) as prefill,
    ):
        outcome, here = handed_over(prefill, decode)
        assert outcome.ok, outcome.error
        assert outcome.stats is not None
        reads = decode.rig.runtime.features.kernels_read_peers and not options
        assert outcome.stats.mode == ("read" if reads else "staged") and outcome.stats.wire_dtype != "same"
        counters = decode.core.counters()
        assert prefill.say("outcome") is True
        counts = prefill.say("counts")
        decode.download()
        check(same, decode, content, here, range(TOKENS), wire)
        return [layer.copy() for layer in decode.cache], counters, counts


@pytest.mark.parametrize("case", CASES)
def test_what_kernels_read_in_place_equals_what_is_staged(case: str) -> None:
    read, counters, counts = landed("nvidia", case)
    staged, _, _ = landed("nvidia", case, integrity="crc")
    for one, other in zip(read, staged, strict=True):
        np.testing.assert_array_equal(one, other)
    # A part is two launches; nothing is copied and nothing passes the host, on neither side.
    assert counters["d2d_launches"] == 2 * counters["d2d_reads"] > 0
    assert counters["d2d_read_bytes"] > 0 and counters["d2d_bytes"] == 0
    assert (counters["h2d_bytes"], counters["h2d_launches"], counters["staging_bytes"]) == (0, 0, 0)
    assert counts == {"h2d": 0, "d2h": 0, "d2d": 0, "peer": 0, "launches": 0, "sent": 0}


@pytest.mark.parametrize("vendor", VENDORS)
def test_devices_read_in_place_where_their_vendor_promises_it(vendor: str) -> None:
    _, counters, counts = landed(vendor, "pages of 16 to 64, int4")
    if not Rig(vendor).runtime.features.kernels_read_peers:
        assert counters["d2d_launches"] == 0 and counts["launches"] > 0, "staged"
        return
    assert counters["d2d_launches"] == 2 * counters["d2d_reads"] > 0
    assert counts["launches"] == counts["d2h"] == counts["sent"] == 0


class Gate:
    """Launches of a device wait until it is opened; ``waiting`` once one does."""

    def __init__(self) -> None:
        self.waiting, self._open = threading.Event(), threading.Event()

    def stand(self, decode: DeviceSide) -> None:
        runtime: Any = decode.rig.runtime
        launch = runtime.launch

        def held(*arguments: Any) -> None:
            self.waiting.set()
            assert self._open.wait(30)
            launch(*arguments)

        runtime.launch = held

    def open(self) -> None:
        self._open.set()


@contextmanager
def held_pair(
    vendor: str = "hygon", **prefill_options: Any
) -> Iterator[tuple[Prefill, DeviceSide, Gate, list[Any]]]:
    """A transfer of fp8 whose first kernel waits at a gate, and its subscription."""
    shape, gate = Shape(), Gate()
    with (
        decode_side(vendor, shape, target_dtype="fp8_e4m3") as decode,
        prefill_process(vendor, shape, prefill_options) as prefill,
    ):
        gate.stand(decode)
        prefill.say("offer")
        started = decode.subscribe(prefill.peer, "t", range(TOKENS), pages_for(decode, 2), finished=True)
        assert gate.waiting.wait(20)
        try:
            yield prefill, decode, gate, started
        finally:
            gate.open()


def test_layers_are_read_while_prefill_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subscription that comes before the offer; each layer's part begins once it is final, and no sooner."""
    monkeypatch.setattr(page_read, "READ_BYTES", 48 << 10)
    same, content = held_by(Shape())
    with (
        decode_side("ascend", Shape(), target_dtype="fp8_e4m3") as decode,
        prefill_process("ascend", Shape()) as prefill,
    ):
        here = pages_for(decode, 2)
        decode.subscribe(prefill.peer, "t", range(TOKENS), here)
        eventually(lambda: decode.core.counters()["sessions"] == 1)
        prefill.say("begin")
        for layer in range(4):
            assert decode.core.counters()["d2d_reads"] == layer
            prefill.say(f"layer {layer}")
            parts = layer + 1 if layer < 3 else 5  # the last tokens' part has all layers
            eventually(lambda parts=parts: decode.core.counters()["d2d_reads"] == parts)  # type: ignore[misc]
        assert prefill.say("released") == 0
        prefill.say("finish")
        outcome = decode.outcomes.get(timeout=20)
        assert outcome.ok and outcome.stats is not None and outcome.stats.mode == "read", outcome
        assert prefill.say("outcome") is True
        decode.download()
        check(same, decode, content, here, range(TOKENS), "fp8_e4m3")


def test_prefill_holds_its_pages_while_a_kernel_reads_them() -> None:
    """Longer than its lease, which is for pages that nobody fetches."""
    with held_pair(lease_s=1) as (prefill, decode, gate, _):
        assert not gate._open.wait(1.5)
        assert prefill.say("released") == 0
        gate.open()
        assert decode.outcomes.get(timeout=20).ok
        assert prefill.say("outcome") is True


def test_a_killed_prefill_ends_the_transfer_once_its_memory_is_not_read_any_more() -> None:
    with held_pair() as (prefill, decode, gate, _):
        closed: list[bool] = []
        runtime: Any = decode.rig.runtime
        close = runtime.ipc_close

        def noted(*where: Any) -> None:
            closed.append(gate._open.is_set())
            close(*where)

        runtime.ipc_close = noted
        prefill.other.kill()
        opens = threading.Timer(0.5, gate.open)
        opens.start()
        outcome = decode.outcomes.get(timeout=20)
        assert not outcome.ok and "lost" in outcome.error, outcome
        eventually(lambda: decode.core.counters()["sessions"] == 0)
        assert closed and all(closed), "memory was closed while a kernel read it"


def test_a_cancelled_transfer_writes_nothing_more() -> None:
    with held_pair() as (prefill, decode, gate, started):
        opens = threading.Timer(0.5, gate.open)
        opens.start()
        decode.core.cancel_all(started)  # returns when nothing writes into its pages any more
        assert gate._open.is_set()
        outcome = decode.outcomes.get(timeout=20)
        assert not outcome.ok and outcome.aborted, outcome
        assert prefill.say("outcome") is False
        counters = decode.core.counters()
        assert (counters["subscriptions"], counters["device_offers"]) == (0, 0)


def test_what_prefill_withdraws_does_not_count() -> None:
    with held_pair() as (prefill, decode, gate, _):
        prefill.say("withdraw")
        outcome = decode.outcomes
        opens = threading.Timer(0.3, gate.open)
        opens.start()
        ended = outcome.get(timeout=20)
        assert not ended.ok and "withdrawn" in ended.error, ended
        assert prefill.say("outcome") is False
        eventually(lambda: decode.core.counters()["device_offers"] == 0)


def test_a_deadline_ends_what_prefill_does_not_finish() -> None:
    with (
        decode_side("nvidia", Shape(), target_dtype="int4") as decode,
        prefill_process("nvidia", Shape()) as prefill,
    ):
        prefill.say("begin")
        prefill.say("layer 0")
        decode.subscribe(prefill.peer, "t", range(TOKENS), pages_for(decode, 2), deadline_s=1.0)
        outcome = decode.outcomes.get(timeout=20)
        assert not outcome.ok and "deadline" in outcome.error, outcome
        assert decode.core.counters()["device_offers"] == 0


def test_a_failed_kernel_ends_the_transfer_by_name_and_the_next_is_staged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        decode_side("nvidia", Shape(), target_dtype="int4") as decode,
        prefill_process("nvidia", Shape()) as prefill,
    ):
        runtime: Any = decode.rig.runtime
        launch = runtime.launch

        def refused(*_: Any) -> None:
            raise DeviceError("nvidia", "cuLaunchKernel", 719, "CUDA_ERROR_LAUNCH_FAILED")

        runtime.launch = refused
        outcome, _ = handed_over(prefill, decode)
        assert not outcome.ok and "CUDA_ERROR_LAUNCH_FAILED" in outcome.error, outcome
        assert prefill.say("outcome") is False
        runtime.launch = launch
        with caplog.at_level(logging.INFO):
            outcome, _ = handed_over(prefill, decode)
        assert outcome.ok and outcome.stats is not None and outcome.stats.mode == "staged", outcome
        assert "staged in host memory: nvidia: cuLaunchKernel failed" in caplog.text


@pytest.mark.parametrize(
    ("options", "settings", "source", "why"),
    [
        ({"integrity": "crc"}, {}, Shape(), "integrity is 'crc'"),
        ({}, {}, Shape(dtype="fp16"), "there is no kernel of fp16 to int4"),
        ({"target_dtype": "auto"}, {}, Shape(page_size=12), ""),
        ({}, {"virtual_memory": True}, Shape(), "reads no memory of devices"),
    ],
)
def test_what_is_staged_says_why(
    options: dict[str, Any],
    settings: dict[str, Any],
    source: Shape,
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    chosen = {"target_dtype": "int4", **options}
    with (
        caplog.at_level(logging.INFO),
        decode_side("nvidia", Shape(), **chosen) as decode,
        prefill_process("nvidia", source, **settings) as prefill,
    ):
        outcome, _ = handed_over(prefill, decode)
        assert outcome.ok, outcome.error
        assert decode.core.counters()["d2d_reads"] == (0 if why else 1)
        said = f"staged in host memory: {why}" if why else "straight from the peer's memory"
        assert why in caplog.text and said.partition(":")[0] in caplog.text
