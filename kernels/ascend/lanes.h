// SPDX-License-Identifier: Apache-2.0
// Elements in Ascend C: between raw floats or nibbles and fp32, some thousand lanes at a time.
//
// The vector unit of Atlas A2 has neither fp8 nor comparisons of int32, so all is shifts, sums, minima and maxima of
// the bits of fp32. A value NaN keeps its sign in `sign_`, whatever its own bits became.
#pragma once

#define KV_FN __aicore__ inline
#ifdef KV_HOST_SHIM
#include "host_shim.h"
#else
#include "cuda/kv_launch.h"
#include "kernel_operator.h"
#endif

namespace kv {

using namespace AscendC;

// kernels/ascend/group.py refuses heads of more channels. A tile has a scale of each at most, or of each of its tokens,
// of which formats have 1024 at most.
constexpr int kLanes = 2048;
constexpr int kInf = 0x7F800000, kLargestFp32 = 0x7F7FFFFF, kNan = 0x7FC00000;
using Ints = LocalTensor<int32_t>;
using Bytes = LocalTensor<uint8_t>;

// Elements of `bits`. Of floats with fewer than 32: bits after the point, exponent bias, largest code of a finite
// value, code of NaN.
struct Small {
  int bits, mantissa, bias, largest, nan;
};
template <class Element>
struct SmallOf;
template <>
struct SmallOf<Fp32> {
  static constexpr Small kValue{32, 23, 127, kLargestFp32, kNan};
};
template <>
struct SmallOf<Fp16> {
  static constexpr Small kValue{16, 10, 15, 0x7BFF, 0x7E00};
};
template <>
struct SmallOf<Bf16> {
  static constexpr Small kValue{16, 7, 127, 0x7F7F, 0x7FC0};
};
template <>
struct SmallOf<Fp8E4m3> {
  static constexpr Small kValue{8, 3, 7, 0x7E, 0x7F};
};
template <>
struct SmallOf<Fp8E5m2> {
  static constexpr Small kValue{8, 2, 15, 0x7B, 0x7E};
};
template <class Element>
struct SmallOf<CastWire<Element>> : SmallOf<Element> {};
template <class Element, uint32_t kReciprocal>
struct SmallOf<Fp8Wire<Element, kReciprocal>> : SmallOf<Element> {};
template <>
struct SmallOf<Int4Wire> {
  static constexpr Small kValue{4, 0, 0, 0, 0};
};

// The buffers that values go through; `n` is a number of lanes, a multiple of what one repeat of the vector unit takes
// of 16-bit elements.
class Lanes {
 protected:
  __aicore__ inline void InitLanes(TPipe& pipe) {
    for (TBuf<QuePosition::VECCALC>* buffer : {&values_, &magnitude_, &sign_, &nan_, &a_, &b_, &c_}) {
      pipe.InitBuffer(*buffer, kLanes * 4);
    }
  }

  // -- bits of fp32

  // values_ without sign in magnitude_.
  __aicore__ inline void Unsigned(int n) {
    ShiftLeft(magnitude_.Get<uint32_t>(), values_.Get<uint32_t>(), 1u, n);
    ShiftRight(magnitude_.Get<uint32_t>(), magnitude_.Get<uint32_t>(), 1u, n);
  }

  __aicore__ inline void Signs(int n) { ShiftRight(sign_.Get<uint32_t>(), values_.Get<uint32_t>(), 31u, n); }

  // 1 where `from` is above `limit`, else 0.
  __aicore__ inline void Above(Ints to, Ints from, int32_t limit, int n) {
    Adds(to, from, -limit, n);
    Maxs(to, to, 0, n);
    Mins(to, to, 1, n);
  }

  __aicore__ inline void Not(Ints bits, int n) {
    Muls(bits, bits, -1, n);
    Adds(bits, bits, 1, n);
  }

  __aicore__ inline void ShiftRightInts(Ints to, Ints from, uint32_t bits, int n) {
    ShiftRight(to.ReinterpretCast<uint32_t>(), from.ReinterpretCast<uint32_t>(), bits, n);
  }
  __aicore__ inline void ShiftLeftInts(Ints to, Ints from, uint32_t bits, int n) {
    ShiftLeft(to.ReinterpretCast<uint32_t>(), from.ReinterpretCast<uint32_t>(), bits, n);
  }

  // -- elements

  // Raw floats as fp32 in values_, signs in sign_; a_ and nan_ are used.
  template <class Element>
  __aicore__ inline void Widen(Bytes raw, int n) {
    constexpr Small from = SmallOf<Element>::kValue;
    LocalTensor<float> values = values_.Get<float>();
    if constexpr (from.bits == 32) {
      DataCopy(values, raw.ReinterpretCast<float>(), n);
    } else if constexpr (from.bits == 16 && from.bias == 127) {
      Cast(values, raw.ReinterpretCast<bfloat16_t>(), RoundMode::CAST_NONE, n);
    } else if constexpr (from.bits == 16) {
      Cast(values, raw.ReinterpretCast<half>(), RoundMode::CAST_NONE, n);
    } else {
      constexpr int shift = 23 - from.mantissa, normal = 1 << from.mantissa;
      Ints m = magnitude_.Get<int32_t>(), sign = sign_.Get<int32_t>(), nan = nan_.Get<int32_t>();
      Ints a = a_.Get<int32_t>(), bits = values_.Get<int32_t>();
      CodesOf(raw, n);
      ShiftRightInts(sign, m, 7, n);
      ShiftLeftInts(a, sign, 7, n);
      Sub(m, m, a, n);
      Mins(a, m, normal, n);
      Cast(values, a, RoundMode::CAST_NONE, n);
      Muls(values, values, float_of(uint32_t(128 - from.bias - from.mantissa) << 23), n);
      Maxs(a, m, normal, n);
      ShiftLeftInts(a, a, shift, n);
      Adds(a, a, -(1 << 23), n);
      Add(bits, bits, a, n);
      // e4m3: 480 becomes NaN; e5m2: 2**16 becomes infinity, and what is above it NaN.
      Above(nan, m, from.largest, n);
      Muls(nan, nan, from.mantissa == 3 ? kNan - 0x43F00000 : 0x38000000, n);
      Add(bits, bits, nan, n);
      ShiftLeftInts(a, sign, 31, n);
      Add(bits, bits, a, n);
      return;
    }
    Signs(n);
  }

  // Bytes as integers in magnitude_; b_ is used.
  __aicore__ inline void CodesOf(Bytes raw, int count) {
    Cast(b_.Get<half>(), raw, RoundMode::CAST_NONE, count);
    Cast(magnitude_.Get<int32_t>(), b_.Get<half>(), RoundMode::CAST_RINT, count);
  }

  // Magnitudes of fp32 in magnitude_ become codes without sign in place; a_, b_ and c_ are used.
  __aicore__ inline void Narrow(Small to, int n) {
    const int shift = 23 - to.mantissa, least = (128 - to.bias) << 23;
    Ints m = magnitude_.Get<int32_t>(), low = a_.Get<int32_t>(), odd = b_.Get<int32_t>(), even = c_.Get<int32_t>();
    Mins(m, m, (to.largest << shift) + ((127 - to.bias) << 23), n);
    if (to.bias != 127) {
      // What is below the smallest normal, in units of the smallest denormal, rounds in a sum.
      const int magic = (128 - to.bias + shift) << 23;
      Mins(low, m, least, n);
      Adds(a_.Get<float>(), a_.Get<float>(), float_of(uint32_t(magic)), n);
      Adds(low, low, -magic, n);
      Maxs(m, m, least, n);
    }
    ShiftRightInts(odd, m, shift, n);
    ShiftRightInts(even, odd, 1, n);
    ShiftLeftInts(even, even, 1, n);
    Sub(odd, odd, even, n);
    Add(m, m, odd, n);
    Adds(m, m, (1 << (shift - 1)) - 1, n);
    ShiftRightInts(m, m, shift, n);
    if (to.bias != 127) {
      Adds(m, m, -((128 - to.bias) << to.mantissa), n);
      Add(m, m, low, n);
    }
  }

  // magnitude_ and sign_ as raw floats.
  template <class Element>
  __aicore__ inline void Finish(Bytes out, int n) {
    constexpr Small to = SmallOf<Element>::kValue;
    Ints m = magnitude_.Get<int32_t>(), sign = sign_.Get<int32_t>(), nan = nan_.Get<int32_t>();
    Ints infinite = values_.Get<int32_t>(), a = a_.Get<int32_t>();
    Above(nan, m, kInf, n);
    if constexpr (to.bits == 32) {
      Muls(a, m, -1, n);
      Adds(a, a, kNan, n);
      Mul(a, a, nan, n);
      Add(m, m, a, n);
      ShiftLeftInts(sign, sign, 31, n);
      Add(out.ReinterpretCast<int32_t>(), m, sign, n);
    } else if constexpr (to.bits == 16) {
      Above(infinite, m, kLargestFp32, n);
      Narrow(to, n);
      Add(m, m, infinite, n);
      Muls(nan, nan, to.nan - to.largest - 1, n);
      Add(m, m, nan, n);
      Muls(sign, sign, -32768, n);
      Add(m, m, sign, n);
      Cast(out.ReinterpretCast<int16_t>(), m, RoundMode::CAST_NONE, n);
    } else {
      Narrow(to, n);  // infinity saturates
      Muls(nan, nan, to.nan - to.largest, n);
      Add(m, m, nan, n);
      ShiftLeftInts(sign, sign, 7, n);
      Add(m, m, sign, n);
      Cast(a_.Get<int16_t>(), m, RoundMode::CAST_NONE, n);
      ToBytes(out, a_.Get<int16_t>(), n);
    }
  }

  // b_ is used.
  __aicore__ inline void ToBytes(Bytes out, LocalTensor<int16_t> codes, int count) {
    Cast(b_.Get<half>(), codes, RoundMode::CAST_NONE, count);
    Cast(out, b_.Get<half>(), RoundMode::CAST_NONE, count);
  }

  // Of values_; magnitude_ and nan_ are used.
  __aicore__ inline void ZeroNans(int n) {
    Ints bits = values_.Get<int32_t>(), number = nan_.Get<int32_t>();
    Unsigned(n);
    Above(number, magnitude_.Get<int32_t>(), kInf, n);
    Not(number, n);
    Mul(bits, bits, number, n);
  }

  // Codes 0 … 15 of values_ in magnitude_: a sum with 2**23 rounds.
  __aicore__ inline void Steps(int n) {
    LocalTensor<float> values = values_.Get<float>();
    Mins(values, values, 15.0f, n);
    Maxs(values, values, 0.0f, n);
    Adds(magnitude_.Get<float>(), values, 8388608.0f, n);
    Adds(magnitude_.Get<int32_t>(), magnitude_.Get<int32_t>(), -0x4B000000, n);
  }

  // Codes -7 … 7 of magnitude_ and sign_ as nibbles in magnitude_.
  __aicore__ inline void SignedNibbles(int n) {
    Ints m = magnitude_.Get<int32_t>(), sign = sign_.Get<int32_t>(), number = nan_.Get<int32_t>(),
         a = a_.Get<int32_t>();
    Above(number, m, kInf, n);
    Not(number, n);
    Mins(m, m, 0x40E00000, n);  // 7.0
    Adds(magnitude_.Get<float>(), magnitude_.Get<float>(), 8388608.0f, n);
    Adds(m, m, -0x4B000000, n);
    Mul(m, m, number, n);
    Muls(sign, sign, -2, n);
    Adds(sign, sign, 1, n);
    Mul(m, m, sign, n);
    Adds(m, m, 16, n);  // -7 … 7 to 9 … 15, 0 … 7
    ShiftRightInts(a, m, 4, n);
    ShiftLeftInts(a, a, 4, n);
    Sub(m, m, a, n);
  }

  __aicore__ inline void PackNibbles(Bytes out, int n) {
    LocalTensor<int16_t> nibbles = b_.Get<int16_t>(), low = a_.Get<int16_t>(), high = c_.Get<int16_t>();
    Cast(nibbles, magnitude_.Get<int32_t>(), RoundMode::CAST_NONE, n);
    uint64_t count = 0;
    const GatherMaskParams whole{1, uint16_t(n / 128), 8, 0};
    GatherMask(low, nibbles, uint8_t(1), false, 0, whole, count);   // pattern 1: even elements
    GatherMask(high, nibbles, uint8_t(2), false, 0, whole, count);  // pattern 2: odd elements
    Muls(high, high, int16_t(16), n / 2);
    Add(low, low, high, n / 2);
    ToBytes(out, low, n / 2);
  }

  // Nibbles as fp32 in values_, signs in sign_.
  __aicore__ inline void Nibbles(Bytes codes, bool with_sign, int n) {
    Ints m = magnitude_.Get<int32_t>(), a = a_.Get<int32_t>(), b = b_.Get<int32_t>();
    CodesOf(codes, n / 2);
    ShiftRightInts(a, m, 4, n / 2);
    ShiftLeftInts(b, a, 4, n / 2);
    Sub(m, m, b, n / 2);
    ShiftLeftInts(a, a, 16, n / 2);
    Add(m, m, a, n / 2);  // a byte's two nibbles are now two neighbouring int16
    LocalTensor<int16_t> nibbles = magnitude_.Get<int16_t>(), high = a_.Get<int16_t>();
    if (with_sign) {
      ShiftRight(high, nibbles, int16_t(3), n);
      Muls(high, high, int16_t(-16), n);
      Add(nibbles, nibbles, high, n);
    }
    Cast(values_.Get<float>(), nibbles, RoundMode::CAST_NONE, n);
    Signs(n);
  }

  TBuf<QuePosition::VECCALC> values_, magnitude_, sign_, nan_, a_, b_, c_;
};

}  // namespace kv
