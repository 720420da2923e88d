# SPDX-License-Identifier: Apache-2.0
"""The decode side of a converting transfer whose parts kernels here make straight of the peer's pages.

The window is one over the peer's pages as they lie there, and the device's own backend fills it (``backends/pcie``): it
guards, ends and revokes it as it does one that is copied. So there is nothing to grant and no staging memory. Control
thread only.
"""

from __future__ import annotations

from functools import partial
from typing import cast

from sage_kv_connector.backends.device_backend import DeviceBackend
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.engine.conversion.bounce import DeviceGroup
from sage_kv_connector.engine.conversion.converters import Converters
from sage_kv_connector.engine.conversion.device_rooms import READ_BYTES
from sage_kv_connector.engine.conversion.peer_reads import Heads, PartReads, ReadGroup
from sage_kv_connector.engine.conversion.wire_plan import plan_wire
from sage_kv_connector.engine.pages.target import PagesTarget
from sage_kv_connector.engine.session.session import Session
from sage_kv_connector.engine.session.transfer_messages import SubscribeParts
from sage_kv_connector.engine.transfer.subscription import Subscription
from sage_kv_connector.engine.transfer.wanted_box import wanted_box


class PageRead:
    """One transfer. Construction raises ValueError, saying why it is staged in host memory instead."""

    def __init__(
        self, session: Session, target: PagesTarget, config: KVTransportConfig, converters: Converters
    ) -> None:
        assert session.peer is not None and session.peer.schema is not None
        reads = converters.conversions.peer_reads
        if not session.backend.capabilities.device_memory or reads is None:
            raise ValueError(f"{session.backend.capabilities.name} reads no memory of devices")
        if config.integrity == "crc":
            raise ValueError("integrity is 'crc', which needs bytes that a CPU can read")
        if reads.lacks:
            raise ValueError(reads.lacks)
        ours, theirs = converters.schema, session.peer.schema
        plan = plan_wire(ours, theirs, config.target_dtype)
        self._box = wanted_box(ours, target, plan, READ_BYTES)
        self.plan, self.converted = plan, self._box.converted
        groups = {}
        for one in self._box.asked:
            group = one.group
            peers = converters.of_peer(session, group, one.formats)
            here: DeviceGroup = converters.from_wire(session, target.view.groups[group], group, one.formats)
            if here.kernels is None:
                raise ValueError(f"kernels don't convert group {group} here")
            pages_of = partial(target.pages_of, group)
            groups[group] = ReadGroup(peers, here, plan.runs[group], one.tokens, pages_of)
        heads = Heads(plan.first_head - theirs.head_start, plan.first_head - ours.head_start, plan.heads)
        self._reads = PartReads(self._box.parts, groups, heads, reads.buffer)
        self.nbytes = self._reads.nbytes

    def open_window(self, session: Session, generation: int) -> int:
        """Raises OSError or ValueError as the backend does."""
        backend = cast(DeviceBackend, session.backend)
        return backend.open_read_window(session.connection, self.nbytes, generation, self._reads.read)

    def message(self, subscription: Subscription, window: bytes) -> SubscribeParts:
        return self._box.message(subscription, self.nbytes, False, window)


def page_read(
    session: Session, target: PagesTarget, config: KVTransportConfig, converters: Converters
) -> PageRead | None:
    """None where the transfer is staged in host memory. Which way it takes, and why, is logged once a session."""
    if converters.conversions.peer_reads is None:
        return None
    why = session.stages
    if not why:
        try:
            read = PageRead(session, target, config, converters)
        except ValueError as error:
            why = str(error)
        else:
            session.log_once("KV is converted by this device's kernels, straight from the peer's memory")
            return read
    session.log_once(f"KV to convert is staged in host memory: {why}")
    return None
