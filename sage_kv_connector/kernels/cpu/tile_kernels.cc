// SPDX-License-Identifier: Apache-2.0
// Encode and decode of one tile, compiled once for each instruction set (SAGE_KVT_ISA names it).
#include <limits>

#include "element.h"
#include "gather.h"
#include "tile.h"

namespace sage_kvt::SAGE_KVT_ISA {
namespace {

#ifndef SAGE_KVT_LANES
#define SAGE_KVT_LANES 16
#endif
constexpr int kLanes = SAGE_KVT_LANES;
constexpr int kWide = 64;  // bytes of an integer vector

// Rows of canonical order: where they lie already, or in scratch.
struct RowRun {
  uint8_t* base;
  int64_t stride, count;
};
constexpr int64_t kMaxRuns = 1024;  // a tile has at most as many tokens

inline bool is_finite(float value) { return (__builtin_bit_cast(uint32_t, value) & kInfinity) != kInfinity; }
inline float as_float(uint32_t value) { return __builtin_bit_cast(float, value); }
inline uint32_t as_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

constexpr float kScaleMin = 0x1p-100f;
constexpr uint32_t kScaleMaxBits = 0x7F7F0000u;
// Smallest fp32 that is at least 1 / (largest code).
constexpr float kReciprocalE4M3 = 0x1.24924ap-9f;
constexpr float kReciprocalE5M2 = 0x1.24924ap-16f;
constexpr float kReciprocalInt4 = 0x1.24924ap-3f;
constexpr float kReciprocalLevels = 0x1.111112p-4f;
static_assert(double(kReciprocalE4M3) >= 1.0 / 448 && double(kReciprocalE5M2) >= 1.0 / 57344);
static_assert(double(kReciprocalInt4) >= 1.0 / 7 && double(kReciprocalLevels) >= 1.0 / 15);

// -- scales

// Raw bits as integers in the order of the values they stand for.
template <typename S, typename V>
SAGE_KVT_INLINE V ordered(V raw) {
  using Signed = std::make_signed_t<typename S::Raw>;
  return raw ^ ((raw < V{}) & (V{} + static_cast<Signed>(S::kMagnitude)));
}

// What each lane of the elements amounts to: the largest magnitude, or the least and the largest element.
template <typename S>
struct Fold {
  using Raw = typename S::Raw;
  using Signed = std::make_signed_t<Raw>;
  static constexpr int kLanesWide = kWide / sizeof(Raw);
  using V = Lanes<Signed, kLanesWide>;

  // `Blocks` neighbouring vectors from element `from` of every row; `least` is only written for Extremes.
  // Not Finite: elements that are no finite number count as zero.
  template <int Blocks, bool Extremes, bool Finite>
  static void fold(const RowRun* runs, int64_t run_count, int64_t from, Signed* most, Signed* least) {
    V high[Blocks], low[Blocks];
    for (int b = 0; b < Blocks; ++b) {
      high[b] = Extremes ? V{} + std::numeric_limits<Signed>::min() : V{};
      low[b] = V{} + std::numeric_limits<Signed>::max();
    }
    const V mask = V{} + static_cast<Signed>(S::kMagnitude), special = V{} + static_cast<Signed>(S::kFirstSpecial);
    for (int64_t r = 0; r < run_count; ++r) {
      const uint8_t* row = runs[r].base + from * sizeof(Raw);
      for (int64_t t = 0; t < runs[r].count; ++t, row += runs[r].stride) {
#pragma GCC unroll 8
        for (int b = 0; b < Blocks; ++b) {
          V raw = load<V>(row + b * kWide);
          if constexpr (!Finite) raw &= (raw & mask) < special;
          const V value = Extremes ? ordered<S, V>(raw) : raw & mask;
          high[b] = value > high[b] ? value : high[b];
          if constexpr (Extremes) low[b] = value < low[b] ? value : low[b];
        }
      }
    }
    for (int b = 0; b < Blocks; ++b) {
      store(most + b * kLanesWide, high[b]);
      if constexpr (Extremes) store(least + b * kLanesWide, low[b]);
    }
  }

  // The largest (or the least) lane, by halves.
  template <bool Largest, int Half = kLanesWide / 2>
  static Signed widest(V lanes) {
    if constexpr (Half == 0) {
      return lanes[0];
    } else {
      V turn{};
      for (int i = 0; i < kLanesWide; ++i) turn[i] = static_cast<Signed>((i + Half) % kLanesWide);
      const V other = __builtin_shuffle(lanes, turn);
      return widest<Largest, Half / 2>(Largest ? (other > lanes ? other : lanes) : (other < lanes ? other : lanes));
    }
  }

  static float value_of(Signed order) {
    const Signed raw = order < 0 ? static_cast<Signed>(order ^ static_cast<Signed>(S::kMagnitude)) : order;
    return S::template widen<1>(U32<1>{static_cast<Raw>(raw)})[0];
  }

  // One element, as a fold of one lane.
  template <bool Extremes, bool Finite>
  static Signed one(const uint8_t* row, int64_t d) {
    Signed raw;
    std::memcpy(&raw, row + d * sizeof(Raw), sizeof raw);
    const auto magnitude = static_cast<Signed>(raw & static_cast<Signed>(S::kMagnitude));
    if (!Finite && magnitude >= static_cast<Signed>(S::kFirstSpecial)) return 0;
    if (!Extremes) return magnitude;
    return raw < 0 ? static_cast<Signed>(raw ^ static_cast<Signed>(S::kMagnitude)) : raw;
  }

  // Each channel over all rows. Returns whether every element was a finite number.
  template <bool Extremes, bool Finite>
  static bool channels(const RowRun* runs, int64_t run_count, int64_t dim, float* most, float* least) {
    Signed high[4 * kLanesWide], low[4 * kLanesWide];
    bool finite = true;
    int64_t d = 0;
    const auto take = [&](int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        most[d + i] = value_of(high[i]);
        finite = finite && is_finite(most[d + i]);
        if (!Extremes) continue;
        least[d + i] = value_of(low[i]);
        finite = finite && is_finite(least[d + i]);
      }
      d += count;
    };
    while (d + 4 * kLanesWide <= dim) fold<4, Extremes, Finite>(runs, run_count, d, high, low), take(4 * kLanesWide);
    while (d + kLanesWide <= dim) fold<1, Extremes, Finite>(runs, run_count, d, high, low), take(kLanesWide);
    while (d < dim) {
      high[0] = Extremes ? std::numeric_limits<Signed>::min() : 0, low[0] = std::numeric_limits<Signed>::max();
      for (int64_t r = 0; r < run_count; ++r)
        for (int64_t t = 0; t < runs[r].count; ++t) {
          const Signed value = one<Extremes, Finite>(runs[r].base + t * runs[r].stride, d);
          high[0] = value > high[0] ? value : high[0];
          low[0] = value < low[0] ? value : low[0];
        }
      take(1);
    }
    return finite;
  }

  // Each row, or all of them, over its channels.
  template <bool Extremes, bool Finite>
  static bool rows(const RowRun* runs, int64_t run_count, int64_t dim, bool together, float* most, float* least) {
    bool finite = true;
    int64_t token = 0;
    Signed all_high = Extremes ? std::numeric_limits<Signed>::min() : 0, all_low = std::numeric_limits<Signed>::max();
    for (int64_t r = 0; r < run_count; ++r)
      for (int64_t t = 0; t < runs[r].count; ++t, ++token) {
        uint8_t* row = runs[r].base + t * runs[r].stride;
        Signed row_high = Extremes ? std::numeric_limits<Signed>::min() : 0,
               row_low = std::numeric_limits<Signed>::max();
        const V mask = V{} + static_cast<Signed>(S::kMagnitude), special = V{} + static_cast<Signed>(S::kFirstSpecial);
        V high = V{} + row_high, low = V{} + row_low;
        int64_t d = 0;
        for (; d + kLanesWide <= dim; d += kLanesWide) {
          V raw = load<V>(row + d * sizeof(Raw));
          if constexpr (!Finite) raw &= (raw & mask) < special;
          const V value = Extremes ? ordered<S, V>(raw) : raw & mask;
          high = value > high ? value : high;
          if constexpr (Extremes) low = value < low ? value : low;
        }
        const Signed wide_high = widest<true>(high);
        row_high = wide_high > row_high ? wide_high : row_high;
        if constexpr (Extremes) {
          const Signed wide_low = widest<false>(low);
          row_low = wide_low < row_low ? wide_low : row_low;
        }
        for (; d < dim; ++d) {
          const Signed value = one<Extremes, Finite>(row, d);
          row_high = value > row_high ? value : row_high;
          row_low = value < row_low ? value : row_low;
        }
        if (!together) {
          most[token] = value_of(row_high);
          finite = finite && is_finite(most[token]);
          if (Extremes) least[token] = value_of(row_low), finite = finite && is_finite(least[token]);
        }
        all_high = row_high > all_high ? row_high : all_high;
        all_low = row_low < all_low ? row_low : all_low;
      }
    if (together) {
      most[0] = value_of(all_high);
      finite = is_finite(most[0]);
      if (Extremes) least[0] = value_of(all_low), finite = finite && is_finite(least[0]);
    }
    return finite;
  }

  // Fills scratch.scale (most) and .zero (least); false: some element is no finite number, those counted as zero.
  template <bool Extremes>
  static bool run(const RowRun* runs, int64_t run_count, int64_t dim, Granularity granularity, const Scratch& scratch) {
    float *most = scratch.scale, *least = scratch.zero;
    if (granularity == Granularity::kChannel) {
      if (channels<Extremes, true>(runs, run_count, dim, most, least)) return true;
      channels<Extremes, false>(runs, run_count, dim, most, least);
      return false;
    }
    const bool together = granularity == Granularity::kHead;
    if (rows<Extremes, true>(runs, run_count, dim, together, most, least)) return true;
    rows<Extremes, false>(runs, run_count, dim, together, most, least);
    return false;
  }
};

inline float bf16_up(float value) { return as_float((as_bits(value) + 0xFFFFu) & 0xFFFF0000u); }

inline float bf16_down(float value) {
  const uint32_t all = as_bits(value);
  const float cut = as_float(all >> 31 ? (all + 0xFFFFu) & 0xFFFF0000u : all & 0xFFFF0000u);
  return cut < -as_float(kScaleMaxBits) ? -as_float(kScaleMaxBits) : cut;
}

inline float reciprocal_of(Dtype dtype) {
  return dtype == Dtype::kFp8E4M3 ? kReciprocalE4M3 : dtype == Dtype::kFp8E5M2 ? kReciprocalE5M2 : kReciprocalInt4;
}

inline float clamped_scale(float scale) {
  const float most = as_float(kScaleMaxBits);
  scale = scale < most ? scale : most;
  return scale > kScaleMin ? scale : kScaleMin;
}

template <typename S, int N>
SAGE_KVT_INLINE F32<N> element(const uint8_t* row, int64_t d, float tensor_scale) {
  F32<N> value = load_float<S, N>(reinterpret_cast<const typename S::Raw*>(row) + d);
  if (sizeof(typename S::Raw) == 1) value *= splat_float<N>(tensor_scale);
  return value;
}

// What the scales say of the values: how many there are, and whether every value is finite.
struct Scales {
  int64_t count;
  bool plain;
};

// Fills scratch.scale, .inverse and .zero.
template <typename S>
Scales find_scales(const RowRun* runs, int64_t run_count, int64_t tokens, int64_t dim, const WireFormat& format,
                   float tensor_scale, const Scratch& scratch) {
  const int64_t count = scale_count(format, tokens, dim);
  bool plain;
  if (format.zero_point) {
    plain = Fold<S>::template run<true>(runs, run_count, dim, format.granularity, scratch);
    for (int64_t i = 0; i < count; ++i) {
      float least = scratch.zero[i], most = scratch.scale[i];
      if (sizeof(typename S::Raw) == 1) least *= tensor_scale, most *= tensor_scale;
      const float zero = bf16_down(least) + 0.0f;  // -0 becomes +0
      const float span = (most - zero) * kReciprocalLevels;
      scratch.zero[i] = zero;
      scratch.scale[i] = clamped_scale(bf16_up(span < as_float(kScaleMaxBits) ? span : as_float(kScaleMaxBits)));
    }
  } else {
    plain = Fold<S>::template run<false>(runs, run_count, dim, format.granularity, scratch);
    const float reciprocal = reciprocal_of(format.dtype);
    for (int64_t i = 0; i < count; ++i) {
      float largest = scratch.scale[i];
      if (sizeof(typename S::Raw) == 1) largest *= tensor_scale;
      scratch.scale[i] = clamped_scale(bf16_up(largest * reciprocal));
    }
  }
  for (int64_t i = 0; i < count; ++i) scratch.inverse[i] = 1.0f / scratch.scale[i];
  return {count, plain};
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

// -- codes

// One of the granularities as a factor of lanes [d, d + N) of token t.
template <Granularity G, int N>
SAGE_KVT_INLINE F32<N> factor(const float* values, int64_t token, int64_t d) {
  if constexpr (G == Granularity::kChannel) return load<F32<N>>(values + d);
  return splat_float<N>(values[G == Granularity::kToken ? token : 0]);
}

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
                 const Scratch& scratch) {
  int64_t token = 0;
  bool half = false;  // an odd number of codes was written: the last byte waits for its high nibble
  for (int64_t r = 0; r < run_count; ++r)
    for (int64_t t = 0; t < runs[r].count; ++t, ++token) {
      const uint8_t* row = runs[r].base + t * runs[r].stride;
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
                  const Scratch& scratch) {
  auto* out = reinterpret_cast<typename W::Raw*>(codes);
  int64_t token = 0;
  for (int64_t r = 0; r < run_count; ++r)
    for (int64_t t = 0; t < runs[r].count; ++t, ++token, out += dim) {
      const uint8_t* row = runs[r].base + t * runs[r].stride;
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

template <typename S, typename W, Granularity G, bool Plain>
void decode_float(const uint8_t* codes, const RowRun* runs, int64_t run_count, int64_t dim, float inverse_scale,
                  const Scratch& scratch) {
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
      int64_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) place.template operator()<kLanes>(row, d);
      for (; d < dim; ++d) place.template operator()<1>(row, d);
    }
}

template <typename S, Granularity G, bool ZeroPoint, bool Plain>
void decode_int4(const uint8_t* codes, const RowRun* runs, int64_t run_count, int64_t dim, float inverse_scale,
                 const Scratch& scratch) {
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

// -- dispatch

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

bool copies(const Memory& memory, const WireFormat& format, float wire_scale) {
  return memory.dtype == format.dtype &&
         (format.granularity == Granularity::kNone ||
          (format.granularity == Granularity::kTensor && memory.tensor_scale == wire_scale));
}

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

template <typename Raw>
int64_t direct_runs(const Memory& memory, const Piece* pieces, int64_t piece_count, RowRun* runs) {
  for (int64_t i = 0; i < piece_count; ++i)
    runs[i] = {pieces[i].head + pieces[i].first * memory.layout.token_inner, memory.layout.token_inner,
               pieces[i].count};
  return piece_count;
}

void encode(const Memory& memory, const Piece* pieces, int64_t piece_count, int64_t dim, const WireFormat& format,
            float wire_scale, uint8_t* tile, const Scratch& scratch) {
  int64_t tokens = 0;
  for (int64_t i = 0; i < piece_count; ++i) tokens += pieces[i].count;
  const Sections size = sections(format, tokens, dim);
  uint8_t* codes = tile + size.scales + size.zeros;
  const size_t code_bytes = (tokens * dim * element_bits(format.dtype) + 7) / 8;
  with_memory(memory.dtype, [&]<typename S>() {
    using Raw = typename S::Raw;
    if (copies(memory, format, wire_scale)) {
      auto* rows = reinterpret_cast<Raw*>(codes);
      for (int64_t i = 0; i < piece_count; rows += pieces[i].count * dim, ++i)
        gather<Raw>(memory.layout, pieces[i], dim, rows);
      return;
    }
    RowRun runs[kMaxRuns];
    int64_t run_count = 1;
    if (is_rows<Raw>(memory.layout)) {
      run_count = direct_runs<Raw>(memory, pieces, piece_count, runs);
    } else {
      auto* rows = reinterpret_cast<Raw*>(scratch.rows);
      for (int64_t i = 0; i < piece_count; rows += pieces[i].count * dim, ++i)
        gather<Raw>(memory.layout, pieces[i], dim, rows);
      runs[0] = {scratch.rows, static_cast<int64_t>(dim * sizeof(Raw)), tokens};
    }
    const float tensor_scale = memory.tensor_scale;
    bool plain = false;
    if (format.granularity == Granularity::kTensor) {
      scratch.inverse[0] = 1.0f / wire_scale;
    } else if (format.granularity != Granularity::kNone) {
      const auto [count, finite] = find_scales<S>(runs, run_count, tokens, dim, format, tensor_scale, scratch);
      plain = finite;
      store_bf16(tile, scratch.scale, count, size.scales);
      if (format.zero_point) store_bf16(tile + size.scales, scratch.zero, count, size.zeros);
    }
    with_granularity(format.granularity, [&]<Granularity G>() {
      switch (format.dtype) {
        case Dtype::kFp32:
          return encode_float<S, Fp32, Granularity::kNone, false>(runs, run_count, dim, tensor_scale, codes, scratch);
        case Dtype::kFp16:
          return encode_float<S, Fp16, Granularity::kNone, false>(runs, run_count, dim, tensor_scale, codes, scratch);
        case Dtype::kBf16:
          return encode_float<S, Bf16, Granularity::kNone, false>(runs, run_count, dim, tensor_scale, codes, scratch);
        case Dtype::kFp8E4M3:
          if (plain) return encode_float<S, E4M3, G, true>(runs, run_count, dim, tensor_scale, codes, scratch);
          return encode_float<S, E4M3, G, false>(runs, run_count, dim, tensor_scale, codes, scratch);
        case Dtype::kFp8E5M2:
          if (plain) return encode_float<S, E5M2, G, true>(runs, run_count, dim, tensor_scale, codes, scratch);
          return encode_float<S, E5M2, G, false>(runs, run_count, dim, tensor_scale, codes, scratch);
        case Dtype::kInt4:
          if (format.zero_point)
            return plain ? encode_int4<S, G, true, true>(runs, run_count, dim, tensor_scale, codes, scratch)
                         : encode_int4<S, G, true, false>(runs, run_count, dim, tensor_scale, codes, scratch);
          return plain ? encode_int4<S, G, false, true>(runs, run_count, dim, tensor_scale, codes, scratch)
                       : encode_int4<S, G, false, false>(runs, run_count, dim, tensor_scale, codes, scratch);
      }
    });
  });
  std::memset(codes + code_bytes, 0, size.codes - code_bytes);
}

void decode(const Memory& memory, const Piece* pieces, int64_t piece_count, int64_t dim, const WireFormat& format,
            float wire_scale, const uint8_t* tile, const Scratch& scratch) {
  int64_t tokens = 0;
  for (int64_t i = 0; i < piece_count; ++i) tokens += pieces[i].count;
  const Sections size = sections(format, tokens, dim);
  const uint8_t* codes = tile + size.scales + size.zeros;
  with_memory(memory.dtype, [&]<typename S>() {
    using Raw = typename S::Raw;
    if (copies(memory, format, wire_scale)) {
      const auto* rows = reinterpret_cast<const Raw*>(codes);
      for (int64_t i = 0; i < piece_count; rows += pieces[i].count * dim, ++i)
        scatter<Raw>(memory.layout, pieces[i], dim, rows);
      return;
    }
    RowRun runs[kMaxRuns];
    int64_t run_count = 1;
    const bool direct = is_rows<Raw>(memory.layout);
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
          return decode_float<S, Fp32, Granularity::kNone, false>(codes, runs, run_count, dim, inverse_scale, scratch);
        case Dtype::kFp16:
          return decode_float<S, Fp16, Granularity::kNone, false>(codes, runs, run_count, dim, inverse_scale, scratch);
        case Dtype::kBf16:
          return decode_float<S, Bf16, Granularity::kNone, false>(codes, runs, run_count, dim, inverse_scale, scratch);
        case Dtype::kFp8E4M3:
          if (plain && finite_codes<E4M3>(codes, tokens * dim))
            return decode_float<S, E4M3, G, true>(codes, runs, run_count, dim, inverse_scale, scratch);
          return decode_float<S, E4M3, G, false>(codes, runs, run_count, dim, inverse_scale, scratch);
        case Dtype::kFp8E5M2:
          if (plain && finite_codes<E5M2>(codes, tokens * dim))
            return decode_float<S, E5M2, G, true>(codes, runs, run_count, dim, inverse_scale, scratch);
          return decode_float<S, E5M2, G, false>(codes, runs, run_count, dim, inverse_scale, scratch);
        case Dtype::kInt4:
          if (format.zero_point)
            return plain ? decode_int4<S, G, true, true>(codes, runs, run_count, dim, inverse_scale, scratch)
                         : decode_int4<S, G, true, false>(codes, runs, run_count, dim, inverse_scale, scratch);
          return plain ? decode_int4<S, G, false, true>(codes, runs, run_count, dim, inverse_scale, scratch)
                       : decode_int4<S, G, false, false>(codes, runs, run_count, dim, inverse_scale, scratch);
      }
    });
    if (!direct) {
      const auto* rows = reinterpret_cast<const Raw*>(scratch.rows);
      for (int64_t i = 0; i < piece_count; rows += pieces[i].count * dim, ++i)
        scatter<Raw>(memory.layout, pieces[i], dim, rows);
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
