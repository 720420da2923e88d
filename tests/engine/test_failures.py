# SPDX-License-Identifier: Apache-2.0
"""Whatever ends a transfer, its outcome has a code, a stage, the peer and the bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from sage_kv_connector.backends.base import Status
from sage_kv_connector.contract.failure import Code, Stage
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.prompt import Prompt
from sage_kv_connector.engine.pages.paged import PagedSource
from sage_kv_connector.engine.session.transfer_messages import PageRuns
from sage_kv_connector.engine.transfer.offer import OfferTerms
from tests.engine.paged_side import DIM, HEADS, LAYERS, PAGE_SIZE, PAGES, MakeCore, Side, eventually

NBYTES = LAYERS * HEADS * PAGE_SIZE * 2 * DIM


def _unknown(prefill: Side, decode: Side) -> None:
    decode.subscribe(prefill, "never", range(1), [0], finished=True)


def _cancelled(prefill: Side, decode: Side) -> None:
    started = decode.subscribe(prefill, "t", range(1), [0])
    eventually(lambda: prefill.core.counters()["offers"] == 1)
    decode.core.cancel(started[0])


def _deadline(prefill: Side, decode: Side) -> None:
    prefill.offer("t", [0])
    decode.subscribe(prefill, "t", range(1), [0], deadline_s=0.2)


def _no_memory(prefill: Side, decode: Side) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError("no memory for a window")

    prefill.offer("t", [0])
    decode.backend().open_window = refuse  # type: ignore[method-assign]
    decode.subscribe(prefill, "t", range(1), [0])


def _withdrawn(prefill: Side, decode: Side) -> None:
    prefill.offer("t", [0])
    decode.subscribe(prefill, "t", range(1), [0])
    eventually(lambda: prefill.core.is_streaming("t"))
    prefill.core.withdraw(["t"], "preempted")


def _checksum(prefill: Side, decode: Side) -> None:
    prefill.backend().fail_window = Status.CHECKSUM_MISMATCH
    prefill.prefilled("t", [0])
    decode.subscribe(prefill, "t", range(1), [0], finished=True)


def _prompt(prefill: Side, decode: Side) -> None:
    theirs, ours = Prompt([1, 2, 3, 4, 5, 6, 7, 8]), Prompt([8, 7, 6, 5, 4, 3, 2, 1])
    prefill.prefilled("t", [0], OfferTerms(prompt=theirs))
    decode.subscribe(prefill, "t", range(1), [0], finished=True, prompt=ours.digest(8))


def _tokens(prefill: Side, decode: Side) -> None:
    prefill.prefilled("t", [0], OfferTerms(prompt=Prompt([1, 2, 3])))
    wanted = Prompt([1, 2, 3, 4, 5, 6, 7, 8]).digest(8)
    decode.subscribe(prefill, "t", range(1), [0], finished=True, prompt=wanted)


def _selection(prefill: Side, decode: Side) -> None:
    prefill.offer("t", [0], OfferTerms(only_for="another"))
    decode.subscribe(prefill, "t", range(1), [0])


def _beyond_the_end(prefill: Side, decode: Side) -> None:
    source = prefill.offer("t", [0])
    prefill.core.update("t", source.end, (1,))
    prefill.core.finish("t")
    decode.subscribe(prefill, "t", range(4, 5), [0], finished=True)


def _lost(prefill: Side, decode: Side) -> None:
    prefill.offer("t", [0])
    decode.subscribe(prefill, "t", range(1), [0])
    eventually(lambda: prefill.core.is_streaming("t"))
    prefill.backend().close()


def _unreachable(prefill: Side, decode: Side) -> None:
    nobody = PeerAddress("nobody", 0, ("memory://nowhere", "tcp://127.0.0.1:1"))
    decode.subscribe(prefill, "t", range(1), [0], address=nobody)


def _other_engine(prefill: Side, decode: Side) -> None:
    other = PeerAddress("restarted", 0, prefill.core.addresses)
    decode.subscribe(prefill, "t", range(1), [0], address=other)


class Case(NamedTuple):
    do: Callable[[Side, Side], None]
    code: Code
    stage: Stage
    aborted: bool = False
    nbytes: int = NBYTES


CASES = [
    Case(_unknown, Code.UNKNOWN_TRANSFER, Stage.WAIT),
    Case(_cancelled, Code.CANCELLED, Stage.WAIT, aborted=True),
    Case(_deadline, Code.DEADLINE, Stage.WAIT),
    Case(_no_memory, Code.MEMORY, Stage.AGREE),
    Case(_withdrawn, Code.WITHDRAWN, Stage.HOLD),
    Case(_checksum, Code.CHECKSUM, Stage.MOVE),
    Case(_prompt, Code.PROMPT, Stage.AGREE),
    Case(_tokens, Code.TOKENS, Stage.AGREE),
    Case(_selection, Code.BAD_SELECTION, Stage.AGREE),
    Case(_beyond_the_end, Code.TOKENS, Stage.AGREE),
    Case(_lost, Code.SESSION_LOST, Stage.WAIT),
    Case(_unreachable, Code.UNREACHABLE, Stage.CONNECT, nbytes=0),
    Case(_other_engine, Code.OTHER_ENGINE, Stage.CONNECT, nbytes=0),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.do.__name__.strip("_"))
def test_decode_learns_code_stage_peer_and_bytes(make_core: MakeCore, case: Case) -> None:
    prefill, decode = Side(make_core(), 1), Side(make_core(), 2)
    case.do(prefill, decode)
    outcome = decode.outcomes.get(timeout=5)
    failure = outcome.failure
    assert failure is not None and not outcome.ok
    assert (failure.code, failure.stage, failure.nbytes) == (case.code, case.stage, case.nbytes)
    assert outcome.aborted == case.aborted, "who ended it here did not fail; what the peer ended did"
    assert outcome.reached == (case.stage is not Stage.CONNECT)
    assert failure.detail and failure.peer.endswith("[0]")


def test_another_secret_is_told_as_such(make_core: MakeCore) -> None:
    prefill, decode = Side(make_core({"secret": "one"}), 1), Side(make_core({"secret": "two"}), 2)
    decode.subscribe(prefill, "t", range(1), [0])
    failure = decode.outcomes.get(timeout=5).failure
    assert failure is not None and (failure.code, failure.stage) == (Code.BAD_SECRET, Stage.CONNECT)


def test_prefill_learns_why_it_was_not_fetched(make_core: MakeCore) -> None:
    prefill, decode = Side(make_core({"lease_s": 0.2}), 1), Side(make_core(), 2)
    prefill.prefilled("nobody", [0])
    expired = prefill.released.get(timeout=5)
    assert expired.failure is not None and expired.failure.code is Code.EXPIRED and not expired.aborted

    prefill.offer("gone", [0])
    started = decode.subscribe(prefill, "gone", range(1), [0])
    eventually(lambda: prefill.core.is_streaming("gone"))
    decode.core.cancel(started[0])
    prefill.core.finish("gone")
    cancelled = prefill.released.get(timeout=5)
    assert cancelled.failure is not None and cancelled.failure.code is Code.CANCELLED and cancelled.aborted
    assert cancelled.failure.peer == f"{decode.core.engine_id}[0]"


class _VendorError(RuntimeError):
    """What no part of the engine knows."""


def _raise(*_: object, **__: object) -> None:
    raise _VendorError("error 507899")


@pytest.mark.parametrize("where", ["prefill's cursor", "prefill's post", "decode's window"])
def test_a_fault_that_nobody_thought_of_ends_its_transfer_at_once_and_no_other(
    make_core: MakeCore, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    prefill, decode = Side(make_core(), 1), Side(make_core(), 2)
    prefill.prefilled("good", [0])
    decode.subscribe(prefill, "good", range(1), [1], finished=True)
    assert decode.outcomes.get(timeout=5).ok
    assert prefill.released.get(timeout=5).ok
    side = decode if where == "decode's window" else prefill
    faulty = {"prefill's post": "post", "decode's window": "open_window"}.get(where)
    with monkeypatch.context() as patched:
        if faulty is None:
            patched.setattr(PagedSource, "cursor", _raise)
        else:
            patched.setattr(side.backend(), faulty, _raise)
        prefill.prefilled("bad", [2])
        decode.subscribe(prefill, "bad", range(1), [3], finished=True)
        failure = decode.outcomes.get(timeout=5).failure
        assert failure is not None and failure.code is Code.INTERNAL
        assert "_VendorError: error 507899" in failure.detail
    prefill.prefilled("next", [4])
    decode.subscribe(prefill, "next", range(1), [5], finished=True)
    assert decode.outcomes.get(timeout=5).ok
    for counters in (prefill.core.counters(), decode.core.counters()):
        eventually(lambda c=counters: c["subscriptions"] == 0)  # type: ignore[misc]


@pytest.mark.parametrize("pages", [PAGES + 1, 1 << 40])
def test_a_selection_beyond_the_cache_is_refused_before_it_costs_anything(
    make_core: MakeCore, pages: int
) -> None:
    prefill = Side(make_core(), 1)
    source = prefill.offer("t", [0])
    with pytest.raises(ValueError, match=f"has {PAGES} pages here, {pages} are selected"):
        source.cursor((PageRuns(0, ((0, pages),)),), 1)
