// SPDX-License-Identifier: Apache-2.0
// Encode and decode of one tile, compiled once for each instruction set (SAGE_KVT_ISA names it).
#include "decode_rows.h"
#include "encode_rows.h"
#include "gather.h"
#include "scales.h"

namespace sage_kvt::SAGE_KVT_ISA {
namespace {

bool copies(const Memory& memory, const WireFormat& format, float wire_scale) {
  return memory.dtype == format.dtype &&
         (format.granularity == Granularity::kNone ||
          (format.granularity == Granularity::kTensor && memory.tensor_scale == wire_scale));
}

template <typename Raw>
int64_t direct_runs(const Memory& memory, const Piece* pieces, int64_t piece_count, RowRun* runs) {
  for (int64_t i = 0; i < piece_count; ++i)
    runs[i] = {pieces[i].head + pieces[i].first * memory.order.token_inner, memory.order.token_inner, pieces[i].count};
  return piece_count;
}

void encode(const Memory& memory, const TilePieces& where, int64_t dim, const WireFormat& format, float wire_scale,
            uint8_t* tile, const Scratch& scratch) {
  const Piece* pieces = where.pieces;
  const int64_t piece_count = where.count;
  int64_t tokens = 0;
  for (int64_t i = 0; i < piece_count; ++i) tokens += pieces[i].count;
  Prefetcher<false> ahead(where, tokens);
  const Sections size = sections(format, tokens, dim);
  uint8_t* codes = tile + size.scales + size.zeros;
  const size_t code_bytes = (tokens * dim * element_bits(format.dtype) + 7) / 8;
  with_memory(memory.dtype, [&]<typename S>() {
    using Raw = typename S::Raw;
    if (copies(memory, format, wire_scale)) {
      auto* rows = reinterpret_cast<Raw*>(codes);
      for (int64_t i = 0; i < piece_count; rows += pieces[i].count * dim, ++i)
        gather<Raw>(memory.order, pieces[i], dim, rows);
      return;
    }
    RowRun runs[kMaxRuns];
    int64_t run_count = 1;
    if (is_rows<Raw>(memory.order)) {
      run_count = direct_runs<Raw>(memory, pieces, piece_count, runs);
    } else {
      auto* rows = reinterpret_cast<Raw*>(scratch.rows);
      for (int64_t i = 0; i < piece_count; rows += pieces[i].count * dim, ++i)
        gather<Raw>(memory.order, pieces[i], dim, rows);
      runs[0] = {scratch.rows, static_cast<int64_t>(dim * sizeof(Raw)), tokens};
    }
    const float tensor_scale = memory.tensor_scale;
    bool plain = false, within = false;
    if (format.granularity == Granularity::kTensor) {
      scratch.inverse[0] = 1.0f / wire_scale;
    } else if (format.granularity != Granularity::kNone) {
      const Scales found = find_scales<S>(runs, run_count, tokens, dim, format, tensor_scale, scratch);
      const int64_t count = found.count;
      plain = found.plain, within = found.within;
      store_bf16(tile, scratch.scale, count, size.scales);
      if (format.zero_point) store_bf16(tile + size.scales, scratch.zero, count, size.zeros);
    }
    if constexpr (kPaired && std::is_same_v<S, Bf16>)
      if (within && dim % (2 * kLanes) == 0 && element_bits(format.dtype) < 16)
        return encode_paired(runs, run_count, dim, format, codes, scratch, ahead);
    with_granularity(format.granularity, [&]<Granularity G>() {
      switch (format.dtype) {
        case Dtype::kFp32:
          return encode_float<S, Fp32, Granularity::kNone, false>(runs, run_count, dim, tensor_scale, codes, scratch,
                                                                  ahead);
        case Dtype::kFp16:
          return encode_float<S, Fp16, Granularity::kNone, false>(runs, run_count, dim, tensor_scale, codes, scratch,
                                                                  ahead);
        case Dtype::kBf16:
          return encode_float<S, Bf16, Granularity::kNone, false>(runs, run_count, dim, tensor_scale, codes, scratch,
                                                                  ahead);
        case Dtype::kFp8E4M3:
          if (plain) return encode_float<S, E4M3, G, true>(runs, run_count, dim, tensor_scale, codes, scratch, ahead);
          return encode_float<S, E4M3, G, false>(runs, run_count, dim, tensor_scale, codes, scratch, ahead);
        case Dtype::kFp8E5M2:
          if (plain) return encode_float<S, E5M2, G, true>(runs, run_count, dim, tensor_scale, codes, scratch, ahead);
          return encode_float<S, E5M2, G, false>(runs, run_count, dim, tensor_scale, codes, scratch, ahead);
        case Dtype::kInt4:
          if (format.zero_point)
            return plain ? encode_int4<S, G, true, true>(runs, run_count, dim, tensor_scale, codes, scratch, ahead)
                         : encode_int4<S, G, true, false>(runs, run_count, dim, tensor_scale, codes, scratch, ahead);
          return plain ? encode_int4<S, G, false, true>(runs, run_count, dim, tensor_scale, codes, scratch, ahead)
                       : encode_int4<S, G, false, false>(runs, run_count, dim, tensor_scale, codes, scratch, ahead);
      }
    });
  });
  std::memset(codes + code_bytes, 0, size.codes - code_bytes);
}

void decode(const Memory& memory, const TilePieces& where, int64_t dim, const WireFormat& format, float wire_scale,
            const uint8_t* tile, const Scratch& scratch) {
  const Piece* pieces = where.pieces;
  const int64_t piece_count = where.count;
  int64_t tokens = 0;
  for (int64_t i = 0; i < piece_count; ++i) tokens += pieces[i].count;
  Prefetcher<true> ahead(where, tokens);
  const Sections size = sections(format, tokens, dim);
  const uint8_t* codes = tile + size.scales + size.zeros;
  with_memory(memory.dtype, [&]<typename S>() {
    using Raw = typename S::Raw;
    if (copies(memory, format, wire_scale)) {
      const auto* rows = reinterpret_cast<const Raw*>(codes);
      for (int64_t i = 0; i < piece_count; rows += pieces[i].count * dim, ++i)
        scatter<Raw>(memory.order, pieces[i], dim, rows);
      return;
    }
    RowRun runs[kMaxRuns];
    int64_t run_count = 1;
    const bool direct = is_rows<Raw>(memory.order);
    if (direct)
      run_count = direct_runs<Raw>(memory, pieces, piece_count, runs);
    else
      runs[0] = {scratch.rows, static_cast<int64_t>(dim * sizeof(Raw)), tokens};
    const float inverse_scale = 1.0f / memory.tensor_scale;
    bool plain = false;
    if (format.granularity == Granularity::kTensor) {
      scratch.scale[0] = wire_scale;
    } else if (format.granularity != Granularity::kNone) {
      const int64_t count = scale_count(format, tokens, dim);
      load_bf16(tile, scratch.scale, count);
      if (format.zero_point) load_bf16(tile + size.scales, scratch.zero, count);
      // No sum of products of these overflows bf16 or fp32; a peer may send any scale.
      plain = (memory.dtype == Dtype::kBf16 || memory.dtype == Dtype::kFp32) && moderate(scratch.scale, count) &&
              (!format.zero_point || moderate(scratch.zero, count));
    }
    with_granularity(format.granularity, [&]<Granularity G>() {
      switch (format.dtype) {
        case Dtype::kFp32:
          return decode_float<S, Fp32, Granularity::kNone, false>(codes, runs, run_count, dim, inverse_scale, scratch,
                                                                  ahead);
        case Dtype::kFp16:
          return decode_float<S, Fp16, Granularity::kNone, false>(codes, runs, run_count, dim, inverse_scale, scratch,
                                                                  ahead);
        case Dtype::kBf16:
          return decode_float<S, Bf16, Granularity::kNone, false>(codes, runs, run_count, dim, inverse_scale, scratch,
                                                                  ahead);
        case Dtype::kFp8E4M3:
          if (plain && finite_codes<E4M3>(codes, tokens * dim))
            return decode_float<S, E4M3, G, true>(codes, runs, run_count, dim, inverse_scale, scratch, ahead);
          return decode_float<S, E4M3, G, false>(codes, runs, run_count, dim, inverse_scale, scratch, ahead);
        case Dtype::kFp8E5M2:
          if (plain && finite_codes<E5M2>(codes, tokens * dim))
            return decode_float<S, E5M2, G, true>(codes, runs, run_count, dim, inverse_scale, scratch, ahead);
          return decode_float<S, E5M2, G, false>(codes, runs, run_count, dim, inverse_scale, scratch, ahead);
        case Dtype::kInt4:
          if (format.zero_point)
            return plain ? decode_int4<S, G, true, true>(codes, runs, run_count, dim, inverse_scale, scratch, ahead)
                         : decode_int4<S, G, true, false>(codes, runs, run_count, dim, inverse_scale, scratch, ahead);
          return plain ? decode_int4<S, G, false, true>(codes, runs, run_count, dim, inverse_scale, scratch, ahead)
                       : decode_int4<S, G, false, false>(codes, runs, run_count, dim, inverse_scale, scratch, ahead);
      }
    });
    if (!direct) {
      const auto* rows = reinterpret_cast<const Raw*>(scratch.rows);
      for (int64_t i = 0; i < piece_count; rows += pieces[i].count * dim, ++i)
        scatter<Raw>(memory.order, pieces[i], dim, rows);
    }
  });
}

#define SAGE_KVT_TEXT_(name) #name
#define SAGE_KVT_TEXT(name) SAGE_KVT_TEXT_(name)
constexpr TileKernels kKernels{SAGE_KVT_TEXT(SAGE_KVT_ISA), encode, decode};

}  // namespace
}  // namespace sage_kvt::SAGE_KVT_ISA

namespace sage_kvt {
#define SAGE_KVT_JOIN_(a, b) a##b
#define SAGE_KVT_JOIN(a, b) SAGE_KVT_JOIN_(a, b)
const TileKernels& SAGE_KVT_JOIN(tile_kernels_, SAGE_KVT_ISA)() { return SAGE_KVT_ISA::kKernels; }
}  // namespace sage_kvt
