// SPDX-License-Identifier: Apache-2.0
// What a launch takes of planes and layers, and where its tiles lie: in paged memory and on the wire.
#pragma once

#include "kv_arithmetic.h"

namespace kv {

enum Granularity : int32_t { kNone = 0, kTensor = 1, kChannel = 2, kToken = 3, kHead = 4 };

// What a launch has of one canonical plane, alike in all its layers. Strides in elements of the memory's dtype,
// `page_stride` in bytes, `wire_offset` in bytes from the start of a layer's wire.
struct LaunchPlane {
  int64_t head_stride, token_stride, dim_stride, page_stride, wire_offset;
  int32_t group_tokens, dim, granularity, zero_point;
};

// Of one plane of one layer: where page 0 begins; the engine's scale of fp8 memory, that of granularity "tensor".
struct LayerPlane {
  uint64_t base;
  float memory_scale, wire_scale;
};

constexpr int32_t kMaxPlanes = 4;
constexpr int32_t kDataWords = 473;  // so that a Launch fits into the 4 KiB that arguments of a kernel may have

// Some heads of some tokens of some layers, between pages and a wire that is layer after layer, plane after plane.
// `first_token` is the place in the request, `wire` a multiple of 16. `data`: a LayerPlane for each plane of each
// layer, then int32 page ids, the first for the page that holds `first_token`. The grid has a block for each tile of
// the plane with the most tiles, in planes x layers rows.
struct Launch {
  uint64_t wire;
  int64_t layer_bytes, first_token, tokens;
  int32_t page_tokens, first_head, heads, planes, layers, reserved;
  LaunchPlane plane[kMaxPlanes];
  uint64_t data[kDataWords];
};

// What tiles of one plane are cut by; they end at multiples of `group_tokens`.
struct Shape {
  int64_t head_stride, token_stride, dim_stride;
  int64_t first_token, tokens;
  int32_t page_tokens, group_tokens;
  int32_t first_head, heads, dim;
  int32_t granularity, zero_point;
};

// One plane of one layer.
struct Plane {
  const int32_t* ids;
  uint64_t base, wire;
  int64_t page_stride;
  float memory_scale, wire_scale;
};

// By the row of the grid.
KV_FN Shape shape_at(const Launch& launch, int32_t row) {
  const LaunchPlane& plane = launch.plane[row % launch.planes];
  return {plane.head_stride, plane.token_stride, plane.dim_stride,   launch.first_token,
          launch.tokens,     launch.page_tokens, plane.group_tokens, launch.first_head,
          launch.heads,      plane.dim,          plane.granularity,  plane.zero_point};
}

KV_FN uint64_t wire_at(const Launch& launch, int32_t row) {
  const int32_t layer = row / launch.planes;
  return launch.wire + uint64_t(layer * launch.layer_bytes + launch.plane[row % launch.planes].wire_offset);
}

KV_FN Plane plane_at(const Launch& launch, int32_t row) {
  const LayerPlane& at = reinterpret_cast<const LayerPlane*>(launch.data)[row];
  const auto* ids = reinterpret_cast<const int32_t*>(launch.data + 2 * launch.planes * launch.layers);
  return {ids,          at.base, wire_at(launch, row), launch.plane[row % launch.planes].page_stride, at.memory_scale,
          at.wire_scale};
}

KV_FN int32_t tile_count(const Shape& shape) {
  const int64_t first = shape.first_token / shape.group_tokens;
  return int32_t((shape.first_token + shape.tokens - 1) / shape.group_tokens - first + 1) * shape.heads;
}

KV_FN int64_t padded(int64_t bytes) { return (bytes + 15) & ~int64_t(15); }

// Where a tile lies: offsets, for languages whose pointers into a device's memory can't stand in a struct.
struct TilePlace {
  int64_t head_offset;  // elements from a page's start
  int64_t place;        // first token, counted from the start of the first page
  int64_t wire_offset;  // bytes from the plane's first
  int32_t tokens, scale_count;
  int32_t codes_bytes, scale_bytes;
};

struct Tile : TilePlace {
  const int32_t* ids;
  uint64_t base;
  int64_t page_stride;
  uint16_t* scales;
  uint16_t* zeros;
  uint8_t* codes;
};

KV_FN int32_t scale_count(const Shape& shape, int32_t tokens) {
  return shape.granularity == kChannel ? shape.dim
         : shape.granularity == kToken ? tokens
                                       : int32_t(shape.granularity == kHead);
}

KV_FN int64_t tile_bytes(const Shape& shape, int32_t tokens, int32_t wire_bits) {
  const int64_t scales = padded(2 * int64_t(scale_count(shape, tokens)));
  return scales * (1 + shape.zero_point) + padded((int64_t(tokens) * shape.dim * wire_bits + 7) / 8);
}

KV_FN int64_t smaller64(int64_t a, int64_t b) { return a < b ? a : b; }

// Tiles are ordered by token group, then by head.
KV_FN TilePlace place_at(const Shape& shape, int32_t index, int32_t wire_bits) {
  const int32_t group = index / shape.heads, head = index - group * shape.heads;
  const int32_t first =
      int32_t(smaller64(shape.tokens, shape.group_tokens - int32_t(shape.first_token % shape.group_tokens)));
  const int64_t skipped = group == 0 ? 0 : first + int64_t(group - 1) * shape.group_tokens;
  TilePlace tile;
  tile.tokens = group == 0 ? first : int32_t(smaller64(shape.group_tokens, shape.tokens - skipped));
  tile.wire_offset = head * tile_bytes(shape, tile.tokens, wire_bits);
  if (group > 0) {
    tile.wire_offset += shape.heads * (tile_bytes(shape, first, wire_bits) +
                                       (group - 1) * tile_bytes(shape, shape.group_tokens, wire_bits));
  }
  tile.head_offset = (shape.first_head + head) * shape.head_stride;
  tile.place = shape.first_token % shape.page_tokens + skipped;
  tile.scale_count = scale_count(shape, tile.tokens);
  tile.scale_bytes = int32_t(padded(2 * int64_t(tile.scale_count)));
  tile.codes_bytes = int32_t(padded((int64_t(tile.tokens) * shape.dim * wire_bits + 7) / 8));
  return tile;
}

KV_FN Tile tile_at(const Shape& shape, const Plane& plane, int32_t index, int32_t wire_bits) {
  Tile tile;
  static_cast<TilePlace&>(tile) = place_at(shape, index, wire_bits);
  tile.ids = plane.ids;
  tile.base = plane.base;
  tile.page_stride = plane.page_stride;
  uint8_t* start = reinterpret_cast<uint8_t*>(plane.wire + uint64_t(tile.wire_offset));
  tile.scales = reinterpret_cast<uint16_t*>(start);
  tile.zeros = reinterpret_cast<uint16_t*>(start + tile.scale_bytes);
  tile.codes = start + tile.scale_bytes * (1 + shape.zero_point);
  return tile;
}

template <class Raw>
KV_FN Raw* row_of(const Shape& shape, const Tile& tile, int32_t token) {
  const uint32_t place = uint32_t(tile.place + token);
  const uint32_t page = place / uint32_t(shape.page_tokens);
  return reinterpret_cast<Raw*>(tile.base + uint64_t(tile.ids[page] * tile.page_stride)) + tile.head_offset +
         int64_t(place - page * uint32_t(shape.page_tokens)) * shape.token_stride;
}

}  // namespace kv

// All pairs of dtypes, or with KV_MEMORY, KV_MEMORY_TYPE, KV_WIRE and KV_WIRE_TYPE one.
#define KV_KERNELS_OF(memory, Memory, wire, Wire) KV_KERNELS(memory, Memory, wire, Wire)
#ifdef KV_MEMORY
#define KV_KERNELS_TO(wire, Wire) KV_KERNELS_OF(KV_MEMORY, KV_MEMORY_TYPE, wire, Wire)
#else
#define KV_KERNELS_TO(wire, Wire)           \
  KV_KERNELS(fp32, Fp32, wire, Wire)        \
  KV_KERNELS(fp16, Fp16, wire, Wire)        \
  KV_KERNELS(bf16, Bf16, wire, Wire)        \
  KV_KERNELS(fp8_e4m3, Fp8E4m3, wire, Wire) \
  KV_KERNELS(fp8_e5m2, Fp8E5m2, wire, Wire)
#endif

// The same over wire dtypes, for sources that have all of them.
#ifdef KV_WIRE
#define KV_ALL_KERNELS KV_KERNELS_TO(KV_WIRE, KV_WIRE_TYPE)
#else
#define KV_ALL_KERNELS                 \
  KV_KERNELS_TO(fp32, Fp32Wire)        \
  KV_KERNELS_TO(fp16, Fp16Wire)        \
  KV_KERNELS_TO(bf16, Bf16Wire)        \
  KV_KERNELS_TO(fp8_e4m3, Fp8E4m3Wire) \
  KV_KERNELS_TO(fp8_e5m2, Fp8E5m2Wire) \
  KV_KERNELS_TO(int4, Int4Wire)
#endif
