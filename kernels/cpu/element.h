// SPDX-License-Identifier: Apache-2.0
// Element formats as lane arithmetic: raw bits -> fp32 -> raw bits, N lanes at a time.
//
// One source for every instruction set, each compiled with its own flags in its own namespace
// (SAGE_KVT_ISA). All arithmetic is IEEE fp32; see docs/format.md.
#pragma once

#include "lanes.h"
#include "tile.h"

namespace sage_kvt::SAGE_KVT_ISA {
namespace {

constexpr uint32_t kInfinity = 0x7F800000u;

// A float with `E` exponent and `M` mantissa bits. `Largest`: code of the largest finite value,
// `Nan`: code given to NaN, `Infinite`: whether the code after Largest is infinity.
template <typename RawT, int E, int M, uint32_t LargestCode, uint32_t NanCode, bool HasInfinity, bool KeepInfinity>
struct SmallFloat {
  using Raw = RawT;
  static constexpr uint32_t kBias = (1u << (E - 1)) - 1;
  static constexpr int kShift = 23 - M;
  static constexpr uint32_t kSignShift = 31 - (E + M);
  static constexpr uint32_t kMagnitude = (1u << (E + M)) - 1;
  static constexpr uint32_t kMinNormal = (127 - kBias + 1) << 23;
  static constexpr uint32_t kRebias = (127 - kBias) << M;
  // Adding this puts the ulp of the sum at the step of the denormals.
  static constexpr uint32_t kDenormalMagic = (127 - kBias + 1 + 23 - M) << 23;
  static constexpr uint32_t kLargest = ((LargestCode + kRebias) << kShift);
  // Smallest magnitude code that is no finite number.
  static constexpr uint32_t kFirstSpecial = LargestCode + 1;

  // For codes of finite values; the sign is left out.
  template <int N>
  static SAGE_KVT_INLINE F32<N> widen_magnitude(U32<N> magnitude) {
    const I32<N> tiny = magnitude < splat<N>(1u << M);
    const U32<N> based =
        (magnitude << kShift) + select<N>(tiny, splat<N>((128 - kBias) << 23), splat<N>((127 - kBias) << 23));
    return bits<F32<N>>(based) - bits<F32<N>>(select<N>(tiny, splat<N>(kMinNormal), splat<N>(0)));
  }

  template <int N>
  static SAGE_KVT_INLINE F32<N> widen_finite(U32<N> raw) {
    const U32<N> value = bits<U32<N>>(widen_magnitude<N>(raw & kMagnitude));
    return bits<F32<N>>(value | ((raw << kSignShift) & 0x80000000u));
  }

  template <int N>
  static SAGE_KVT_INLINE F32<N> widen(U32<N> raw) {
    const U32<N> magnitude = raw & kMagnitude;
    const F32<N> value = widen_magnitude<N>(magnitude);
    U32<N> out = bits<U32<N>>(value);
    if constexpr (HasInfinity) {
      const U32<N> special =
          select<N>(magnitude == splat<N>(kFirstSpecial), splat<N>(kInfinity), splat<N>(0x7FC00000u));
      out = select<N>(magnitude >= splat<N>(kFirstSpecial), special, out);
    } else {
      out = select<N>(magnitude >= splat<N>(kFirstSpecial), splat<N>(0x7FC00000u), out);
    }
    return bits<F32<N>>(out | ((raw << kSignShift) & 0x80000000u));
  }

  // For values that are finite and no larger than the largest code, but for rounding.
  template <int N>
  static SAGE_KVT_INLINE U32<N> narrow_plain(F32<N> value) {
    const U32<N> all = bits<U32<N>>(value);
    const U32<N> magnitude = all & 0x7FFFFFFFu;
    const U32<N> normal =
        ((magnitude + (((1u << (kShift - 1)) - 1) - (kRebias << kShift)) + ((magnitude >> kShift) & 1u)) >> kShift);
    const F32<N> magic = bits<F32<N>>(splat<N>(kDenormalMagic));
    const U32<N> denormal = bits<U32<N>>(bits<F32<N>>(magnitude) + magic) - kDenormalMagic;
    const U32<N> code = select<N>(magnitude < splat<N>(kMinNormal), denormal, normal);
    return code | ((all >> kSignShift) & (1u << (E + M)));
  }

  template <int N>
  static SAGE_KVT_INLINE U32<N> narrow(F32<N> value) {
    const U32<N> all = bits<U32<N>>(value);
    const U32<N> magnitude = all & 0x7FFFFFFFu;
    const U32<N> clamped = select<N>(magnitude < splat<N>(kLargest), magnitude, splat<N>(kLargest));
    const U32<N> normal = ((clamped + ((1u << (kShift - 1)) - 1) + ((clamped >> kShift) & 1u)) >> kShift) - kRebias;
    const F32<N> magic = bits<F32<N>>(splat<N>(kDenormalMagic));
    const U32<N> denormal = bits<U32<N>>(bits<F32<N>>(clamped) + magic) - kDenormalMagic;
    U32<N> code = select<N>(clamped < splat<N>(kMinNormal), denormal, normal);
    if constexpr (KeepInfinity) code = select<N>(magnitude == splat<N>(kInfinity), splat<N>(kFirstSpecial), code);
    code = select<N>(magnitude > splat<N>(kInfinity), splat<N>(NanCode), code);
    return code | ((all >> kSignShift) & (1u << (E + M)));
  }
};

using E4M3 = SmallFloat<uint8_t, 4, 3, 0x7E, 0x7F, false, false>;
using E5M2 = SmallFloat<uint8_t, 5, 2, 0x7B, 0x7E, true, false>;
using Fp16 = SmallFloat<uint16_t, 5, 10, 0x7BFF, 0x7E00, true, true>;

struct Bf16 {
  using Raw = uint16_t;
  static constexpr uint32_t kMagnitude = 0x7FFF;
  static constexpr uint32_t kFirstSpecial = 0x7F80;
  template <int N>
  static SAGE_KVT_INLINE F32<N> widen(U32<N> raw) {
    return bits<F32<N>>(raw << 16);
  }
  // For values that are finite and stay so when rounded.
  template <int N>
  static SAGE_KVT_INLINE U32<N> narrow_plain(F32<N> value) {
    const U32<N> all = bits<U32<N>>(value);
    return (all + 0x7FFFu + ((all >> 16) & 1u)) >> 16;
  }
  template <int N>
  static SAGE_KVT_INLINE U32<N> narrow(F32<N> value) {
    const U32<N> all = bits<U32<N>>(value);
    const U32<N> magnitude = all & 0x7FFFFFFFu;
    const U32<N> rounded = (magnitude + 0x7FFFu + ((magnitude >> 16) & 1u)) >> 16;
    U32<N> code = select<N>(rounded < splat<N>(0x7F7F), rounded, splat<N>(0x7F7F));
    const U32<N> special = select<N>(magnitude == splat<N>(kInfinity), splat<N>(0x7F80), splat<N>(0x7FC0));
    code = select<N>(magnitude >= splat<N>(kInfinity), special, code);
    return code | ((all >> 16) & 0x8000u);
  }
};

struct Fp32 {
  using Raw = uint32_t;
  static constexpr uint32_t kMagnitude = 0x7FFFFFFFu;
  static constexpr uint32_t kFirstSpecial = kInfinity;
  template <int N>
  static SAGE_KVT_INLINE F32<N> widen(U32<N> raw) {
    return bits<F32<N>>(raw);
  }
  template <int N>
  static SAGE_KVT_INLINE U32<N> narrow_plain(F32<N> value) {
    return bits<U32<N>>(value);
  }
  template <int N>
  static SAGE_KVT_INLINE U32<N> narrow(F32<N> value) {
    const U32<N> all = bits<U32<N>>(value);
    return select<N>((all & 0x7FFFFFFFu) > splat<N>(kInfinity), (all & 0x80000000u) | 0x7FC00000u, all);
  }
};

template <typename Format, int N>
SAGE_KVT_INLINE F32<N> load_float(const typename Format::Raw* from) {
  return Format::template widen<N>(load_wide<typename Format::Raw, N>(from));
}

template <typename Format, int N>
SAGE_KVT_INLINE F32<N> load_finite(const typename Format::Raw* from) {
  const U32<N> raw = load_wide<typename Format::Raw, N>(from);
  if constexpr (sizeof(typename Format::Raw) == 1)
    return Format::template widen_finite<N>(raw);
  else
    return Format::template widen<N>(raw);
}

template <typename Format, bool Plain, int N>
SAGE_KVT_INLINE void store_float(typename Format::Raw* to, F32<N> value) {
  if constexpr (Plain)
    store_narrow<typename Format::Raw, N>(to, Format::template narrow_plain<N>(value));
  else
    store_narrow<typename Format::Raw, N>(to, Format::template narrow<N>(value));
}

}  // namespace
}  // namespace sage_kvt::SAGE_KVT_ISA
