// SPDX-License-Identifier: Apache-2.0
// How the threads of a block walk over a tile.
#pragma once

#include "kv_launch.h"

namespace kv {

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
