# SPDX-License-Identifier: Apache-2.0
"""What two sessions' schemas mean for the wire: formats, heads, layers, and who needs whom.

Everything here is computed from the two schemas alone, so that both sides come to the
same result; the consumer's choice of formats travels in its subscriptions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from sage_kv_connector.contract.cache_view import GroupView
from sage_kv_connector.contract.dtypes import CAST_DTYPES, CONVERTIBLE_DTYPES, DTYPE_BITS
from sage_kv_connector.contract.schema import GroupSchema, KVCacheSchema, Verdict
from sage_kv_connector.format.converter import ConvertedPlane, GroupConverter
from sage_kv_connector.format.defaults import default_format
from sage_kv_connector.format.wire_format import WireFormat

Formats = tuple[WireFormat, ...]

#: The wire dtype of pages that go as they are.
SAME = "same"


class LayerRun(NamedTuple):
    """Neighbouring layers that both sides hold, by their places in each side's group."""

    local: int
    peer: int
    layers: int


class WirePlan(NamedTuple):
    """How a consumer reads from one producer. By group: formats of the canonical planes, layers."""

    formats: tuple[Formats, ...]
    runs: tuple[tuple[LayerRun, ...], ...]
    first_head: int
    heads: int

    @property
    def wire_dtype(self) -> str:
        return wire_dtype_of(self.formats)


def wire_dtype_of(groups: Iterable[Formats]) -> str:
    """What is on the wire, for people and reports; ``groups``: the formats of each."""
    return "/".join(sorted({fmt.dtype for formats in groups for fmt in formats})) or SAME


def needs_conversion(
    local: KVCacheSchema, peer: KVCacheSchema, target_dtype: str, *, device_memory: bool
) -> bool:
    """Whether bytes can't simply go from page to page; ``device_memory``: the backend takes a device's."""
    if local.compare(peer).verdict is Verdict.CONVERTIBLE:
        return True
    if local.memory != "host" and not device_memory:
        return True
    wanted = target_dtype not in ("auto", local.dtype)
    return wanted and local.dtype in CONVERTIBLE_DTYPES and all(group.canonical for group in local.groups)


def plan_wire(local: KVCacheSchema, peer: KVCacheSchema, target_dtype: str) -> WirePlan:
    """The consumer's plan for a peer with a convertible (or identical) schema.

    Where a group's order is not known its pages go as they are, and the others in the cache's own dtype.
    """
    if not all(group.canonical for group in local.groups):
        target_dtype = "auto"
    first = max(local.head_start, peer.head_start)
    return WirePlan(
        tuple(
            _formats(local, peer, ours, theirs, target_dtype)
            for ours, theirs in zip(local.groups, peer.groups, strict=True)
        ),
        tuple(_layer_runs(a.layers, b.layers) for a, b in zip(local.groups, peer.groups, strict=True)),
        first,
        min(local.head_end, peer.head_end) - first,
    )


def planned_wire_dtype(
    local: KVCacheSchema, peer: KVCacheSchema, target_dtype: str, *, device_memory: bool
) -> str:
    """What a transfer between the two would have on the wire; ``SAME`` where pages go as they are."""
    if not needs_conversion(local, peer, target_dtype, device_memory=device_memory):
        return SAME
    return plan_wire(local, peer, target_dtype).wire_dtype


def _formats(
    consumer: KVCacheSchema, producer: KVCacheSchema, ours: GroupSchema, theirs: GroupSchema, target: str
) -> Formats:
    if not ours.canonical:
        return ()
    dtype = target
    if target == "auto":  # the smaller of both; the producer's where they are equally wide
        dtype = min((producer.dtype, consumer.dtype), key=lambda name: DTYPE_BITS[name])
    if dtype in CAST_DTYPES:
        return tuple(WireFormat(dtype) for _ in ours.canonical)
    if dtype in (consumer.dtype, producer.dtype):  # an engine's own codes, by its own scales
        return tuple(WireFormat(dtype, "tensor") for _ in ours.canonical)
    return tuple(default_format(dtype, plane.name) for plane in ours.canonical)


def _layer_runs(local: tuple[str, ...], peer: tuple[str, ...]) -> tuple[LayerRun, ...]:
    """Layers are matched by name; engines name them by their place in the whole model."""
    places = {name: index for index, name in enumerate(peer)}
    runs: list[LayerRun] = []
    for index, name in enumerate(local):
        there = places.get(name)
        if there is None:
            continue
        if runs and runs[-1].local + runs[-1].layers == index and runs[-1].peer + runs[-1].layers == there:
            runs[-1] = runs[-1]._replace(layers=runs[-1].layers + 1)
        else:
            runs.append(LayerRun(index, there, 1))
    return tuple(runs)


def group_converter(
    view: GroupView,
    index: int,
    formats: Formats,
    local: KVCacheSchema,
    consumer: KVCacheSchema,
    producer: KVCacheSchema,
) -> GroupConverter:
    """The converter between this side's pages of a group, in host memory, and ``formats``.

    Raises ValueError as ``converted_planes``.
    """
    planes = converted_planes(view, index, formats, local, consumer, producer)
    return GroupConverter(local.dtype, view.page_size, view.pages, view.heads, planes)


def converted_planes(
    view: GroupView,
    index: int,
    formats: Formats,
    local: KVCacheSchema,
    consumer: KVCacheSchema,
    producer: KVCacheSchema,
) -> list[ConvertedPlane]:
    """How each canonical plane of group ``index`` lies here and stands on the wire.

    Raises ValueError when the formats don't fit the group.
    """
    if len(formats) != len(view.canonical) or not formats:
        raise ValueError(
            f"formats has {len(formats)} entries, group {index} has {len(view.canonical)} planes"
        )
    group = local.groups[index]
    planes = []
    for number, (plane, fmt) in enumerate(zip(view.canonical, formats, strict=True)):
        owner = consumer if consumer.dtype == fmt.dtype and producer.dtype != fmt.dtype else producer
        planes.append(
            ConvertedPlane(
                plane.order,
                view.layers[0].planes[plane.plane].page_stride,
                plane.dim,
                fmt,
                [layer.planes[plane.plane].base for layer in view.layers],
                _scales(group, group, number),
                _scales(group, owner.groups[index], number),
            )
        )
    return planes


def _scales(group: GroupSchema, owner: GroupSchema, plane: int) -> list[float]:
    """``owner``'s scales of a plane for each layer of ``group``; 1 where it has none."""
    if not owner.scales:
        return [1.0] * len(group.layers)
    known = dict(zip(owner.layers, owner.scales, strict=True))
    return [known[name][plane] if name in known else 1.0 for name in group.layers]
