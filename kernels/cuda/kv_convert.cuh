// SPDX-License-Identifier: Apache-2.0
// Encoding and decoding of a tile by the threads of one block.
//
// Encoding has three phases with a barrier between them: reduce (read the tile once, find
// the magnitudes of each scale's elements), scale (write scales), code (write codes).
// Plain C++ runs each phase for all threads of a block, one after the other.
#pragma once

#include "kv_tile.cuh"

namespace kv {

KV_FN void raise_to(int32_t* cell, int32_t value) {
#if KV_DEVICE
  atomicMax(cell, value);
#else
  if (*cell < value) *cell = value;
#endif
}

KV_FN void lower_to(int32_t* cell, int32_t value) {
#if KV_DEVICE
  atomicMin(cell, value);
#else
  if (*cell > value) *cell = value;
#endif
}

// The largest (or least) of `lanes` neighbouring threads, a power of two up to 32.
template <bool kLargest>
KV_FN int32_t of_lanes(int32_t value, [[maybe_unused]] int32_t lanes) {
#if KV_DEVICE
  for (int32_t distance = lanes >> 1; distance > 0; distance >>= 1) {
#if defined(__HIPCC__)
    const int32_t other = __shfl_xor(value, distance);
#else
    const int32_t other = __shfl_xor_sync(0xFFFFFFFFu, value, distance);
#endif
    value = (kLargest ? value < other : value > other) ? other : value;
  }
#endif
  return value;
}

// Shared memory of a block: per scale the highest key, with zero points the lowest too;
// after the scale phase the reciprocal of the scale and the zero point.
struct Cells {
  int32_t *highest, *lowest;
  int32_t columns;  // channels of one column lie `columns` apart, so that lanes hit other banks

  KV_FN Cells(int32_t* shared, const Shape& shape, const Tile& tile, bool vector, int unit)
      : highest(shared), lowest(shared + tile.scale_count), columns(vector ? shape.dim / unit : 0) {}
};

template <class Memory, class Wire>
struct Encoder {
  static constexpr int kUnit = Wire::kBits == 32 ? 4 : 8;
  static constexpr int kCached = 4;  // units that a thread keeps from the reduce to the code phase
  using Raw = typename Memory::Raw;
  using Piece = Words<kUnit* int(sizeof(Raw))>;
  Piece cache[kCached];

  KV_FN static float value_of(const Plane& plane, const Piece& piece, int i) {
    const float value = Memory::load(piece.template get<Raw>(i));
    return HasScale<Memory>::kValue ? scaled(value, plane.memory_scale) : value;
  }

  KV_FN static void prepare(const Shape& shape, const Tile& tile, int32_t* shared, int32_t thread, int32_t threads) {
    for (int32_t i = thread; i < tile.scale_count; i += threads) {
      shared[i] = shape.zero_point ? kLowestKey : 0;
      if (shape.zero_point) shared[tile.scale_count + i] = kHighestKey;
    }
  }

  KV_FN void reduce(const Shape& shape, const Plane& plane, const Tile& tile, int32_t* shared, int32_t thread,
                    int32_t threads) {
    Cursor<kUnit> at(shape, thread, threads);
    const int32_t count = tile.tokens * shape.dim, units = (count + kUnit - 1) / kUnit;
    const int32_t rounds = (units + threads - 1) / threads;
    const Cells cells(shared, shape, tile, at.vector, kUnit);
    const Cursor<kUnit> start = at;
#pragma unroll
    for (int32_t k = 0; k < kCached; ++k) {  // all loads are under way before one is needed
      cache[k].clear();
      if (at.unit < units) load_unit<Raw, kUnit>(shape, tile, at, cache[k]);
      at.advance();
    }
    if (tile.scale_count == 0) return;
    at = start;
    int32_t high[kUnit], low[kUnit];
    const bool steady = at.vector && (shape.granularity == kHead || (shape.granularity == kChannel && !at.column_step));
    reset(shape, high, low);
#pragma unroll
    for (int32_t k = 0; k < kCached; ++k) {
      if (k < rounds) round(shape, plane, tile, cells, at, cache[k], units, steady, high, low);
      at.advance();
    }
    for (int32_t k = kCached; k < rounds; ++k) {
      Piece piece;
      piece.clear();
      if (at.unit < units) load_unit<Raw, kUnit>(shape, tile, at, piece);
      round(shape, plane, tile, cells, at, piece, units, steady, high, low);
      at.advance();
    }
    if (steady) flush(shape, cells, start, start.unit < units, high, low);
  }

  KV_FN static void reset(const Shape& shape, int32_t* high, int32_t* low) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      high[i] = shape.zero_point ? kLowestKey : 0;
      low[i] = kHighestKey;
    }
  }

  KV_FN static void round(const Shape& shape, const Plane& plane, const Tile& tile, const Cells& cells,
                          const Cursor<kUnit>& at, const Piece& piece, int32_t units, bool steady, int32_t* high,
                          int32_t* low) {
    const bool valid = at.unit < units;
    const int32_t count = tile.tokens * shape.dim;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (!valid || (!at.vector && at.unit * kUnit + i >= count)) continue;
      const float value = value_of(plane, piece, i);
      const int32_t key = shape.zero_point ? finite_key(value) : int32_t(finite_magnitude(value));
      if (at.vector) {
        high[i] = high[i] < key ? key : high[i];
        low[i] = low[i] > key ? key : low[i];
      } else {
        const int32_t element = at.unit * kUnit + i, token = element / shape.dim;
        const int32_t cell = shape.granularity == kChannel ? element - token * shape.dim
                             : shape.granularity == kToken ? token
                                                           : 0;
        raise_to(cells.highest + cell, key);
        if (shape.zero_point) lower_to(cells.lowest + cell, key);
      }
    }
    if (at.vector && !steady) {
      flush(shape, cells, at, valid, high, low);
      reset(shape, high, low);
    }
  }

  KV_FN static void flush(const Shape& shape, const Cells& cells, const Cursor<kUnit>& at, bool valid,
                          const int32_t* high, const int32_t* low) {
    if (shape.granularity == kChannel) {
      if (!valid) return;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        raise_to(cells.highest + i * cells.columns + at.column, high[i]);
        if (shape.zero_point) lower_to(cells.lowest + i * cells.columns + at.column, low[i]);
      }
      return;
    }
    int32_t highest = high[0], lowest = low[0];
#pragma unroll
    for (int i = 1; i < kUnit; ++i) {
      highest = highest < high[i] ? high[i] : highest;
      lowest = lowest > low[i] ? low[i] : lowest;
    }
    // Threads of one row are neighbours where a row is a power of two of units.
    const bool whole = (at.columns & (at.columns - 1)) == 0;
    const int32_t lanes = shape.granularity == kHead || (whole && at.columns >= 32) ? 32 : whole ? at.columns : 1;
    highest = of_lanes<true>(highest, lanes);
    if (shape.zero_point) lowest = of_lanes<false>(lowest, lanes);
    if (!valid || (KV_DEVICE && at.unit % lanes != 0)) return;
    const int32_t cell = shape.granularity == kToken ? at.token : 0;
    raise_to(cells.highest + cell, highest);
    if (shape.zero_point) lower_to(cells.lowest + cell, lowest);
  }

  KV_FN static void scale(const Shape& shape, const Tile& tile, int32_t* shared, int32_t thread, int32_t threads) {
    if (tile.scale_count == 0) return;
    const bool vector = shape.dim % kUnit == 0 && shape.dim_stride == 1;
    const Cells cells(shared, shape, tile, vector, kUnit);
    for (int32_t i = thread; i < tile.scale_bytes / 2; i += threads) {
      if (i >= tile.scale_count) {
        tile.scales[i] = 0;
        if (shape.zero_point) tile.zeros[i] = 0;
        continue;
      }
      const int32_t cell = vector && shape.granularity == kChannel ? i % kUnit * cells.columns + i / kUnit : i;
      uint32_t bits;
      if (shape.zero_point) {
        const uint32_t zero = zero_point_of(uint32_t(ordered_key(uint32_t(cells.lowest[cell]))));
        bits = zero_point_scale(zero, uint32_t(ordered_key(uint32_t(cells.highest[cell]))));
        tile.zeros[i] = uint16_t(zero >> 16);
        cells.lowest[cell] = int32_t(zero);
      } else {
        bits = scale_of(uint32_t(cells.highest[cell]), float_of(Wire::kReciprocal));
      }
      tile.scales[i] = uint16_t(bits >> 16);
      cells.highest[cell] = int32_t(bits_of(reciprocal(float_of(bits))));
    }
  }

  KV_FN void code(const Shape& shape, const Plane& plane, const Tile& tile, const int32_t* shared, int32_t thread,
                  int32_t threads) {
    Cursor<kUnit> at(shape, thread, threads);
    const int32_t units = tile.codes_bytes * 8 / (kUnit * Wire::kBits);
#pragma unroll
    for (int32_t k = 0; k < kCached; ++k) {
      if (at.unit < units) code_unit(shape, plane, tile, shared, at, cache[k]);
      at.advance();
    }
    while (at.unit < units) {
      Piece piece;
      piece.clear();
      if (at.unit * kUnit < tile.tokens * shape.dim) load_unit<Raw, kUnit>(shape, tile, at, piece);
      code_unit(shape, plane, tile, shared, at, piece);
      at.advance();
    }
  }

  KV_FN static void code_unit(const Shape& shape, const Plane& plane, const Tile& tile, const int32_t* shared,
                              const Cursor<kUnit>& at, const Piece& piece) {
    const int32_t count = tile.tokens * shape.dim;
    Words<kUnit * Wire::kBits / 8> out;
    out.clear();
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const int32_t element = at.unit * kUnit + i;
      if (element >= count) continue;
      int32_t cell = 0;
      if (shape.granularity == kChannel) {
        cell = at.vector ? i * at.columns + at.column : element % shape.dim;
      } else if (shape.granularity == kToken) {
        cell = at.vector ? at.token : element / shape.dim;
      }
      const float value = value_of(plane, piece, i);
      if constexpr (Wire::kInt4) {
        const float zero = shape.zero_point ? float_of(uint32_t(shared[tile.scale_count + cell])) : 0.0f;
        out.word[0] |= nibble_of(value, float_of(uint32_t(shared[cell])), zero, shape.zero_point) << (4 * i);
      } else {
        float factor = 1.0f;
        if (shape.granularity >= kChannel) factor = float_of(uint32_t(shared[cell]));
        if (shape.granularity == kTensor) factor = reciprocal(plane.wire_scale);
        const float number = shape.granularity == kNone ? value : scaled(value, factor);
        out.put(i, typename Wire::Raw(Wire::encode(number)));
      }
    }
    reinterpret_cast<Words<kUnit * Wire::kBits / 8>*>(tile.codes)[at.unit] = out;
  }
};

template <class Memory, class Wire>
struct Decoder {
  static constexpr int kUnit = Wire::kBits == 32 ? 4 : 8;
  using Raw = typename Memory::Raw;

  KV_FN static void decode(const Shape& shape, const Plane& plane, const Tile& tile, int32_t thread, int32_t threads) {
    const int32_t units = (tile.tokens * shape.dim + kUnit - 1) / kUnit;
    const float to_memory = HasScale<Memory>::kValue ? reciprocal(plane.memory_scale) : 1.0f;
#pragma unroll 4
    for (Cursor<kUnit> at(shape, thread, threads); at.unit < units; at.advance()) {
      const auto in = reinterpret_cast<const Words<kUnit * Wire::kBits / 8>*>(tile.codes)[at.unit];
      Words<kUnit* int(sizeof(Raw))> out;
      out.clear();
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        const int32_t element = at.unit * kUnit + i;
        int32_t cell = 0;
        if (shape.granularity == kChannel) cell = at.vector ? at.column * kUnit + i : element % shape.dim;
        if (shape.granularity == kToken) cell = at.vector ? at.token : element / shape.dim;
        if (!at.vector && cell >= tile.scale_count) cell = 0;  // past the tile's end
        float value;
        if constexpr (Wire::kInt4) {
          value = nibble_value(in.word[0] >> (4 * i) & 0xFu, shape.zero_point);
        } else {
          value = Wire::decode(in.template get<typename Wire::Raw>(i));
        }
        if (shape.granularity == kTensor) value = scaled(value, plane.wire_scale);
        if (shape.granularity >= kChannel) value = scaled(value, Bf16::load(tile.scales[cell]));
        if (Wire::kInt4 && shape.zero_point) value = add(value, Bf16::load(tile.zeros[cell]));
        if (HasScale<Memory>::kValue) value = scaled(value, to_memory);
        out.put(i, Memory::store(value));
      }
      store_unit<Raw, kUnit>(shape, tile, at, out);
    }
  }
};

#if KV_DEVICE
template <class Memory, class Wire>
__device__ __forceinline__ void encode_block(const Launch& launch) {
  extern __shared__ int32_t kv_shared[];
  const int32_t row = int32_t(blockIdx.y), index = int32_t(blockIdx.x);
  const Shape shape = shape_at(launch, row);
  if (index >= tile_count(shape)) return;
  const Plane plane = plane_at(launch, row);
  const Tile tile = tile_at(shape, plane, index, Wire::kBits);
  const int32_t thread = int32_t(threadIdx.x), threads = int32_t(blockDim.x);
  Encoder<Memory, Wire> encoder;
  if (tile.scale_count) {
    encoder.prepare(shape, tile, kv_shared, thread, threads);
    __syncthreads();
  }
  encoder.reduce(shape, plane, tile, kv_shared, thread, threads);
  if (tile.scale_count) {
    __syncthreads();
    encoder.scale(shape, tile, kv_shared, thread, threads);
    __syncthreads();
  }
  encoder.code(shape, plane, tile, kv_shared, thread, threads);
}

template <class Memory, class Wire>
__device__ __forceinline__ void decode_block(const Launch& launch) {
  const int32_t row = int32_t(blockIdx.y), index = int32_t(blockIdx.x);
  const Shape shape = shape_at(launch, row);
  if (index >= tile_count(shape)) return;
  const Plane plane = plane_at(launch, row);
  const Tile tile = tile_at(shape, plane, index, Wire::kBits);
  Decoder<Memory, Wire>::decode(shape, plane, tile, int32_t(threadIdx.x), int32_t(blockDim.x));
}

#endif

}  // namespace kv

// kv_encode_<memory>_<wire> and kv_decode_<memory>_<wire>: blocks of a multiple of 64 threads, shared memory of 4 bytes
// a scale of the largest tile, 8 with zero points.
#if KV_DEVICE
#if defined(__HIPCC__)
#define KV_ARGUMENT const kv::Launch
#else
#define KV_ARGUMENT const __grid_constant__ kv::Launch  // planes are looked up where it lies, not in a copy
#endif
#define KV_KERNELS(memory, Memory, wire, Wire)                                                        \
  extern "C" __global__ void __launch_bounds__(256) kv_encode_##memory##_##wire(KV_ARGUMENT launch) { \
    kv::encode_block<kv::Memory, kv::Wire>(launch);                                                   \
  }                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256) kv_decode_##memory##_##wire(KV_ARGUMENT launch) { \
    kv::decode_block<kv::Memory, kv::Wire>(launch);                                                   \
  }
#elif defined(KV_HOST_SHIM)
#include "host_shim.h"
#endif
