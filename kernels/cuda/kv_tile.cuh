// SPDX-License-Identifier: Apache-2.0
// Where tiles lie: in paged memory and on the wire; and how threads walk over one.
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
constexpr int32_t kDataWords = 472;  // so that a Launch fits into the 4 KiB that arguments of a kernel may have

// Some heads of some tokens of some layers, between pages and a wire that is layer after layer, plane after plane.
// `first_token` is the place in the request, `wire` a multiple of 16. `data`: a LayerPlane for each plane of each
// layer, then int32 page ids, the first for the page that holds `first_token`; these are at the address `ids` instead
// where that is not 0. The grid has a block for each tile of the plane with the most tiles, in planes x layers rows.
struct Launch {
  uint64_t ids, wire;
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

KV_FN Plane plane_at(const Launch& launch, int32_t row) {
  const int32_t layer = row / launch.planes;
  const LaunchPlane& plane = launch.plane[row - layer * launch.planes];
  const LayerPlane& at = reinterpret_cast<const LayerPlane*>(launch.data)[row];
  const auto* ids = launch.ids != 0 ? reinterpret_cast<const int32_t*>(launch.ids)
                                    : reinterpret_cast<const int32_t*>(launch.data + 2 * launch.planes * launch.layers);
  return {ids,
          at.base,
          launch.wire + uint64_t(layer * launch.layer_bytes + plane.wire_offset),
          plane.page_stride,
          at.memory_scale,
          at.wire_scale};
}

KV_FN int32_t tile_count(const Shape& shape) {
  const int64_t first = shape.first_token / shape.group_tokens;
  return int32_t((shape.first_token + shape.tokens - 1) / shape.group_tokens - first + 1) * shape.heads;
}

KV_FN int64_t padded(int64_t bytes) { return (bytes + 15) & ~int64_t(15); }

struct Tile {
  const int32_t* ids;
  uint64_t base;
  int64_t page_stride;
  int64_t head_offset;  // elements from a page's start
  int64_t place;        // first token, counted from the start of the first page
  int32_t tokens;
  int32_t scale_count;
  uint16_t* scales;
  uint16_t* zeros;
  uint8_t* codes;
  int32_t codes_bytes, scale_bytes;
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
KV_FN Tile tile_at(const Shape& shape, const Plane& plane, int32_t index, int32_t wire_bits) {
  const int32_t group = index / shape.heads, head = index - group * shape.heads;
  const int32_t first =
      int32_t(smaller64(shape.tokens, shape.group_tokens - int32_t(shape.first_token % shape.group_tokens)));
  const int64_t skipped = group == 0 ? 0 : first + int64_t(group - 1) * shape.group_tokens;
  Tile tile;
  tile.tokens = group == 0 ? first : int32_t(smaller64(shape.group_tokens, shape.tokens - skipped));
  int64_t offset = head * tile_bytes(shape, tile.tokens, wire_bits);
  if (group > 0) {
    offset += shape.heads *
              (tile_bytes(shape, first, wire_bits) + (group - 1) * tile_bytes(shape, shape.group_tokens, wire_bits));
  }
  tile.ids = plane.ids;
  tile.base = plane.base;
  tile.page_stride = plane.page_stride;
  tile.head_offset = (shape.first_head + head) * shape.head_stride;
  tile.place = shape.first_token % shape.page_tokens + skipped;
  tile.scale_count = scale_count(shape, tile.tokens);
  tile.scale_bytes = int32_t(padded(2 * int64_t(tile.scale_count)));
  tile.codes_bytes = int32_t(padded((int64_t(tile.tokens) * shape.dim * wire_bits + 7) / 8));
  uint8_t* start = reinterpret_cast<uint8_t*>(plane.wire + uint64_t(offset));
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

// kBytes of packed elements that move as one access of up to 16 bytes at a time.
template <int kBytes>
struct alignas(kBytes < 16 ? kBytes : 16) Words {
  uint32_t word[kBytes / 4];

  template <class Raw>
  KV_FN Raw get(int i) const {
    constexpr int kPerWord = 4 / int(sizeof(Raw));
    return Raw(word[i / kPerWord] >> (i % kPerWord * 8 * int(sizeof(Raw)) % 32));
  }
  // Elements are put once each into words that were zero.
  template <class Raw>
  KV_FN void put(int i, Raw raw) {
    constexpr int kPerWord = 4 / int(sizeof(Raw));
    word[i / kPerWord] |= uint32_t(raw) << (i % kPerWord * 8 * int(sizeof(Raw)) % 32);
  }
  KV_FN void clear() {
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) word[i] = 0;
  }
};

template <int kBytes>
KV_FN bool is_aligned(const void* address) {
  return (reinterpret_cast<uint64_t>(address) & ((kBytes < 16 ? kBytes : 16) - 1)) == 0;
}

// A thread's way over the units of a tile: kUnit elements that follow each other in it.
// Where rows are whole units (`vector`), token and column are kept without dividing.
template <int kUnit>
struct Cursor {
  int32_t unit, token, column, columns, thread_count, token_step, column_step;
  bool vector;

  KV_FN Cursor(const Shape& shape, int32_t thread, int32_t threads) {
    vector = shape.dim % kUnit == 0 && shape.dim_stride == 1;
    columns = vector ? shape.dim / kUnit : 1;
    unit = thread;
    thread_count = threads;
    token = thread / columns;
    column = thread - token * columns;
    token_step = threads / columns;
    column_step = threads - token_step * columns;
  }
  KV_FN void advance() {
    unit += thread_count;
    token += token_step;
    column += column_step;
    if (column >= columns) {
      column -= columns;
      ++token;
    }
  }
};

template <class Raw, int kUnit>
KV_FN void load_unit(const Shape& shape, const Tile& tile, const Cursor<kUnit>& at,
                     Words<kUnit* int(sizeof(Raw))>& words) {
  constexpr int kBytes = kUnit * int(sizeof(Raw));
  words.clear();
  if (at.vector) {
    const Raw* row = row_of<Raw>(shape, tile, at.token) + at.column * kUnit;
    if (is_aligned<kBytes>(row)) {
      words = *reinterpret_cast<const Words<kBytes>*>(row);
      return;
    }
#pragma unroll
    for (int i = 0; i < kUnit; ++i) words.put(i, row[i]);
    return;
  }
  const int32_t count = tile.tokens * shape.dim;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    const int32_t element = at.unit * kUnit + i, token = element / shape.dim;
    if (element < count) {
      words.put(i, row_of<Raw>(shape, tile, token)[(element - token * shape.dim) * shape.dim_stride]);
    }
  }
}

template <class Raw, int kUnit>
KV_FN void store_unit(const Shape& shape, const Tile& tile, const Cursor<kUnit>& at,
                      const Words<kUnit* int(sizeof(Raw))>& words) {
  constexpr int kBytes = kUnit * int(sizeof(Raw));
  if (at.vector) {
    Raw* row = row_of<Raw>(shape, tile, at.token) + at.column * kUnit;
    if (is_aligned<kBytes>(row)) {
      *reinterpret_cast<Words<kBytes>*>(row) = words;
      return;
    }
#pragma unroll
    for (int i = 0; i < kUnit; ++i) row[i] = words.template get<Raw>(i);
    return;
  }
  const int32_t count = tile.tokens * shape.dim;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    const int32_t element = at.unit * kUnit + i, token = element / shape.dim;
    if (element < count) {
      row_of<Raw>(shape, tile, token)[(element - token * shape.dim) * shape.dim_stride] = words.template get<Raw>(i);
    }
  }
}

}  // namespace kv
