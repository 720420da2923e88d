// SPDX-License-Identifier: Apache-2.0
// bf16 rows to fp8 and int4 codes, two neighbouring channels in one 32-bit lane.
//
// A 32-bit lane of a bf16 row is channel 2i in its low half and channel 2i + 1 in its high half: one
// shift and one mask widen both, and codes come back together the same way, so that no lane crosses
// the vector. For values that are finite and within the scale; the same codes as element.h's.
#pragma once

#include "rows.h"

namespace sage_kvt::SAGE_KVT_ISA {
namespace {

#if defined(__AVX2__)
constexpr bool kPaired = true;
#else
constexpr bool kPaired = false;
#endif

// Channels 2i of a vector of pairs, and channels 2i + 1.
template <int N>
struct Pair {
  F32<N> even, odd;
};

template <int N>
SAGE_KVT_INLINE Pair<N> load_pair(const uint8_t* from) {
  const U32<N> raw = load<U32<N>>(from);
  return {bits<F32<N>>(raw << 16), bits<F32<N>>(raw & 0xFFFF0000u)};
}

// `values` of channels in order as all even ones, then all odd ones.
inline void split_even_odd(const float* values, int64_t count, float* to) {
  for (int64_t i = 0; i < count / 2; ++i) to[i] = values[2 * i], to[count / 2 + i] = values[2 * i + 1];
}

template <Granularity G, int N>
SAGE_KVT_INLINE Pair<N> factor_pair(const float* values, const float* even_odd, int64_t token, int64_t d, int64_t dim) {
  if constexpr (G == Granularity::kChannel)
    return {load<F32<N>>(even_odd + d / 2), load<F32<N>>(even_odd + dim / 2 + d / 2)};
  const F32<N> one = splat_float<N>(values[G == Granularity::kToken ? token : 0]);
  return {one, one};
}

// Whether some 16-bit lane is more than `most`.
template <int N>
SAGE_KVT_INLINE bool any_word_above(Lanes<uint16_t, N> words, uint16_t most) {
#if defined(__AVX512BW__)
  if constexpr (N == 32)
    return _mm512_cmpgt_epu16_mask(bits<__m512i>(words), _mm512_set1_epi16(static_cast<short>(most))) != 0;
#elif defined(__AVX2__)
  if constexpr (N == 16) {
    const __m256i above = _mm256_subs_epu16(bits<__m256i>(words), _mm256_set1_epi16(static_cast<short>(most)));
    return !_mm256_testz_si256(above, above);
  }
#endif
  for (int i = 0; i < N; ++i)
    if (words[i] > most) return true;
  return false;
}

// The low bytes of N 16-bit lanes, whose high bytes are zero.
template <int N>
SAGE_KVT_INLINE void store_low_bytes(uint8_t* to, Lanes<uint16_t, N> words) {
#if defined(__AVX512BW__)
  if constexpr (N == 32) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi16_epi8(bits<__m512i>(words)));
    return;
  }
#elif defined(__AVX2__)
  if constexpr (N == 16) {
    const __m256i all = bits<__m256i>(words);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packus_epi16(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
    return;
  }
#endif
  store(to, __builtin_convertvector(words, Lanes<uint8_t, N>));
}

// 2N codes of an 8-bit float.
template <typename W, int N>
SAGE_KVT_INLINE void store_pair(uint8_t* to, Pair<N> value) {
  using Words = Lanes<uint16_t, 2 * N>;
  constexpr int shift = W::kShift, word_shift = shift - 16;
  constexpr uint32_t half = (1u << (shift - 1)) - 1 - (W::kRebias << shift);
  const auto rounded = [&](F32<N> lanes) __attribute__((always_inline)) {
    const U32<N> all = bits<U32<N>>(lanes), up = all + half;
    return select<N>((all & (1u << shift)) != 0, up + 1, up);
  };
  const U32<N> even = rounded(value.even), odd = rounded(value.odd);
  const auto words = bits<Words>((even >> 16) | (odd & 0xFFFF0000u));
  // A code is right if its exponent stayed at least 1; below, steps are those of the denormals.
  constexpr uint16_t least = 1u << (23 - 16), above = ((1u << 7) << word_shift) - least;
  if (__builtin_expect(any_word_above<2 * N>((words & 0x7FFF) - least, above - 1), 0)) {
    const U32<N> both = W::template narrow_plain<N>(value.even) | (W::template narrow_plain<N>(value.odd) << 8);
    store_narrow<uint16_t, N>(to, both);
    return;
  }
  store_low_bytes<2 * N>(to, ((words >> word_shift) & 0x7F) | ((words >> 8) & 0x80));
}

template <typename W, Granularity G, int N>
SAGE_KVT_INLINE void encode_float_row(const uint8_t* row, int64_t dim, int64_t token, const float* inverse,
                                      const float* even_odd, uint8_t* codes) {
  for (int64_t d = 0; d < dim; d += 2 * N) {
    const Pair<N> value = load_pair<N>(row + 2 * d), by = factor_pair<G, N>(inverse, even_odd, token, d, dim);
    store_pair<W, N>(codes + d, {value.even * by.even, value.odd * by.odd});
  }
}

// Adding 1.5 * 2^23 leaves the integer, rounded to even, in the low bits; no clamp, see the head of this file.
template <Granularity G, bool ZeroPoint, int N>
SAGE_KVT_INLINE void encode_int4_row(const uint8_t* row, int64_t dim, int64_t token, const float* inverse,
                                     const float* zero, const float* even_odd, uint8_t* codes) {
  const F32<N> magic = splat_float<N>(12582912.0f);
  for (int64_t d = 0; d < dim; d += 2 * N) {
    Pair<N> value = load_pair<N>(row + 2 * d);
    const Pair<N> by = factor_pair<G, N>(inverse, even_odd, token, d, dim);
    if constexpr (ZeroPoint) {
      const Pair<N> from = factor_pair<G, N>(zero, even_odd + dim, token, d, dim);
      value = {value.even - from.even, value.odd - from.odd};
    }
    const U32<N> even = bits<U32<N>>(value.even * by.even + magic), odd = bits<U32<N>>(value.odd * by.odd + magic);
    store_narrow<uint8_t, N>(codes + d / 2, (even & 15u) | ((odd << 4) & 0xF0u));
  }
}

}  // namespace
}  // namespace sage_kvt::SAGE_KVT_ISA
