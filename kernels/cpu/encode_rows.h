// SPDX-License-Identifier: Apache-2.0
// Rows to codes.
#pragma once

#include "paired.h"
#include "prefetch.h"
#include "rows.h"

namespace sage_kvt::SAGE_KVT_ISA {
namespace {

template <int N>
SAGE_KVT_INLINE F32<N> clamp(F32<N> value, float low, float high) {
  const F32<N> lowest = splat_float<N>(low), highest = splat_float<N>(high);
  value = value < highest ? value : highest;
  return value > lowest ? value : lowest;
}

// 4-bit codes, one a lane: adding 1.5 * 2^23 leaves the integer, rounded to even, in the low bits.
template <Granularity G, bool ZeroPoint, bool Plain, int N>
SAGE_KVT_INLINE U32<N> int4_code(F32<N> value, const Scratch& scratch, int64_t token, int64_t d) {
  if constexpr (!Plain) {
    const U32<N> all = bits<U32<N>>(value);
    value = bits<F32<N>>(select<N>((all & 0x7FFFFFFFu) > splat<N>(kInfinity), splat<N>(0), all));
  }
  if constexpr (ZeroPoint) value -= factor<G, N>(scratch.zero, token, d);
  value *= factor<G, N>(scratch.inverse, token, d);
  value = ZeroPoint ? clamp<N>(value, 0.0f, 15.0f) : clamp<N>(value, -7.0f, 7.0f);
  return bits<U32<N>>(value + splat_float<N>(12582912.0f)) & 15u;
}

template <typename S, Granularity G, bool ZeroPoint, bool Plain>
void encode_int4(const RowRun* runs, int64_t run_count, int64_t dim, float tensor_scale, uint8_t* codes,
                 const Scratch& scratch, Prefetcher<false>& ahead) {
  int64_t token = 0;
  bool half = false;  // an odd number of codes was written: the last byte waits for its high nibble
  for (int64_t r = 0; r < run_count; ++r)
    for (int64_t t = 0; t < runs[r].count; ++t, ++token) {
      const uint8_t* row = runs[r].base + t * runs[r].stride;
      ahead.step();
      int64_t d = 0;
      for (; d + kLanes <= dim; d += kLanes)
        store_narrow<uint8_t, kLanes>(
            scratch.code_bytes + d,
            int4_code<G, ZeroPoint, Plain, kLanes>(element<S, kLanes>(row, d, tensor_scale), scratch, token, d));
      for (; d < dim; ++d)
        scratch.code_bytes[d] = static_cast<uint8_t>(
            int4_code<G, ZeroPoint, Plain, 1>(element<S, 1>(row, d, tensor_scale), scratch, token, d)[0]);
      d = 0;
      if (!half)
        for (; d + 32 <= dim; d += 32, codes += 16) {
          const auto pairs = load<Lanes<uint16_t, 16>>(scratch.code_bytes + d);
          store_bytes_of_words(codes, (pairs | (pairs >> 4)) & 0xFF);
        }
      for (; d < dim; ++d, half = !half) {
        if (half)
          *codes++ |= static_cast<uint8_t>(scratch.code_bytes[d] << 4);
        else
          *codes = scratch.code_bytes[d];
      }
    }
}

template <typename S, typename W, Granularity G, bool Plain>
void encode_float(const RowRun* runs, int64_t run_count, int64_t dim, float tensor_scale, uint8_t* codes,
                  const Scratch& scratch, Prefetcher<false>& ahead) {
  auto* out = reinterpret_cast<typename W::Raw*>(codes);
  int64_t token = 0;
  for (int64_t r = 0; r < run_count; ++r)
    for (int64_t t = 0; t < runs[r].count; ++t, ++token, out += dim) {
      const uint8_t* row = runs[r].base + t * runs[r].stride;
      ahead.step();
      int64_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) {
        F32<kLanes> value = element<S, kLanes>(row, d, tensor_scale);
        if constexpr (G != Granularity::kNone) value *= factor<G, kLanes>(scratch.inverse, token, d);
        store_float<W, Plain, kLanes>(out + d, value);
      }
      for (; d < dim; ++d) {
        F32<1> value = element<S, 1>(row, d, tensor_scale);
        if constexpr (G != Granularity::kNone) value *= factor<G, 1>(scratch.inverse, token, d);
        store_float<W, Plain, 1>(out + d, value);
      }
    }
}

// bf16 rows whose values are finite and within their scales.
void encode_paired(const RowRun* runs, int64_t run_count, int64_t dim, const WireFormat& format, uint8_t* codes,
                   const Scratch& scratch, Prefetcher<false>& ahead) {
  const int64_t row_codes = dim * element_bits(format.dtype) / 8;
  if (format.granularity == Granularity::kChannel) {
    split_even_odd(scratch.inverse, dim, scratch.even_odd);
    if (format.zero_point) split_even_odd(scratch.zero, dim, scratch.even_odd + dim);
  }
  const auto each_row = [&](auto encode_row) {
    int64_t token = 0;
    for (int64_t r = 0; r < run_count; ++r)
      for (int64_t t = 0; t < runs[r].count; ++t, ++token, codes += row_codes) {
        ahead.step();
        encode_row(runs[r].base + t * runs[r].stride, token);
      }
  };
  with_granularity(format.granularity, [&]<Granularity G>() {
    if (format.dtype == Dtype::kFp8E4M3)
      each_row([&](const uint8_t* row, int64_t token) {
        encode_float_row<E4M3, G, kLanes>(row, dim, token, scratch.inverse, scratch.even_odd, codes);
      });
    else if (format.dtype == Dtype::kFp8E5M2)
      each_row([&](const uint8_t* row, int64_t token) {
        encode_float_row<E5M2, G, kLanes>(row, dim, token, scratch.inverse, scratch.even_odd, codes);
      });
    else if (format.zero_point)
      each_row([&](const uint8_t* row, int64_t token) {
        encode_int4_row<G, true, kLanes>(row, dim, token, scratch.inverse, scratch.zero, scratch.even_odd, codes);
      });
    else
      each_row([&](const uint8_t* row, int64_t token) {
        encode_int4_row<G, false, kLanes>(row, dim, token, scratch.inverse, scratch.zero, scratch.even_odd, codes);
      });
  });
}

}  // namespace
}  // namespace sage_kvt::SAGE_KVT_ISA
