// SPDX-License-Identifier: Apache-2.0
// The arithmetic of the wire formats on single elements, for CUDA, HIP and plain C++.
//
// Everything but the conversions named below is integer operations on the bits of fp32,
// so that no device's treatment of denormals, NaN payloads or fused multiply-add shows.
#pragma once

#if defined(__HIPCC__) && !defined(__HIPCC_RTC__)
#include <hip/hip_runtime.h>
#endif

#if defined(__CUDACC__) || defined(__HIPCC__)
#define KV_DEVICE 1
#define KV_FN __device__ __forceinline__
#else
#define KV_DEVICE 0
#ifndef KV_FN
#define KV_FN inline
#endif
#endif

#if !defined(__CUDACC_RTC__)
#include <stdint.h>
#else
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef int int32_t;
typedef long long int64_t;
#endif

// Hopper converts fp8 in hardware; elsewhere, and with KV_PORTABLE_FP8, bits do it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890 && !defined(KV_PORTABLE_FP8)
#define KV_HARDWARE_FP8 1
#else
#define KV_HARDWARE_FP8 0
#endif

namespace kv {

KV_FN uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
#endif
}

KV_FN float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
#endif
}

// Each rounds once to nearest even. HIP and host builds pass -ffp-contract=off for it.
KV_FN float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

KV_FN float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

KV_FN float reciprocal(float value) {
#if defined(__CUDA_ARCH__)
  return __frcp_rn(value);
#else
  return 1.0f / value;
#endif
}

KV_FN uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
KV_FN uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

constexpr uint32_t kSign = 0x80000000u;
constexpr uint32_t kInfinity = 0x7F800000u;
constexpr uint32_t kLargestBf16 = 0x7F7F0000u;
constexpr uint32_t kSmallestScale = 0x0D800000u;  // 2**-100

// -- elements. Raw holds one element's bits; `load` is exact, `store` rounds to nearest
// even, saturates finite values and keeps of a NaN nothing but its sign.

// Floats of fewer bits: kMantissa bits after the point, exponent bias kBias.
template <int kMantissa, int kBias, uint32_t kLargest>
struct SmallFloat {
  static constexpr int kShift = 23 - kMantissa;
  static constexpr uint32_t kSmallestNormal = uint32_t(128 - kBias) << 23;
  // One unit in the last place of this power of two is the smallest denormal.
  static constexpr uint32_t kMagic = uint32_t(128 - kBias + kShift) << 23;
  static constexpr uint32_t kLargestBits = (kLargest << kShift) + (uint32_t(127 - kBias) << 23);

  // Code of a finite magnitude's bits, without sign.
  KV_FN static uint32_t encode(uint32_t magnitude) {
    const uint32_t m = smaller(magnitude, kLargestBits);
    const uint32_t normal =
        (m + ((1u << (kShift - 1)) - 1) + ((m >> kShift) & 1) - (uint32_t(127 - kBias) << 23)) >> kShift;
    const uint32_t denormal = bits_of(add(float_of(m), float_of(kMagic))) - kMagic;
    return m < kSmallestNormal ? denormal : normal;
  }

  // Bits of a finite code's value, without sign.
  KV_FN static uint32_t decode(uint32_t code) {
    const uint32_t shifted = code << kShift;
    const uint32_t denormal = bits_of(add(float_of(shifted | kSmallestNormal), -float_of(kSmallestNormal)));
    return code >> kMantissa ? shifted + (uint32_t(127 - kBias) << 23) : denormal;
  }
};

struct Fp32 {
  using Raw = uint32_t;
  KV_FN static float load(Raw raw) { return float_of(raw); }
  KV_FN static Raw store(float value) {
    const uint32_t bits = bits_of(value);
    return (bits & ~kSign) > kInfinity ? (bits & kSign) | 0x7FC00000u : bits;
  }
};

struct Bf16 {
  using Raw = uint16_t;
  KV_FN static float load(Raw raw) { return float_of(uint32_t(raw) << 16); }
  KV_FN static Raw store(float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & ~kSign;
    const uint32_t m = smaller(magnitude, kLargestBf16);
    uint32_t code = (m + 0x7FFFu + ((m >> 16) & 1)) >> 16;
    if (magnitude >= kInfinity) code = magnitude == kInfinity ? 0x7F80u : 0x7FC0u;
    return Raw(code | (bits >> 16 & 0x8000u));
  }
};

struct Fp16 {
  using Raw = uint16_t;
  using Float = SmallFloat<10, 15, 0x7BFF>;
  KV_FN static float load(Raw raw) {
    const uint32_t sign = uint32_t(raw & 0x8000u) << 16, code = raw & 0x7FFFu;
    const uint32_t special = kInfinity | (code & 0x3FFu) << 13;
    return float_of(sign | (code >= 0x7C00u ? special : Float::decode(code)));
  }
  KV_FN static Raw store(float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & ~kSign;
    uint32_t code = Float::encode(magnitude);
    if (magnitude >= kInfinity) code = magnitude == kInfinity ? 0x7C00u : 0x7E00u;
    return Raw(code | (bits >> 16 & 0x8000u));
  }
};

// Codes of infinity too saturate; e4m3 has none, e5m2's are read but never written.
template <class Float, uint32_t kLargest, uint32_t kNan, bool kE4m3>
struct Fp8 {
  using Raw = uint8_t;
  KV_FN static float load(Raw raw) {
    const uint32_t sign = uint32_t(raw & 0x80u) << 24, code = raw & 0x7Fu;
    uint32_t magnitude = Float::decode(code);
    if (code > kLargest) magnitude = !kE4m3 && code == 0x7C ? kInfinity : 0x7FC00000u;
    return float_of(sign | magnitude);
  }
  KV_FN static Raw store(float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & ~kSign;
#if KV_HARDWARE_FP8
    uint16_t pair;
    if (kE4m3) {
      asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(float_of(magnitude)));
    } else {
      asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(float_of(magnitude)));
    }
    uint32_t code = pair & 0x7Fu;
#else
    uint32_t code = Float::encode(magnitude);
#endif
    if (magnitude > kInfinity) code = kNan;
    return Raw(code | (bits >> 24 & 0x80u));
  }
};

using Fp8E4m3 = Fp8<SmallFloat<3, 7, 0x7E>, 0x7E, 0x7F, true>;
using Fp8E5m2 = Fp8<SmallFloat<2, 15, 0x7B>, 0x7B, 0x7E, false>;

// A NaN keeps its sign, which devices' own multiplication loses.
KV_FN float scaled(float value, float factor) {
  return (bits_of(value) & ~kSign) > kInfinity ? value : multiply(value, factor);
}

// -- scales, as fp32 whose low 16 bits are zero

// Finite magnitude of an element; others do not count.
KV_FN uint32_t finite_magnitude(float value) {
  const uint32_t magnitude = bits_of(value) & ~kSign;
  return magnitude < kInfinity ? magnitude : 0;
}

// Integers ordered as the floats they stand for; its own inverse. -0 becomes the key below +0.
KV_FN int32_t ordered_key(uint32_t bits) {
  const int32_t value = int32_t(bits);
  return value < 0 ? value ^ 0x7FFFFFFF : value;
}

// Of an element with a zero point: its key; zeros, infinities and NaNs have that of +0.
KV_FN int32_t finite_key(float value) {
  const uint32_t magnitude = finite_magnitude(value);
  return ordered_key(magnitude | (magnitude ? bits_of(value) & kSign : 0u));
}

constexpr int32_t kLowestKey = -0x7FFFFFFF - 1, kHighestKey = 0x7FFFFFFF;

KV_FN uint32_t bf16_up(uint32_t positive) { return (positive + 0xFFFFu) & 0xFFFF0000u; }

KV_FN uint32_t clamp_scale(uint32_t bits) { return smaller(larger(bits, kSmallestScale), kLargestBf16); }

// `reciprocal_up` is the smallest fp32 that is at least one over the largest code.
KV_FN uint32_t scale_of(uint32_t magnitude, float reciprocal_up) {
  return clamp_scale(bf16_up(bits_of(multiply(float_of(magnitude), reciprocal_up))));
}

// The largest bf16 at or below a finite value; zero is positive.
KV_FN uint32_t zero_point_of(uint32_t lowest) {
  if (!(lowest & kSign)) return lowest & 0xFFFF0000u;
  if (lowest == kSign) return 0;
  return kSign | smaller((lowest + 0xFFFFu) & 0x7FFF0000u, kLargestBf16);
}

KV_FN uint32_t zero_point_scale(uint32_t zero, uint32_t highest) {
  const float span = add(float_of(highest), -float_of(zero));
  const uint32_t steps = bits_of(multiply(span, float_of(0x3D888889u)));  // 1/15, up
  return clamp_scale(bf16_up(smaller(steps, kLargestBf16)));
}

// -- int4 codes

// A finite float in [0, 15] plus 2**23 has its rounding to nearest even in its low bits.
KV_FN uint32_t rounded(float value) { return bits_of(add(value, 8388608.0f)) & 0xFu; }

KV_FN uint32_t nibble_of(float value, float reciprocal_scale, float zero, bool zero_point) {
  if ((bits_of(value) & ~kSign) > kInfinity) value = 0.0f;
  if (zero_point) {
    const float steps = multiply(add(value, -zero), reciprocal_scale);
    return rounded(steps > 15.0f ? 15.0f : steps > 0.0f ? steps : 0.0f);
  }
  const uint32_t bits = bits_of(multiply(value, reciprocal_scale)), magnitude = bits & ~kSign;
  const uint32_t code = rounded(float_of(smaller(magnitude, 0x40E00000u)));
  return (bits & kSign ? 0u - code : code) & 0xFu;
}

KV_FN float nibble_value(uint32_t nibble, bool zero_point) {
  return zero_point ? float(int32_t(nibble)) : float(int32_t((nibble ^ 8u)) - 8);
}

// -- wire dtypes: how codes are made
template <class Element>
struct CastWire {
  static constexpr int kBits = 8 * int(sizeof(typename Element::Raw));
  static constexpr bool kInt4 = false;
  static constexpr uint32_t kReciprocal = 0;
  using Raw = typename Element::Raw;
  KV_FN static uint32_t encode(float value) { return Element::store(value); }
  KV_FN static float decode(uint32_t code) { return Element::load(Raw(code)); }
};
template <class Element, uint32_t kReciprocalUp>
struct Fp8Wire : CastWire<Element> {
  static constexpr uint32_t kReciprocal = kReciprocalUp;
};
struct Int4Wire {
  static constexpr int kBits = 4;
  static constexpr bool kInt4 = true;
  static constexpr uint32_t kReciprocal = 0x3E124925u;  // 1/7, up
};
using Fp32Wire = CastWire<Fp32>;
using Fp16Wire = CastWire<Fp16>;
using Bf16Wire = CastWire<Bf16>;
using Fp8E4m3Wire = Fp8Wire<Fp8E4m3, 0x3B124925u>;  // 1/448, up
using Fp8E5m2Wire = Fp8Wire<Fp8E5m2, 0x37924925u>;  // 1/57344, up

// Whether values of memory are codes times a scale of the engine.
template <class T>
struct HasScale {
  static constexpr bool kValue = false;
};
template <class F, uint32_t kL, uint32_t kN, bool kE>
struct HasScale<Fp8<F, kL, kN, kE>> {
  static constexpr bool kValue = true;
};

}  // namespace kv
