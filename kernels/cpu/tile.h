// SPDX-License-Identifier: Apache-2.0
// One tile's conversion as the instruction sets implement it: plain structs and function tables.
//
// A tile is one head of one token group of one plane of one layer. In memory its tokens lie in
// one or more pages (`Piece`), each addressed by a two-level stride for token and channel
// (docs/format.md, "Memory"). On the wire it is three padded sections: scales, zero points, codes.
// This header is included by units compiled for different instruction sets: what code it has is in
// an unnamed namespace, so that the linker can't merge it between them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sage_kvt {

enum class Dtype : int32_t { kFp32, kFp16, kBf16, kFp8E4M3, kFp8E5M2, kInt4 };
enum class Granularity : int32_t { kNone, kTensor, kChannel, kToken, kHead };

struct WireFormat {
  Dtype dtype;
  Granularity granularity;
  int32_t group_tokens;
  int32_t zero_point;
};

// Byte offset of element (token, channel) inside one head of a page:
//   (token % token_tile) * token_inner + (token / token_tile) * token_outer
// + (channel % dim_tile) * dim_inner + (channel / dim_tile) * dim_outer
struct ElementOrder {
  int64_t token_tile, token_inner, token_outer;
  int64_t dim_tile, dim_inner, dim_outer;
};

// Tokens [first, first + count) of one head of one page.
struct Piece {
  uint8_t* head;
  int64_t first, count;
};

struct Memory {
  Dtype dtype;
  float tensor_scale;  // element value = code * tensor_scale; 1 but for fp8 caches of an engine
  ElementOrder order;
};

struct Sections {
  size_t scales, zeros, codes;
};

namespace {

inline size_t padded(size_t bytes) { return (bytes + 15) & ~size_t{15}; }

inline int64_t scale_count(const WireFormat& format, int64_t tokens, int64_t dim) {
  switch (format.granularity) {
    case Granularity::kChannel:
      return dim;
    case Granularity::kToken:
      return tokens;
    case Granularity::kHead:
      return 1;
    default:
      return 0;
  }
}

inline int64_t element_bits(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFp32:
      return 32;
    case Dtype::kFp16:
    case Dtype::kBf16:
      return 16;
    case Dtype::kInt4:
      return 4;
    default:
      return 8;
  }
}

inline Sections sections(const WireFormat& format, int64_t tokens, int64_t dim) {
  const size_t scales = padded(2 * scale_count(format, tokens, dim));
  return {scales, format.zero_point ? scales : 0, padded((tokens * dim * element_bits(format.dtype) + 7) / 8)};
}

}  // namespace

// Working memory of one conversion; a thread keeps one and reuses it.
struct Scratch {
  uint8_t* rows;        // tokens x dim elements of up to 4 bytes, in canonical order
  uint8_t* code_bytes;  // dim codes, one a byte
  float* scale;         // max(tokens, dim)
  float* inverse;       // max(tokens, dim)
  float* zero;          // max(tokens, dim)
  float* even_odd;      // 2 x dim
};

// Memory of the tile that comes next, `rows` of `bytes` every `stride`: it is fetched into the
// cache while this one is computed, so that arithmetic and memory share the time.
struct Ahead {
  const uint8_t* base;
  int64_t stride, rows, bytes;
};

struct TilePieces {
  const Piece* pieces;
  int64_t count;
  const Ahead* ahead;
  int64_t ahead_count;
};

struct TileKernels {
  const char* name;
  // `wire_scale`: the engine's scale that a kTensor format uses.
  void (*encode)(const Memory& memory, const TilePieces& where, int64_t dim, const WireFormat& format, float wire_scale,
                 uint8_t* tile, const Scratch& scratch);
  void (*decode)(const Memory& memory, const TilePieces& where, int64_t dim, const WireFormat& format, float wire_scale,
                 const uint8_t* tile, const Scratch& scratch);
};

const TileKernels& tile_kernels_portable();
#if defined(__x86_64__)
const TileKernels& tile_kernels_avx2();
const TileKernels& tile_kernels_avx512();
#endif

}  // namespace sage_kvt
