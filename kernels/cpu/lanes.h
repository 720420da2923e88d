// SPDX-License-Identifier: Apache-2.0
// Vectors of N equal lanes (GCC vector extensions) and the widening and narrowing of their lanes.
//
// Arithmetic is written once with vector extensions; only conversions between lane widths use
// intrinsics, because GCC 12 takes __builtin_convertvector of them apart lane by lane.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sage_kvt::SAGE_KVT_ISA {
namespace {

#define SAGE_KVT_INLINE inline __attribute__((always_inline))

template <typename T, int N>
struct LanesOf {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
template <typename T, int N>
using Lanes = typename LanesOf<T, N>::type;
template <int N>
using F32 = Lanes<float, N>;
template <int N>
using U32 = Lanes<uint32_t, N>;
template <int N>
using I32 = Lanes<int32_t, N>;

template <typename V>
SAGE_KVT_INLINE V load(const void* from) {
  V lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

template <typename V>
SAGE_KVT_INLINE void store(void* to, V lanes) {
  std::memcpy(to, &lanes, sizeof lanes);
}

template <typename To, typename From>
SAGE_KVT_INLINE To bits(From lanes) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &lanes, sizeof to);
  return to;
}

template <int N>
SAGE_KVT_INLINE U32<N> splat(uint32_t value) {
  return U32<N>{} + value;
}

template <int N>
SAGE_KVT_INLINE F32<N> splat_float(float value) {
  return bits<F32<N>>(splat<N>(__builtin_bit_cast(uint32_t, value)));
}

template <int N>
SAGE_KVT_INLINE U32<N> select(I32<N> mask, U32<N> yes, U32<N> no) {
  return mask ? yes : no;
}

// N elements of 1, 2 or 4 bytes from memory, zero-extended to 32 bits.
template <typename Raw, int N>
SAGE_KVT_INLINE U32<N> load_wide(const void* from) {
#if defined(__AVX512F__)
  if constexpr (N == 16 && sizeof(Raw) == 1)
    return bits<U32<N>>(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
  if constexpr (N == 16 && sizeof(Raw) == 2)
    return bits<U32<N>>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
  if constexpr (N == 8 && sizeof(Raw) == 1)
    return bits<U32<N>>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from))));
  if constexpr (N == 8 && sizeof(Raw) == 2)
    return bits<U32<N>>(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
#endif
  return __builtin_convertvector(load<Lanes<Raw, N>>(from), U32<N>);
}

// The low 1, 2 or 4 bytes of N lanes to memory; the lanes' upper bytes must be zero.
template <typename Raw, int N>
SAGE_KVT_INLINE void store_narrow(void* to, U32<N> lanes) {
#if defined(__AVX512F__)
  if constexpr (N == 16 && sizeof(Raw) == 1) {
    _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8(bits<__m512i>(lanes)));
    return;
  } else if constexpr (N == 16 && sizeof(Raw) == 2) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16(bits<__m512i>(lanes)));
    return;
  }
#elif defined(__AVX2__)
  if constexpr (N == 8 && sizeof(Raw) < 4) {
    const __m256i packed = _mm256_packus_epi32(bits<__m256i>(lanes), bits<__m256i>(lanes));
    const __m128i words = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
    if constexpr (sizeof(Raw) == 2)
      _mm_storeu_si128(static_cast<__m128i*>(to), words);
    else
      _mm_storel_epi64(static_cast<__m128i*>(to), _mm_packus_epi16(words, words));
    return;
  }
#endif
  store(to, __builtin_convertvector(lanes, Lanes<Raw, N>));
}

// 16 bytes from memory, zero-extended to 16 bits; and back.
SAGE_KVT_INLINE Lanes<uint16_t, 16> load_words_of_bytes(const void* from) {
#if defined(__AVX2__)
  return bits<Lanes<uint16_t, 16>>(_mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(load<Lanes<uint8_t, 16>>(from), Lanes<uint16_t, 16>);
#endif
}

SAGE_KVT_INLINE void store_bytes_of_words(void* to, Lanes<uint16_t, 16> words) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_cvtepi16_epi8(bits<__m256i>(words)));
#else
  store(to, __builtin_convertvector(words, Lanes<uint8_t, 16>));
#endif
}

}  // namespace
}  // namespace sage_kvt::SAGE_KVT_ISA
