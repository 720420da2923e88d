# SPDX-License-Identifier: Apache-2.0
"""What converts a group between this side's pages and a session's wire formats, made once."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any
from weakref import WeakKeyDictionary

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.cache_view import GroupView
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine.conversion.bounce import DeviceGroup
from sage_kv_connector.engine.conversion.jobs import Conversions
from sage_kv_connector.engine.conversion.wire_plan import Formats, needs_conversion
from sage_kv_connector.engine.session.session import Session

#: Of one session: formats are the peer's to choose.
MAX_MADE = 256


class Converters:
    """Of one engine whose cache can be converted: ``schema`` describes it, ``conversions`` does the work.

    What was made for a session goes with it.
    """

    def __init__(self, schema: KVCacheSchema, conversions: Conversions) -> None:
        self.schema = schema
        self.conversions = conversions
        # The view is kept beside its converter, so that its id stays its own.
        self._made: WeakKeyDictionary[
            Session, OrderedDict[tuple[object, ...], tuple[GroupView | None, Any]]
        ] = WeakKeyDictionary()

    def to_wire(self, session: Session, view: GroupView, group: int, formats: Formats) -> Any:
        """For ``conversions.encode``, towards a consumer. Raises ValueError as ``Conversions.group``."""
        return self._get(session, view, group, formats, encode=True)

    def from_wire(self, session: Session, view: GroupView, group: int, formats: Formats) -> Any:
        """For ``conversions.decode``, from a producer. Raises ValueError as ``Conversions.group``."""
        return self._get(session, view, group, formats, encode=False)

    def of_peer(self, session: Session, group: int, formats: Formats) -> DeviceGroup:
        """The peer's own pages of a group, to be read in place. Raises ValueError as ``PeerReads.of_peer``."""
        made = self._made.setdefault(session, OrderedDict())
        key = (None, group, formats)
        if key not in made:
            reads = self.conversions.peer_reads
            assert reads is not None and session.peer is not None and session.peer.schema is not None
            made[key] = None, reads.of_peer(group, formats, self.schema, session.peer.schema)
        found: DeviceGroup = made[key][1]
        return found

    def needed(self, session: Session, config: KVTransportConfig) -> bool:
        """Whether what comes in over a session must be converted."""
        theirs = session.peer.schema if session.peer else None
        if theirs is None:
            return False
        # A CRC needs bytes that a CPU can read: they are staged then.
        on_device = session.backend.capabilities.device_memory and config.integrity != "crc"
        return needs_conversion(self.schema, theirs, config.target_dtype, device_memory=on_device)

    def _get(self, session: Session, view: GroupView, group: int, formats: Formats, *, encode: bool) -> Any:
        made = self._made.setdefault(session, OrderedDict())
        key = (id(view), group, formats, encode)
        if key not in made:
            assert session.peer is not None and session.peer.schema is not None
            ours, theirs = self.schema, session.peer.schema
            consumer, producer = (theirs, ours) if encode else (ours, theirs)
            made[key] = view, self.conversions.group(view, group, formats, ours, consumer, producer)
            if len(made) > MAX_MADE:
                made.popitem(last=False)
        made.move_to_end(key)
        return made[key][1]
