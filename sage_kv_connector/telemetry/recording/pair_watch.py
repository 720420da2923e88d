# SPDX-License-Identifier: Apache-2.0
"""Whether prefill and decode are paired and nothing is handed over: said aloud, with the cause.

A request is answered even where no KV arrives, since decode computes the prompt itself; so nobody would notice. Here
failures count that follow each other without one hand-over between, and, before the first hand-over ever, requests
that ask for none.
"""

from __future__ import annotations

import logging
import time
from collections import Counter

from sage_kv_connector.contract.failure import Code
from sage_kv_connector.contract.failure_kinds import FAILURE_KINDS
from sage_kv_connector.telemetry.recording.snapshot import Note, Sample

logger = logging.getLogger(__name__)

#: So many in a row are no accident. It is said again when there are ten times as many.
FAILED_IN_A_ROW, UNPAIRED_IN_A_ROW = 3, 20
NO_PARAMETERS = "no_parameters"
CHECK = "sage-kvt doctor --pair PREFILL_URL DECODE_URL checks the pair by one hand-over"


class PairWatch:
    """Of one engine. One thread at a time."""

    def __init__(self) -> None:
        self._worked = False
        self._failed: Counter[str] = Counter()
        self._unpaired = 0
        self._next_failed, self._next_unpaired = FAILED_IN_A_ROW, UNPAIRED_IN_A_ROW
        self._causes: set[str] = set()  #: those that held at some time
        self.cause = ""  #: why nothing is handed over, "" if something is, or too little is known

    def worked(self) -> None:
        """Something was handed over."""
        if self.cause:
            logger.warning("KV is handed over again")
        self._worked, self.cause = True, ""
        self._failed.clear()
        self._next_failed = FAILED_IN_A_ROW

    def failed(self, code: str) -> Note | None:
        """A request's KV did not arrive, or was not fetched. Returns what an operator is to know."""
        self._failed[code] += 1
        total = sum(self._failed.values())
        if total < self._next_failed:
            return None
        self._next_failed = 10 * total
        self.cause = self._failed.most_common(1)[0][0]
        kind = FAILURE_KINDS[Code(self.cause)]
        text = (
            f"prefill and decode are paired and nothing is handed over: the last {total} hand-overs failed, "
            f"{self._failed[self.cause]} of them with code {self.cause}. {kind.meaning} {kind.remedy} {CHECK}"
        )
        return self._say(text)

    def unpaired(self, requests: int) -> Note | None:
        """So many requests came that ask neither to offer their KV nor to fetch it."""
        self._unpaired += requests
        if self._worked or self._failed or self._unpaired < self._next_unpaired:
            return None
        self._next_unpaired = 10 * self._unpaired
        self.cause = NO_PARAMETERS
        text = (
            f"nothing is handed over: {self._unpaired} requests came and none asked to offer its KV or to fetch it "
            "(kv_transfer_params). Is there a router that pairs prefill and decode, and do requests go through it? "
            f"{CHECK}"
        )
        return self._say(text)

    def samples(self) -> list[Sample]:
        """Of a cause that holds no more 0: at an engine's /metrics a gauge keeps what it was told last."""
        return [Sample("unused_pair", (cause,), int(cause == self.cause)) for cause in sorted(self._causes)]

    def _say(self, text: str) -> Note:
        self._causes.add(self.cause)
        logger.warning("%s", text)
        return Note(time.time(), self.cause, text)
