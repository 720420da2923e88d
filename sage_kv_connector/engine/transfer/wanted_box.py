# SPDX-License-Identifier: Apache-2.0
"""What a converting subscription asks of one producer: a box of KV, and the parts that it is cut into."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine.conversion.part_plan import Parts, Wanted, plan_parts
from sage_kv_connector.engine.conversion.wire_plan import WirePlan
from sage_kv_connector.engine.pages.source import Converted
from sage_kv_connector.engine.pages.target import PagesTarget
from sage_kv_connector.engine.session.transfer_messages import PartGroup, SubscribeParts

if TYPE_CHECKING:
    from sage_kv_connector.engine.transfer.subscription import Subscription


class WantedBox(NamedTuple):
    """``asked`` by group, ascending; ``parts`` of at most ``part_bytes`` on the wire, or one tile of each head."""

    plan: WirePlan
    asked: list[Wanted]
    parts: Parts
    part_bytes: int

    @property
    def converted(self) -> Converted:
        return Converted(self.parts, self.plan.first_head, self.plan.heads)

    def message(
        self, subscription: Subscription, nbytes: int, checksum: bool, window: bytes = b""
    ) -> SubscribeParts:
        """``window``: see SubscribeParts."""
        wanted = subscription.wanted
        return SubscribeParts(
            transfer_id=wanted.transfer_id,
            generation=subscription.generation,
            nbytes=nbytes,
            groups=tuple(
                PartGroup(
                    one.group,
                    tuple((run.peer, run.layers) for run in self.plan.runs[one.group]),
                    one.tokens.start,
                    len(one.tokens),
                    one.formats,
                )
                for one in self.asked
            ),
            first_head=self.plan.first_head,
            heads=self.plan.heads,
            part_bytes=self.part_bytes,
            checksum=checksum,
            finished=wanted.finished,
            timeout_ms=subscription.left_ms,
            consumers=wanted.consumers,
            prompt=wanted.prompt,
            replaces=subscription.replaces,
            window=window,
        )


def wanted_box(ours: KVCacheSchema, target: PagesTarget, plan: WirePlan, part_bytes: int) -> WantedBox:
    """Raises ValueError where the peer has nothing of it, or too many parts."""
    asked = [
        Wanted(
            pages.group,
            [(run.local, run.layers) for run in plan.runs[pages.group]],
            pages.tokens if plan.formats[pages.group] else target.page_tokens(pages),
            plan.formats[pages.group],
            [plane.dim for plane in ours.groups[pages.group].canonical],
            ours.groups[pages.group].page_size,
            ours.groups[pages.group].page_bytes,
        )
        for pages in sorted(target.groups, key=lambda pages: pages.group)
        if plan.runs[pages.group]
    ]
    parts = plan_parts(asked, plan.heads, part_bytes)
    if not len(parts):
        raise ValueError("the peer holds none of the layers and heads that are wanted")
    return WantedBox(plan, asked, parts, part_bytes)
