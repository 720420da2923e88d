# SPDX-License-Identifier: Apache-2.0
"""What one worker's KV cache looks like, and whether two of them can exchange pages.

A schema describes the part of the KV cache that one worker (one tensor
parallel, one pipeline parallel rank) holds, in coordinates that any other
engine can map to its own: kv group, layer, plane, head range, token. Peers
exchange schemas once a session, and ``compare`` is the only place that says
whether bytes may move and which field stands in the way.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import NamedTuple

import msgspec

from sage_kv_connector.contract.dtypes import CONVERTIBLE_DTYPES
from sage_kv_connector.contract.failure import excerpt
from sage_kv_connector.contract.page_places import GroupPlaces


class Verdict(StrEnum):
    """What a difference in one field means for a transfer."""

    IDENTICAL = "identical"
    CONVERTIBLE = "convertible"
    INCOMPATIBLE = "incompatible"


class FieldComparison(NamedTuple):
    """One field of two schemas; the values as they are shown to people."""

    field: str
    local: str
    remote: str
    verdict: Verdict


class PlaneSchema(msgspec.Struct, frozen=True):
    """One tensor of a layer's page: K, V, K and V fused, an MLA latent, a recurrent state.

    ``axes`` names the axes of one page from the slowest to the fastest in
    memory, with their sizes in elements: ``(("head", 4), ("token", 128),
    ("content", 256))``. ``page_bytes`` is what one page of this plane holds.
    """

    name: str
    axes: tuple[tuple[str, int], ...]
    page_bytes: int


class CanonicalPlaneSchema(msgspec.Struct, frozen=True):
    """A plane in coordinates (head, token, channel): ``k``, ``v`` or ``latent``, ``dim`` channels a head."""

    name: str
    dim: int


class GroupSchema(msgspec.Struct, frozen=True):
    """Layers that share one block table (a KV cache group of a hybrid model); several groups may share one, too.

    ``layers`` are global layer names in model order; ``page_size`` is in tokens.
    All layers of a group have the same planes. ``canonical``: the planes by which pages of
    another size, order or dtype can be mapped to these; empty where that is not known (recurrent
    states, unknown packings). ``scales``: by layer, one for each canonical plane, of fp8 caches
    (value = code x scale); empty means 1. ``dtype``: of the elements where that is not the whole cache's
    (an indexer's codes, recurrent states, layers that are not quantized); such pages only go as they are.
    ``places``: where a page's bytes lie, for a peer that reads them in place; never compared.
    """

    kind: str
    layers: tuple[str, ...]
    page_size: int
    planes: tuple[PlaneSchema, ...]
    canonical: tuple[CanonicalPlaneSchema, ...] = ()
    scales: tuple[tuple[float, ...], ...] = ()
    dtype: str = ""
    places: GroupPlaces | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for what no cache has, also when a peer's is decoded."""
        if self.page_size < 1:
            raise ValueError(f"page_size is {self.page_size}, must be positive")
        rows = {len(row) for row in self.scales} - {len(self.canonical)}
        if rows or len(self.scales) not in (0, len(self.layers)):
            raise ValueError(
                f"scales has {len(self.scales)} rows (of {rows or len(self.canonical)}), allowed: none, or one of "
                f"{len(self.canonical)} for each of {len(self.layers)} layers"
            )

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one layer, all planes."""
        return sum(plane.page_bytes for plane in self.planes)


#: Fields that describe, but never stand in the way.
_INFORMATIVE = frozenset({"engine", "model"})
#: Fields that conversion covers where every group has canonical planes on both sides.
_CONVERTIBLE = frozenset({"dtype", "packing", "tp_rank", "tp_size", "pp_rank", "pp_size", "memory"})


class KVCacheSchema(msgspec.Struct, frozen=True):
    """The KV cache of one worker. Sizes of heads are counts, ``head_dim`` is in elements.

    ``packing`` names an order inside a page that the axes can't express, such as
    the one that an engine's CPU kernels pack for an instruction set ("" = none).
    ``memory`` is "host" or "device": the latter's pages only go through a backend that takes
    device memory, or are staged in host memory, which needs canonical planes. ``weights``: what the model's
    weights are ("" = not known, or not to be compared); KV of other weights means something else.
    """

    engine: str
    model: str
    dtype: str
    total_layers: int
    total_kv_heads: int
    head_start: int
    head_count: int
    head_dim: int
    groups: tuple[GroupSchema, ...]
    packing: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    memory: str = "host"
    weights: str = ""

    def digest(self) -> str:
        """A short hash of every field that decides about a transfer."""
        fields = {k: v for k, v in msgspec.to_builtins(self).items() if k not in _INFORMATIVE}
        fields["groups"] = [{k: v for k, v in group.items() if k != "places"} for group in fields["groups"]]
        return hashlib.sha256(msgspec.json.encode(fields, order="sorted")).hexdigest()[:16]

    def bytes_per_token(self) -> float:
        """Bytes that one token of context occupies over all groups and layers of this worker."""
        return sum(g.page_bytes * len(g.layers) / g.page_size for g in self.groups)

    def compare(self, other: KVCacheSchema) -> SchemaComparison:
        """Compare field by field with a peer's schema.

        A difference is convertible where both sides' groups have the same canonical planes, and both
        dtypes are among ``CONVERTIBLE_DTYPES``; heads and layers only need to overlap.
        """
        canonical = _canonical(self, other)
        fields: list[FieldComparison] = []
        for name in self.__struct_fields__:
            if name in _INFORMATIVE:
                continue
            local, remote = getattr(self, name), getattr(other, name)
            if name == "weights" and not (local and remote):
                continue
            if name == "groups":
                fields += _compare_groups(self, other, canonical)
            elif name in ("head_start", "head_count"):
                overlap = max(self.head_start, other.head_start) < min(self.head_end, other.head_end)
                fields.append(_compare_field(name, local, remote, canonical and overlap))
            else:
                fields.append(_compare_field(name, local, remote, canonical and name in _CONVERTIBLE))
        return SchemaComparison(tuple(fields))

    def missing_from(self, other: KVCacheSchema) -> tuple[str, ...]:
        """Layers of this worker that a peer without pipeline stages does not have: those of a draft model.

        Empty where the peer is one stage of several: the others may have them.
        """
        if other.pp_size > 1:
            return ()
        theirs = {layer for group in other.groups for layer in group.layers}
        return tuple(layer for group in self.groups for layer in group.layers if layer not in theirs)

    @property
    def head_end(self) -> int:
        """One past the last kv head of this worker."""
        return self.head_start + self.head_count


class SchemaComparison(NamedTuple):
    """The verdict on each field of two schemas."""

    fields: tuple[FieldComparison, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all fields."""
        found = {f.verdict for f in self.fields}
        for verdict in (Verdict.INCOMPATIBLE, Verdict.CONVERTIBLE):
            if verdict in found:
                return verdict
        return Verdict.IDENTICAL

    @property
    def differences(self) -> tuple[FieldComparison, ...]:
        return tuple(f for f in self.fields if f.verdict is not Verdict.IDENTICAL)

    def explain(self) -> str:
        """One sentence naming each field that differs and both values."""
        if not self.differences:
            return "the KV cache schemas are identical"
        return "; ".join(
            f"{f.field}: {f.local} here, {f.remote} at the peer ({f.verdict})" for f in self.differences
        )


def _canonical(local: KVCacheSchema, remote: KVCacheSchema) -> bool:
    """Whether every group can be mapped by canonical coordinates, of elements that conversion knows."""
    known = {local.dtype, remote.dtype} <= set(CONVERTIBLE_DTYPES)
    return (
        known
        and 0 < len(local.groups) == len(remote.groups)
        and all(
            a.canonical and a.canonical == b.canonical and not (a.dtype or b.dtype)
            for a, b in zip(local.groups, remote.groups, strict=True)
        )
    )


def _compare_field(name: str, local: object, remote: object, convertible: bool = False) -> FieldComparison:
    differs = Verdict.CONVERTIBLE if convertible else Verdict.INCOMPATIBLE
    verdict = Verdict.IDENTICAL if local == remote else differs
    return FieldComparison(name, str(local), excerpt(remote), verdict)


def _compare_groups(local: KVCacheSchema, remote: KVCacheSchema, canonical: bool) -> list[FieldComparison]:
    fields = [_compare_field("groups", len(local.groups), len(remote.groups))]
    for index, (a, b) in enumerate(zip(local.groups, remote.groups, strict=False)):
        prefix = f"groups[{index}]"
        shared = bool(set(a.layers) & set(b.layers))
        if a.dtype or b.dtype:
            fields.append(_compare_field(f"{prefix}.dtype", a.dtype or local.dtype, b.dtype or remote.dtype))
        fields += [
            _compare_field(f"{prefix}.kind", a.kind, b.kind),
            _compare_field(f"{prefix}.page_size", a.page_size, b.page_size, canonical),
            _compare_field(
                f"{prefix}.layers", _show_layers(a.layers), _show_layers(b.layers), canonical and shared
            ),
            _compare_field(f"{prefix}.planes", _show_planes(a.planes), _show_planes(b.planes), canonical),
            _compare_field(f"{prefix}.canonical", _show_canonical(a), _show_canonical(b)),
            _compare_field(f"{prefix}.scales", _show_scales(a), _show_scales(b), canonical),
        ]
    return fields


def _show_layers(layers: tuple[str, ...]) -> str:
    digest = hashlib.sha256("\n".join(layers).encode()).hexdigest()[:8]
    return f"{len(layers)} ({layers[0]} … {layers[-1]}, {digest})" if layers else "0"


def _show_planes(planes: tuple[PlaneSchema, ...]) -> str:
    return ", ".join(
        f"{p.name}[{' '.join(f'{axis}={size}' for axis, size in p.axes)}; {p.page_bytes} B]" for p in planes
    )


def _show_canonical(group: GroupSchema) -> str:
    return " ".join(f"{plane.name}[{plane.dim}]" for plane in group.canonical) or "none"


def _show_scales(group: GroupSchema) -> str:
    if all(scale == 1.0 for layer in group.scales for scale in layer):
        return "1.0"
    digest = hashlib.sha256(repr(group.scales).encode()).hexdigest()[:8]
    return f"{len(group.scales)} layers ({group.scales[0]} …, {digest})"
