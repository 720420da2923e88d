# SPDX-License-Identifier: Apache-2.0
"""The first token of a prefill, offered beside its pages to a decode engine that does not sample it itself."""

from __future__ import annotations

import logging

import numpy as np

from sage_kv_connector.contract.bootstrap_room import metadata_transfer
from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.engine import EngineCore, MemorySource, OfferTerms

logger = logging.getLogger(__name__)

#: Finished prefills whose first token waits for decode at a time.
SLOTS = 4096


class FirstTokenOffers:
    """Tokens lie in registered slots of 8 bytes from ``offer`` until their transfer ended."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._slots = np.zeros(SLOTS, dtype=np.int64)
        self._free = list(range(SLOTS))
        core.register_host_memory(self._slots.ctypes.data, self._slots.nbytes)

    def offer(self, pages: str, token: int) -> None:
        """Offer ``token`` beside the transfer ``pages``. Where all slots are taken decode fails by name."""
        transfer = metadata_transfer(pages)
        if not self._free:
            logger.warning("%s: the first tokens of %d prefills wait for decode, no more fit", pages, SLOTS)
            why = f"{SLOTS} first tokens wait for decode at prefill, no more fit"
            self._core.give_up((transfer,), Reason(Code.FIRST_TOKEN, why))
            return
        slot = self._free.pop()
        self._slots[slot] = token
        segment = np.array([[self._slots.ctypes.data + 8 * slot, 8]], dtype=np.uint64)

        def ended(_: Outcome) -> None:
            self._free.append(slot)

        self._core.offer(transfer, MemorySource(segment), ended, OfferTerms(finished=True))
