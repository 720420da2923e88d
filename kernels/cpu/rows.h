// SPDX-License-Identifier: Apache-2.0
// Rows of elements in canonical order and what their lanes share: factors, scales, formats as templates.
#pragma once

#include "element.h"
#include "tile.h"

namespace sage_kvt::SAGE_KVT_ISA {
namespace {

#ifndef SAGE_KVT_LANES
#define SAGE_KVT_LANES 16
#endif
constexpr int kLanes = SAGE_KVT_LANES;
// Bytes of an integer vector: as many as a register has. GCC takes comparisons of wider ones apart, lane by lane.
#if defined(__AVX512BW__)
constexpr int kWide = 64;
#elif defined(__AVX2__)
constexpr int kWide = 32;
#else
constexpr int kWide = 16;
#endif

// Rows of canonical order: where they lie already, or in scratch.
struct RowRun {
  uint8_t* base;
  int64_t stride, count;
};
constexpr int64_t kMaxRuns = 1024;  // a tile has at most as many tokens

inline bool is_finite(float value) { return (__builtin_bit_cast(uint32_t, value) & kInfinity) != kInfinity; }
inline float as_float(uint32_t value) { return __builtin_bit_cast(float, value); }
inline uint32_t as_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

template <typename S, int N>
SAGE_KVT_INLINE F32<N> element(const uint8_t* row, int64_t d, float tensor_scale) {
  F32<N> value = load_float<S, N>(reinterpret_cast<const typename S::Raw*>(row) + d);
  if (sizeof(typename S::Raw) == 1) value *= splat_float<N>(tensor_scale);
  return value;
}

inline void store_bf16(uint8_t* to, const float* values, int64_t count, size_t section) {
  for (int64_t i = 0; i < count; ++i) {
    const auto half = static_cast<uint16_t>(as_bits(values[i]) >> 16);
    std::memcpy(to + 2 * i, &half, 2);
  }
  std::memset(to + 2 * count, 0, section - 2 * count);
}

inline void load_bf16(const uint8_t* from, float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint16_t half;
    std::memcpy(&half, from + 2 * i, 2);
    values[i] = as_float(uint32_t{half} << 16);
  }
}

// One of the granularities as a factor of lanes [d, d + N) of token t.
template <Granularity G, int N>
SAGE_KVT_INLINE F32<N> factor(const float* values, int64_t token, int64_t d) {
  if constexpr (G == Granularity::kChannel) return load<F32<N>>(values + d);
  return splat_float<N>(values[G == Granularity::kToken ? token : 0]);
}

template <typename Visit>
inline void with_memory(Dtype dtype, Visit visit) {
  switch (dtype) {
    case Dtype::kFp32:
      return visit.template operator()<Fp32>();
    case Dtype::kFp16:
      return visit.template operator()<Fp16>();
    case Dtype::kBf16:
      return visit.template operator()<Bf16>();
    case Dtype::kFp8E4M3:
      return visit.template operator()<E4M3>();
    default:
      return visit.template operator()<E5M2>();
  }
}

template <typename Visit>
inline void with_granularity(Granularity granularity, Visit visit) {
  switch (granularity) {
    case Granularity::kNone:
      return visit.template operator()<Granularity::kNone>();
    case Granularity::kChannel:
      return visit.template operator()<Granularity::kChannel>();
    case Granularity::kToken:
      return visit.template operator()<Granularity::kToken>();
    default:  // one factor for all
      return visit.template operator()<Granularity::kHead>();
  }
}

}  // namespace
}  // namespace sage_kvt::SAGE_KVT_ISA
