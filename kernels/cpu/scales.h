// SPDX-License-Identifier: Apache-2.0
// The scales and zero points of a tile, from the largest and the least elements.
#pragma once

#include <limits>

#include "rows.h"

namespace sage_kvt::SAGE_KVT_ISA {
namespace {

constexpr float kScaleMin = 0x1p-100f;
constexpr uint32_t kScaleMaxBits = 0x7F7F0000u;
// Smallest fp32 that is at least 1 / (largest code).
constexpr float kReciprocalE4M3 = 0x1.24924ap-9f;
constexpr float kReciprocalE5M2 = 0x1.24924ap-16f;
constexpr float kReciprocalInt4 = 0x1.24924ap-3f;
constexpr float kReciprocalLevels = 0x1.111112p-4f;
static_assert(double(kReciprocalE4M3) >= 1.0 / 448 && double(kReciprocalE5M2) >= 1.0 / 57344);
static_assert(double(kReciprocalInt4) >= 1.0 / 7 && double(kReciprocalLevels) >= 1.0 / 15);

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

// What the scales say of the values: how many there are, whether every value is finite, and
// whether no scale had to be cut, so that no code can be beyond the largest.
struct Scales {
  int64_t count;
  bool plain, within;
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
  bool within = plain;
  for (int64_t i = 0; i < count; ++i) {
    scratch.inverse[i] = 1.0f / scratch.scale[i];
    within = within && scratch.scale[i] < as_float(kScaleMaxBits);
  }
  return {count, plain, within};
}

}  // namespace
}  // namespace sage_kvt::SAGE_KVT_ISA
