// SPDX-License-Identifier: Apache-2.0
#include "crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace sage_kvt {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78u;

std::array<std::array<uint32_t, 256>, 8> make_tables() {
  std::array<std::array<uint32_t, 256>, 8> t{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t c = i;
    for (int k = 0; k < 8; ++k) c = (c >> 1) ^ ((c & 1) ? kPolynomial : 0);
    t[0][i] = c;
  }
  for (uint32_t i = 0; i < 256; ++i)
    for (size_t s = 1; s < 8; ++s) t[s][i] = (t[s - 1][i] >> 8) ^ t[0][t[s - 1][i] & 0xff];
  return t;
}

const auto kTables = make_tables();

uint32_t by_table(uint32_t crc, const void* data, size_t size) {
  const auto* p = static_cast<const uint8_t*>(data);
  crc = ~crc;
  while (size >= 8) {
    uint64_t v;
    std::memcpy(&v, p, 8);
    v ^= crc;
    crc = kTables[7][v & 0xff] ^ kTables[6][(v >> 8) & 0xff] ^ kTables[5][(v >> 16) & 0xff] ^
          kTables[4][(v >> 24) & 0xff] ^ kTables[3][(v >> 32) & 0xff] ^ kTables[2][(v >> 40) & 0xff] ^
          kTables[1][(v >> 48) & 0xff] ^ kTables[0][v >> 56];
    p += 8;
    size -= 8;
  }
  while (size--) crc = (crc >> 8) ^ kTables[0][(crc ^ *p++) & 0xff];
  return ~crc;
}

#if defined(__x86_64__)

// a·b mod P in the reflected representation, bit by bit; only used to make constants.
uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
    if (a & bit) product ^= b;
    b = (b >> 1) ^ ((b & 1) ? kPolynomial : 0);
  }
  return product;
}

// x^n mod P, reflected.
uint32_t x_to_the(uint64_t n) {
  uint32_t result = 0x80000000u, base = 0x40000000u;
  for (; n; n >>= 1) {
    if (n & 1) result = multiply(result, base);
    base = multiply(base, base);
  }
  return result;
}

// Constant that moves a 64-bit half ahead by `bits`. A 32-bit reflected value in the low half of
// an operand stands for x^32 times itself, and a carry-less product reads as x times too much.
uint64_t fold_constant(uint64_t bits) { return x_to_the(bits - 33); }

__attribute__((target("sse4.2"))) uint32_t by_sse42(uint32_t crc, const void* data, size_t size) {
  const auto* p = static_cast<const uint8_t*>(data);
  uint64_t c = static_cast<uint32_t>(~crc);
  for (; size >= 8; p += 8, size -= 8) {
    uint64_t v;
    std::memcpy(&v, p, 8);
    c = _mm_crc32_u64(c, v);
  }
  for (; size; --size) c = _mm_crc32_u8(static_cast<uint32_t>(c), *p++);
  return ~static_cast<uint32_t>(c);
}

__attribute__((target("avx512f,avx512vl,vpclmulqdq,pclmul,sse4.2"))) uint32_t by_vpclmul(uint32_t crc, const void* data,
                                                                                         size_t size) {
  if (size < 512) return by_sse42(crc, data, size);
  const auto* p = static_cast<const uint8_t*>(data);
  // Four accumulators of 64 bytes: each round folds 256 bytes ahead.
  static const uint64_t k256[2] = {fold_constant(2048 + 64), fold_constant(2048)};
  static const uint64_t k64[2] = {fold_constant(512 + 64), fold_constant(512)};
  static const uint64_t k16[2] = {fold_constant(128 + 64), fold_constant(128)};
  __m512i x[4];
  for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_si512(p + 64 * i);
  x[0] = _mm512_xor_si512(x[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(~crc))));
  p += 256;
  size -= 256;
  const __m512i far =
      _mm512_broadcast_i32x4(_mm_set_epi64x(static_cast<long long>(k256[1]), static_cast<long long>(k256[0])));
  for (; size >= 256; p += 256, size -= 256)
    for (int i = 0; i < 4; ++i) {
      const __m512i lo = _mm512_clmulepi64_epi128(x[i], far, 0x00);
      const __m512i hi = _mm512_clmulepi64_epi128(x[i], far, 0x11);
      x[i] = _mm512_ternarylogic_epi64(lo, hi, _mm512_loadu_si512(p + 64 * i), 0x96);
    }
  const __m512i near =
      _mm512_broadcast_i32x4(_mm_set_epi64x(static_cast<long long>(k64[1]), static_cast<long long>(k64[0])));
  __m512i y = x[0];
  for (int i = 1; i < 4; ++i)
    y = _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(y, near, 0x00), _mm512_clmulepi64_epi128(y, near, 0x11),
                                  x[i], 0x96);
  const __m128i step = _mm_set_epi64x(static_cast<long long>(k16[1]), static_cast<long long>(k16[0]));
  __m128i z = _mm512_extracti32x4_epi32(y, 0);
  const __m128i parts[3] = {_mm512_extracti32x4_epi32(y, 1), _mm512_extracti32x4_epi32(y, 2),
                            _mm512_extracti32x4_epi32(y, 3)};
  for (const auto& part : parts)
    z = _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(z, step, 0x00), _mm_clmulepi64_si128(z, step, 0x11)), part);
  // The last 16 folded bytes and what is left over go through the CRC instruction.
  uint64_t c = _mm_crc32_u64(0, static_cast<uint64_t>(_mm_extract_epi64(z, 0)));
  c = _mm_crc32_u64(c, static_cast<uint64_t>(_mm_extract_epi64(z, 1)));
  return by_sse42(~static_cast<uint32_t>(c), p, size);
}

#elif defined(__aarch64__)

__attribute__((target("+crc"))) uint32_t by_arm(uint32_t crc, const void* data, size_t size) {
  const auto* p = static_cast<const uint8_t*>(data);
  crc = ~crc;
  for (; size >= 8; p += 8, size -= 8) {
    uint64_t v;
    std::memcpy(&v, p, 8);
    crc = __crc32cd(crc, v);
  }
  for (; size; --size) crc = __crc32cb(crc, *p++);
  return ~crc;
}

#endif

std::vector<Crc32cImplementation> available() {
  std::vector<Crc32cImplementation> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl"))
    found.push_back({"vpclmulqdq", by_vpclmul});
  if (__builtin_cpu_supports("sse4.2")) found.push_back({"sse4.2", by_sse42});
#elif defined(__aarch64__)
  if (getauxval(AT_HWCAP) & HWCAP_CRC32) found.push_back({"armv8-crc", by_arm});
#endif
  found.push_back({"table", by_table});
  return found;
}

}  // namespace

const std::vector<Crc32cImplementation>& crc32c_implementations() {
  static const std::vector<Crc32cImplementation> found = available();
  return found;
}

uint32_t crc32c(uint32_t crc, const void* data, size_t size) {
  static auto* const run = crc32c_implementations().front().run;
  return run(crc, data, size);
}

}  // namespace sage_kvt
