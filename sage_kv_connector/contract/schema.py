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

#: Bits of one element, for the dtypes that KV caches are kept in.
DTYPE_BITS = {
    "fp32": 32,
    "fp16": 16,
    "bf16": 16,
    "fp8_e4m3": 8,
    "fp8_e5m2": 8,
    "int8": 8,
    "uint8": 8,
    "int4": 4,
}


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


class GroupSchema(msgspec.Struct, frozen=True):
    """Layers that share one block table (a KV cache group of a hybrid model).

    ``layers`` are global layer names in model order; ``page_size`` is in tokens.
    All layers of a group have the same planes.
    """

    kind: str
    layers: tuple[str, ...]
    page_size: int
    planes: tuple[PlaneSchema, ...]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one layer, all planes."""
        return sum(plane.page_bytes for plane in self.planes)


#: Fields that describe, but never stand in the way.
_INFORMATIVE = frozenset({"engine", "model"})


class KVCacheSchema(msgspec.Struct, frozen=True):
    """The KV cache of one worker. Sizes of heads are counts, ``head_dim`` is in elements.

    ``packing`` names an order inside a page that the axes can't express, such as
    the one that an engine's CPU kernels pack for an instruction set ("" = none).
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

    def digest(self) -> str:
        """A short hash of every field that decides about a transfer."""
        fields = {k: v for k, v in msgspec.to_builtins(self).items() if k not in _INFORMATIVE}
        return hashlib.sha256(msgspec.json.encode(fields, order="sorted")).hexdigest()[:16]

    def bytes_per_token(self) -> float:
        """Bytes that one token of context occupies over all groups and layers of this worker."""
        return sum(g.page_bytes * len(g.layers) / g.page_size for g in self.groups)

    def compare(self, other: KVCacheSchema) -> SchemaComparison:
        """Compare field by field with a peer's schema."""
        fields: list[FieldComparison] = []
        for name in self.__struct_fields__:
            if name in _INFORMATIVE:
                continue
            if name == "groups":
                fields += _compare_groups(self.groups, other.groups)
            else:
                fields.append(_compare_field(name, getattr(self, name), getattr(other, name)))
        return SchemaComparison(tuple(fields))


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


def _compare_field(name: str, local: object, remote: object) -> FieldComparison:
    verdict = Verdict.IDENTICAL if local == remote else Verdict.INCOMPATIBLE
    return FieldComparison(name, str(local), str(remote), verdict)


def _compare_groups(local: tuple[GroupSchema, ...], remote: tuple[GroupSchema, ...]) -> list[FieldComparison]:
    fields = [_compare_field("groups", len(local), len(remote))]
    for index, (a, b) in enumerate(zip(local, remote, strict=False)):
        prefix = f"groups[{index}]"
        fields += [
            _compare_field(f"{prefix}.kind", a.kind, b.kind),
            _compare_field(f"{prefix}.page_size", a.page_size, b.page_size),
            _compare_field(f"{prefix}.layers", _show_layers(a.layers), _show_layers(b.layers)),
            _compare_field(f"{prefix}.planes", _show_planes(a.planes), _show_planes(b.planes)),
        ]
    return fields


def _show_layers(layers: tuple[str, ...]) -> str:
    digest = hashlib.sha256("\n".join(layers).encode()).hexdigest()[:8]
    return f"{len(layers)} ({layers[0]} … {layers[-1]}, {digest})" if layers else "0"


def _show_planes(planes: tuple[PlaneSchema, ...]) -> str:
    return ", ".join(
        f"{p.name}[{' '.join(f'{axis}={size}' for axis, size in p.axes)}; {p.page_bytes} B]" for p in planes
    )
