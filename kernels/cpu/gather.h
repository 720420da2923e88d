// SPDX-License-Identifier: Apache-2.0
// From an engine's page order to canonical rows (token-major, channels contiguous) and back.
//
// Four orders occur: rows, whole columns (K of vLLM's vec kernels), 16-token columns of channel pairs
// (K of its AMX kernels) and token pairs of 16-channel columns (V of them). All but rows are
// transpositions of small blocks of equal units; anything else goes element by element.
#pragma once

#include "element.h"

namespace sage_kvt::SAGE_KVT_ISA {
namespace {

// Perfect-shuffle network: after log2(B) rounds of zipping row i with row i + B/2, B rows of B are transposed.
template <typename T, int B>
SAGE_KVT_INLINE void transpose_block(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
  using V = Lanes<T, B>;
  V rows[B], next[B];
  V low{}, high{};
  for (int i = 0; i < B / 2; ++i) {
    low[2 * i] = i, low[2 * i + 1] = B + i;
    high[2 * i] = B / 2 + i, high[2 * i + 1] = B + B / 2 + i;
  }
#pragma GCC unroll 32
  for (int i = 0; i < B; ++i) rows[i] = load<V>(from + i * from_stride);
#pragma GCC unroll 6
  for (int round = B; round > 1; round /= 2) {
#pragma GCC unroll 32
    for (int i = 0; i < B / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + B / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + B / 2], high);
    }
#pragma GCC unroll 32
    for (int i = 0; i < B; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 32
  for (int i = 0; i < B; ++i) store(to + i * to_stride, rows[i]);
}

// to[j][i] = from[i][j] for units of type T; strides in bytes.
template <typename T>
void transpose(const uint8_t* from, int64_t from_stride, int64_t rows, int64_t columns, uint8_t* to,
               int64_t to_stride) {
  constexpr int B = 16;
  int64_t row = 0;
  for (; row + B <= rows; row += B) {
    int64_t column = 0;
    for (; column + B <= columns; column += B) {
      transpose_block<T, B>(from + row * from_stride + column * sizeof(T), from_stride,
                            to + column * to_stride + row * sizeof(T), to_stride);
    }
    for (; column < columns; ++column)
      for (int64_t i = row; i < row + B; ++i)
        std::memcpy(to + column * to_stride + i * sizeof(T), from + i * from_stride + column * sizeof(T), sizeof(T));
  }
  for (; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column)
      std::memcpy(to + column * to_stride + row * sizeof(T), from + row * from_stride + column * sizeof(T), sizeof(T));
}

template <typename T>
inline bool is_rows(const ElementOrder& order) {
  return order.dim_inner == sizeof(T) && order.dim_outer == order.dim_tile * order.dim_inner &&
         order.token_outer == order.token_tile * order.token_inner;
}

template <typename T>
inline bool is_columns(const ElementOrder& order) {
  return order.token_inner == sizeof(T) && order.token_outer == order.token_tile * order.token_inner &&
         order.dim_outer == order.dim_tile * order.dim_inner;
}

template <typename T>
inline bool is_pair_columns(const ElementOrder& order, int64_t dim) {
  return order.dim_tile == 2 && order.dim_inner == sizeof(T) && order.token_inner == 2 * sizeof(T) &&
         order.token_tile == 16 && order.dim_outer == 32 * sizeof(T) && dim % 2 == 0;
}

template <typename T>
inline bool is_token_pairs(const ElementOrder& order, int64_t dim) {
  return order.token_tile == 2 && order.token_inner == sizeof(T) && order.dim_inner == 2 * sizeof(T) &&
         order.dim_tile == 16 && order.token_outer == 32 * sizeof(T) && dim % 16 == 0;
}

inline int64_t token_offset(const ElementOrder& order, int64_t token) {
  return (token % order.token_tile) * order.token_inner + (token / order.token_tile) * order.token_outer;
}

inline int64_t dim_offset(const ElementOrder& order, int64_t channel) {
  return (channel % order.dim_tile) * order.dim_inner + (channel / order.dim_tile) * order.dim_outer;
}

template <typename T>
struct DoubleUnit;
template <>
struct DoubleUnit<uint8_t> {
  using type = uint16_t;
};
template <>
struct DoubleUnit<uint16_t> {
  using type = uint32_t;
};
template <>
struct DoubleUnit<uint32_t> {
  using type = uint64_t;
};

template <typename T>
SAGE_KVT_INLINE void split_pairs(const uint8_t* from, uint8_t* even, uint8_t* odd) {
  using V = Lanes<T, 16>;
  V evens{}, odds{};
  for (int i = 0; i < 16; ++i) evens[i] = 2 * i, odds[i] = 2 * i + 1;
  const V low = load<V>(from), high = load<V>(from + sizeof(V));
  store(even, __builtin_shuffle(low, high, evens));
  store(odd, __builtin_shuffle(low, high, odds));
}

template <typename T>
SAGE_KVT_INLINE void join_pairs(const uint8_t* even, const uint8_t* odd, uint8_t* to) {
  using V = Lanes<T, 16>;
  V low{}, high{};
  for (int i = 0; i < 8; ++i) low[2 * i] = i, low[2 * i + 1] = 16 + i, high[2 * i] = 8 + i, high[2 * i + 1] = 24 + i;
  const V a = load<V>(even), b = load<V>(odd);
  store(to, __builtin_shuffle(a, b, low));
  store(to + sizeof(V), __builtin_shuffle(a, b, high));
}

// One piece into `rows`, dim elements a row.
template <typename T>
void gather(const ElementOrder& order, const Piece& piece, int64_t dim, T* rows) {
  const int64_t row_bytes = dim * sizeof(T);
  auto* out = reinterpret_cast<uint8_t*>(rows);
  if (is_rows<T>(order)) {
    if (order.token_inner == row_bytes) {
      std::memcpy(out, piece.head + piece.first * row_bytes, piece.count * row_bytes);
      return;
    }
    for (int64_t t = 0; t < piece.count; ++t)
      std::memcpy(out + t * row_bytes, piece.head + (piece.first + t) * order.token_inner, row_bytes);
    return;
  }
  if (is_columns<T>(order)) {
    transpose<T>(piece.head + piece.first * sizeof(T), order.dim_inner, dim, piece.count, out, row_bytes);
    return;
  }
  int64_t t = 0;
  if (is_pair_columns<T>(order, dim)) {
    using Pair = typename DoubleUnit<T>::type;
    while (t < piece.count) {
      const int64_t token = piece.first + t;
      const int64_t here = 16 - token % 16 < piece.count - t ? 16 - token % 16 : piece.count - t;
      transpose<Pair>(piece.head + token_offset(order, token), order.dim_outer, dim / 2, here, out + t * row_bytes,
                      row_bytes);
      t += here;
    }
    return;
  }
  const bool pairs = is_token_pairs<T>(order, dim);
  while (t < piece.count) {
    const int64_t token = piece.first + t;
    if (pairs && token % 2 == 0 && t + 2 <= piece.count) {
      const uint8_t* from = piece.head + token_offset(order, token);
      for (int64_t d = 0; d < dim; d += 16)
        split_pairs<T>(from + (d / 16) * order.dim_outer, out + t * row_bytes + d * sizeof(T),
                       out + (t + 1) * row_bytes + d * sizeof(T));
      t += 2;
      continue;
    }
    const uint8_t* from = piece.head + token_offset(order, token);
    for (int64_t d = 0; d < dim; ++d)
      std::memcpy(out + t * row_bytes + d * sizeof(T), from + dim_offset(order, d), sizeof(T));
    ++t;
  }
}

// The inverse.
template <typename T>
void scatter(const ElementOrder& order, const Piece& piece, int64_t dim, const T* rows) {
  const int64_t row_bytes = dim * sizeof(T);
  const auto* in = reinterpret_cast<const uint8_t*>(rows);
  if (is_rows<T>(order)) {
    if (order.token_inner == row_bytes) {
      std::memcpy(piece.head + piece.first * row_bytes, in, piece.count * row_bytes);
      return;
    }
    for (int64_t t = 0; t < piece.count; ++t)
      std::memcpy(piece.head + (piece.first + t) * order.token_inner, in + t * row_bytes, row_bytes);
    return;
  }
  if (is_columns<T>(order)) {
    transpose<T>(in, row_bytes, piece.count, dim, piece.head + piece.first * sizeof(T), order.dim_inner);
    return;
  }
  int64_t t = 0;
  if (is_pair_columns<T>(order, dim)) {
    using Pair = typename DoubleUnit<T>::type;
    while (t < piece.count) {
      const int64_t token = piece.first + t;
      const int64_t here = 16 - token % 16 < piece.count - t ? 16 - token % 16 : piece.count - t;
      transpose<Pair>(in + t * row_bytes, row_bytes, here, dim / 2, piece.head + token_offset(order, token),
                      order.dim_outer);
      t += here;
    }
    return;
  }
  const bool pairs = is_token_pairs<T>(order, dim);
  while (t < piece.count) {
    const int64_t token = piece.first + t;
    uint8_t* to = piece.head + token_offset(order, token);
    if (pairs && token % 2 == 0 && t + 2 <= piece.count) {
      for (int64_t d = 0; d < dim; d += 16)
        join_pairs<T>(in + t * row_bytes + d * sizeof(T), in + (t + 1) * row_bytes + d * sizeof(T),
                      to + (d / 16) * order.dim_outer);
      t += 2;
      continue;
    }
    for (int64_t d = 0; d < dim; ++d)
      std::memcpy(to + dim_offset(order, d), in + t * row_bytes + d * sizeof(T), sizeof(T));
    ++t;
  }
}

}  // namespace
}  // namespace sage_kvt::SAGE_KVT_ISA
