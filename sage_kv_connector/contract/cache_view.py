# SPDX-License-Identifier: Apache-2.0
"""An engine's KV tensors as pages: where each page of each plane of each layer lies.

Memory model: a plane is a strided array with one *page* axis (the block axis of
the block table) and any others. One page is the bytes that all other axes span;
they need not be one run. ``PlaneView`` keeps the page stride and the runs of one
page, so that addresses of many pages are computed at once with NumPy. On the
wire a page's bytes stand in memory order (slowest axis first), page after page.

A view holds addresses, not tensors: whoever registers it keeps the tensors alive.
Tensors are anything with ``data_ptr() shape stride() element_size()`` (torch), or
NumPy arrays; torch itself is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sage_kv_connector.contract.element_order import ElementOrder, strided
from sage_kv_connector.contract.page_places import MAX_RUNS, GroupPlaces, PlanePlaces
from sage_kv_connector.contract.schema import CanonicalPlaneSchema, GroupSchema, PlaneSchema

PAGE_AXIS = "page"


class PlaneView(NamedTuple):
    """One plane of one layer. Addresses and strides in bytes, ``run_offsets`` ascending on the wire."""

    schema: PlaneSchema
    base: int
    page_stride: int
    pages: int
    run_offsets: npt.NDArray[np.int64]
    run_bytes: int

    def addresses(self, page_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Start of each run of the given pages, shape (len(page_ids) * runs of a page,)."""
        starts = self.base + page_ids[:, None] * self.page_stride + self.run_offsets[None, :]
        return starts.reshape(-1).astype(np.uint64)

    def extent(self) -> tuple[int, int]:
        """The span of memory (address, length) that all pages of this plane lie in."""
        last = int(self.run_offsets.max()) + self.run_bytes + (self.pages - 1) * self.page_stride
        return self.base, last


class LayerView(NamedTuple):
    """One layer: its planes, in schema order."""

    name: str
    planes: tuple[PlaneView, ...]

    @property
    def page_bytes(self) -> int:
        return sum(plane.schema.page_bytes for plane in self.planes)

    def page_segments(self, page_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Runs of the given pages in wire order, shape (n, 2): address, length.

        Wire order is page by page, and in a page plane by plane.
        """
        columns = []
        for plane in self.planes:
            runs = len(plane.run_offsets)
            segments = np.empty((len(page_ids), runs, 2), dtype=np.uint64)
            segments[:, :, 0] = plane.addresses(page_ids).reshape(len(page_ids), runs)
            segments[:, :, 1] = plane.run_bytes
            columns.append(segments)
        return np.concatenate(columns, axis=1).reshape(-1, 2)


class CanonicalPlane(NamedTuple):
    """Where canonical plane ``name`` lies: in plane ``plane`` of each layer, in that order of elements."""

    name: str
    dim: int
    plane: int
    order: ElementOrder


class GroupView(NamedTuple):
    """Layers that share one block table.

    ``heads`` and ``canonical`` (empty: not known) are for conversion; ``scales`` and ``dtype`` as in GroupSchema.
    """

    kind: str
    page_size: int
    pages: int
    layers: tuple[LayerView, ...]
    heads: int = 0
    canonical: tuple[CanonicalPlane, ...] = ()
    scales: tuple[tuple[float, ...], ...] = ()
    dtype: str = ""

    def schema(self) -> GroupSchema:
        return GroupSchema(
            kind=self.kind,
            layers=tuple(layer.name for layer in self.layers),
            page_size=self.page_size,
            planes=tuple(plane.schema for plane in self.layers[0].planes),
            canonical=tuple(CanonicalPlaneSchema(plane.name, plane.dim) for plane in self.canonical),
            scales=self.scales,
            dtype=self.dtype,
            places=_places_of(self),
        )


@dataclass(frozen=True, eq=False)
class KVCacheView:
    """All KV cache groups of one worker; what is derived of a view is kept as long as this very object lives."""

    groups: tuple[GroupView, ...]

    def extents(self) -> list[tuple[int, int]]:
        """Disjoint (address, length) spans that hold every page, to be registered as memory regions."""
        spans = sorted(
            plane.extent() for group in self.groups for layer in group.layers for plane in layer.planes
        )
        merged: list[tuple[int, int]] = []
        for address, length in spans:
            if merged and address <= sum(merged[-1]):
                start, known = merged[-1]
                merged[-1] = (start, max(known, address + length - start))
            else:
                merged.append((address, length))
        return merged


def plane_view(name: str, tensor: Any, axes: Sequence[str], pages: int) -> PlaneView:
    """Normalise one tensor.

    ``axes`` names each axis of ``tensor``, one of them ``"page"``. Where the tensor
    has k times more entries on that axis than the engine's block table has
    ``pages`` (kernel blocks smaller than the table's), k neighbours make one page.

    Raises ValueError naming the tensor, its shape and what was expected.
    """
    address, shape, strides, item = _layout(tensor)
    if len(axes) != len(shape) or list(axes).count(PAGE_AXIS) != 1:
        raise ValueError(f"plane {name!r}: axes {tuple(axes)} do not name shape {shape} with one 'page' axis")
    page_axis = list(axes).index(PAGE_AXIS)
    if pages <= 0 or shape[page_axis] % pages:
        raise ValueError(
            f"plane {name!r}: axis {page_axis} of shape {shape} is no multiple of the {pages} pages of the block table"
        )
    split = shape[page_axis] // pages
    inner = [(strides[i], shape[i], axes[i]) for i in range(len(shape)) if i != page_axis and shape[i] > 1]
    if split > 1:
        inner.append((strides[page_axis], split, "subpage"))
    inner.sort(key=lambda entry: -entry[0])
    if any(stride <= 0 for stride, _, _ in inner):
        raise ValueError(f"plane {name!r}: strides {strides} of shape {shape} overlap")
    run = item
    while inner and inner[-1][0] == run:
        run *= inner.pop()[1]
    offsets = np.zeros(1, dtype=np.int64)
    for stride, size, _ in inner:
        offsets = (offsets[:, None] + np.arange(size, dtype=np.int64)[None, :] * stride).reshape(-1)
    by_stride = sorted((i for i in range(len(shape)) if i != page_axis), key=lambda i: (-strides[i], i))
    named = tuple((axes[i], shape[i]) for i in by_stride)
    if split > 1:
        named = (("subpage", split), *named)
    schema = PlaneSchema(name=name, axes=named, page_bytes=run * len(offsets))
    return PlaneView(schema, address, strides[page_axis] * split, pages, offsets, run)


def strided_planes(
    name: str,
    tensor: Any,
    axes: Sequence[str],
    plane: int = 0,
    channels: tuple[int, int] | None = None,
) -> tuple[CanonicalPlane, ...]:
    """The canonical planes of an unpacked tensor whose axes are among page, plane, head, token, dim, content.

    A ``plane`` axis of 2 holds K and V; a last axis ``content`` holds K's channels, then V's, of each token:
    ``channels`` of them, half each where that is None; without either the tensor is plane ``name`` (k, v or
    latent). Empty if the axes don't say.
    """
    _, shape, strides, _ = _layout(tensor)
    at = {axis: index for index, axis in enumerate(axes)}
    last = "dim" if "dim" in at else "content"
    if len(at) != len(axes) or "token" not in at or last not in at or not at.keys() <= _NAMED_AXES:
        return ()
    head = strides[at["head"]] if "head" in at else 0
    size = shape[at[last]]

    def found(label: str, dim: int, offset: int) -> CanonicalPlane:
        order = strided(offset, head, strides[at["token"]], strides[at[last]])
        return CanonicalPlane(label, dim, plane, order)

    if "plane" in at:
        return (found("k", size, 0), found("v", size, strides[at["plane"]]))
    if name == "kv":
        keys, values = channels or (size // 2, size // 2)
        if last != "content" or keys + values != size:
            return ()
        return (found("k", keys, 0), found("v", values, keys * strides[at[last]]))
    return (found(name, size, 0),)


_NAMED_AXES = {PAGE_AXIS, "plane", "head", "token", "dim", "content"}


def group_view(
    kind: str,
    page_size: int,
    pages: int,
    layers: Iterable[tuple[str, Sequence[tuple[str, Any, Sequence[str]]]]],
    *,
    heads: int = 0,
    canonical: tuple[CanonicalPlane, ...] = (),
    scales: tuple[tuple[float, ...], ...] = (),
    dtype: str = "",
) -> GroupView:
    """A group from (layer name, [(plane name, tensor, axes), …]); all layers must have equal planes."""
    views = tuple(
        LayerView(layer, tuple(plane_view(name, tensor, axes, pages) for name, tensor, axes in planes))
        for layer, planes in layers
    )
    if not views:
        raise ValueError(f"a KV cache group of kind {kind!r} has no layers")
    first = [plane.schema for plane in views[0].planes]
    for view in views[1:]:
        if [plane.schema for plane in view.planes] != first:
            raise ValueError(f"layer {view.name!r} has other planes than {views[0].name!r} of the same group")
    return GroupView(kind, page_size, pages, views, heads, canonical, scales, dtype)


def _layout(tensor: Any) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
    """(address, shape, strides in bytes, element size) of a torch tensor or a NumPy array."""
    if hasattr(tensor, "data_ptr"):
        item = int(tensor.element_size())
        return (
            int(tensor.data_ptr()),
            tuple(int(n) for n in tensor.shape),
            tuple(int(n) * item for n in tensor.stride()),
            item,
        )
    if isinstance(tensor, np.ndarray):
        return int(tensor.ctypes.data), tensor.shape, tensor.strides, tensor.itemsize
    raise ValueError(f"a KV tensor must be a torch tensor or a NumPy array, not {type(tensor).__name__}")


def _places_of(view: GroupView) -> GroupPlaces | None:
    """What a group tells; None where it has no canonical planes, or pages of more than ``MAX_RUNS`` runs."""
    planes = view.layers[0].planes
    if not view.canonical or sum(len(plane.run_offsets) for plane in planes) > MAX_RUNS:
        return None
    return GroupPlaces(
        view.heads,
        tuple(
            PlanePlaces(plane.page_stride, tuple(plane.run_offsets.tolist()), plane.run_bytes)
            for plane in planes
        ),
        tuple((plane.plane, plane.order) for plane in view.canonical),
    )
