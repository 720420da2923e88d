// SPDX-License-Identifier: Apache-2.0
// Codes to rows.
#pragma once

#include "prefetch.h"
#include "rows.h"

namespace sage_kvt::SAGE_KVT_ISA {
namespace {

// All between -2^100 and 2^100.
bool moderate(const float* values, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = as_bits(values[i]) & 0x7FFFFFFFu;
    most = magnitude > most ? magnitude : most;
  }
  return most < as_bits(0x1p100f);
}

// Whether no code stands for infinity or NaN.
template <typename W>
bool finite_codes(const uint8_t* codes, int64_t count) {
  using V = Lanes<int8_t, kWide>;
  V most{};
  int64_t i = 0;
  for (; i + kWide <= count; i += kWide) {
    const V magnitude = load<V>(codes + i) & 0x7F;
    most = magnitude > most ? magnitude : most;
  }
  int highest = 0;
  for (int lane = 0; lane < kWide; ++lane) highest = most[lane] > highest ? most[lane] : highest;
  for (; i < count; ++i) highest = (codes[i] & 0x7F) > highest ? codes[i] & 0x7F : highest;
  return highest < static_cast<int>(W::kFirstSpecial);
}
template <typename S, typename W, Granularity G, bool Plain>
void decode_float(const uint8_t* codes, const RowRun* runs, int64_t run_count, int64_t dim, float inverse_scale,
                  const Scratch& scratch, Prefetcher<true>& ahead) {
  const auto* in = reinterpret_cast<const typename W::Raw*>(codes);
  int64_t token = 0;
  const auto place = [&]<int N>(uint8_t* row, int64_t d) __attribute__((always_inline)) {
    F32<N> value = Plain ? load_finite<W, N>(in + d) : load_float<W, N>(in + d);
    if constexpr (G != Granularity::kNone) value *= factor<G, N>(scratch.scale, token, d);
    if (sizeof(typename S::Raw) == 1) value *= splat_float<N>(inverse_scale);
    store_float<S, Plain, N>(reinterpret_cast<typename S::Raw*>(row) + d, value);
  };
  for (int64_t r = 0; r < run_count; ++r)
    for (int64_t t = 0; t < runs[r].count; ++t, ++token, in += dim) {
      uint8_t* row = runs[r].base + t * runs[r].stride;
      ahead.step();
      int64_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) place.template operator()<kLanes>(row, d);
      for (; d < dim; ++d) place.template operator()<1>(row, d);
    }
}

template <typename S, Granularity G, bool ZeroPoint, bool Plain>
void decode_int4(const uint8_t* codes, const RowRun* runs, int64_t run_count, int64_t dim, float inverse_scale,
                 const Scratch& scratch, Prefetcher<true>& ahead) {
  int64_t token = 0, index = 0;
  const auto place = [&]<int N>(uint8_t* row, int64_t d) __attribute__((always_inline)) {
    I32<N> code = bits<I32<N>>(load_wide<uint8_t, N>(scratch.code_bytes + d));
    if constexpr (!ZeroPoint) code = (code ^ 8) - 8;
    F32<N> value = __builtin_convertvector(code, F32<N>) * factor<G, N>(scratch.scale, token, d);
    if constexpr (ZeroPoint) value += factor<G, N>(scratch.zero, token, d);
    if (sizeof(typename S::Raw) == 1) value *= splat_float<N>(inverse_scale);
    store_float<S, Plain, N>(reinterpret_cast<typename S::Raw*>(row) + d, value);
  };
  for (int64_t r = 0; r < run_count; ++r)
    for (int64_t t = 0; t < runs[r].count; ++t, ++token) {
      uint8_t* row = runs[r].base + t * runs[r].stride;
      ahead.step();
      int64_t d = 0;
      if (index % 2 == 0)
        for (; d + 32 <= dim; d += 32, index += 32) {
          const auto packed = load_words_of_bytes(codes + index / 2);
          store(scratch.code_bytes + d, (packed & 15) | ((packed & 0xF0) << 4));
        }
      for (; d < dim; ++d, ++index) scratch.code_bytes[d] = (codes[index / 2] >> (index % 2 ? 4 : 0)) & 15;
      for (d = 0; d + kLanes <= dim; d += kLanes) place.template operator()<kLanes>(row, d);
      for (; d < dim; ++d) place.template operator()<1>(row, d);
    }
}

}  // namespace
}  // namespace sage_kvt::SAGE_KVT_ISA
