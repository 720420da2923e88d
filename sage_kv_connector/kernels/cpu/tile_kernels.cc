// SPDX-License-Identifier: Apache-2.0
// Encode and decode of one tile, compiled once for each instruction set (SAGE_KVT_ISA names it).
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

inline size_t padded(size_t bytes) { return (bytes + 15) & ~size_t{15}; }

inline int64_t scale_count(const WireFormat& format, int64_t tokens, int64_t dim) {
  switch (format.granularity) {
    case Granularity::kChannel:
      return dim;
    case Granularity::kToken:
      return tokens;
    case Granularity::kHead:
      return 1;
    default:
      return 0;
  }
}

inline int64_t element_bits(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFp32:
      return 32;
    case Dtype::kFp16:
    case Dtype::kBf16:
      return 16;
    case Dtype::kInt4:
      return 4;
    default:
      return 8;
  }
}

inline Sections sections(const WireFormat& format, int64_t tokens, int64_t dim) {
  const size_t scales = padded(2 * scale_count(format, tokens, dim));
  return {scales, format.zero_point ? scales : 0, padded((tokens * dim * element_bits(format.dtype) + 7) / 8)};
}

// -- scales

// Largest finite magnitude (raw bits) of each of `blocks` neighbouring vectors over a run's rows.
template <typename S, int Blocks>
void fold_magnitudes(const RowRun* runs, int64_t run_count, int64_t from, typename S::Raw* largest) {
  using Raw = typename S::Raw;
  using Signed = std::make_signed_t<Raw>;
  constexpr int L = kWide / sizeof(Raw);
  using V = Lanes<Signed, L>;
  V most[Blocks];
  for (int b = 0; b < Blocks; ++b) most[b] = V{};
  for (int64_t r = 0; r < run_count; ++r) {
    const uint8_t* row = runs[r].base + from * sizeof(Raw);
    for (int64_t t = 0; t < runs[r].count; ++t, row += runs[r].stride) {
#pragma GCC unroll 8
      for (int b = 0; b < Blocks; ++b) {
        V magnitude = load<V>(row + b * kWide) & (V{} + static_cast<Signed>(S::kMagnitude));
        magnitude &= magnitude < (V{} + static_cast<Signed>(S::kFirstSpecial));
        most[b] = magnitude > most[b] ? magnitude : most[b];
      }
    }
  }
  for (int b = 0; b < Blocks; ++b) store(largest + b * L, most[b]);
}

template <typename S>
typename S::Raw magnitude_of(typename S::Raw raw) {
  const uint32_t magnitude = raw & S::kMagnitude;
  return static_cast<typename S::Raw>(magnitude < S::kFirstSpecial ? magnitude : 0);
}

template <typename S>
float value_of(typename S::Raw raw) {
  return S::template widen<1>(U32<1>{raw})[0];
}

template <typename S>
float row_largest(const uint8_t* row, int64_t dim) {
  using Raw = typename S::Raw;
  constexpr int L = kWide / sizeof(Raw);
  Raw lanes[L] = {}, most = 0;
  const RowRun run{const_cast<uint8_t*>(row), 0, 1};
  int64_t d = 0;
  for (; d + L <= dim; d += L) {
    fold_magnitudes<S, 1>(&run, 1, d, lanes);
    for (Raw lane : lanes) most = lane > most ? lane : most;
  }
  for (; d < dim; ++d) {
    const Raw lane = magnitude_of<S>(reinterpret_cast<const Raw*>(row)[d]);
    most = lane > most ? lane : most;
  }
  return value_of<S>(most);
}

template <typename S>
void channel_largest(const RowRun* runs, int64_t run_count, int64_t dim, float* largest) {
  using Raw = typename S::Raw;
  constexpr int L = kWide / sizeof(Raw);
  Raw lanes[4 * L];
  int64_t d = 0;
  const auto widen = [&](int64_t count) {
    for (int64_t i = 0; i < count; ++i) largest[d + i] = value_of<S>(lanes[i]);
    d += count;
  };
  while (d + 4 * L <= dim) fold_magnitudes<S, 4>(runs, run_count, d, lanes), widen(4 * L);
  while (d + L <= dim) fold_magnitudes<S, 1>(runs, run_count, d, lanes), widen(L);
  for (; d < dim; ++d) {
    Raw most = 0;
    for (int64_t r = 0; r < run_count; ++r)
      for (int64_t t = 0; t < runs[r].count; ++t) {
        const Raw lane = magnitude_of<S>(reinterpret_cast<const Raw*>(runs[r].base + t * runs[r].stride)[d]);
        most = lane > most ? lane : most;
      }
    largest[d] = value_of<S>(most);
  }
}

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

inline float finite_or_zero(float value) { return (as_bits(value) & kInfinity) == kInfinity ? 0.0f : value; }

// Zero-point formats: least and largest of each scale's elements, into scratch.zero and scratch.scale.
template <typename S>
void fold_extremes(const RowRun* runs, int64_t run_count, int64_t dim, Granularity granularity, float tensor_scale,
                   int64_t count, const Scratch& scratch) {
  float *least = scratch.zero, *most = scratch.scale;
  for (int64_t i = 0; i < count; ++i) least[i] = as_float(kInfinity), most[i] = -as_float(kInfinity);
  int64_t token = 0;
  for (int64_t r = 0; r < run_count; ++r)
    for (int64_t t = 0; t < runs[r].count; ++t, ++token) {
      const uint8_t* row = runs[r].base + t * runs[r].stride;
      int64_t d = 0;
      if (granularity == Granularity::kChannel) {
        for (; d + kLanes <= dim; d += kLanes) {
          const F32<kLanes> raw = element<S, kLanes>(row, d, tensor_scale);
          const U32<kLanes> finite = (bits<U32<kLanes>>(raw) & kInfinity) != kInfinity;
          const F32<kLanes> value = bits<F32<kLanes>>(bits<U32<kLanes>>(raw) & finite);
          const F32<kLanes> low = load<F32<kLanes>>(least + d), high = load<F32<kLanes>>(most + d);
          store(least + d, value < low ? value : low);
          store(most + d, value > high ? value : high);
        }
      } else {
        F32<kLanes> low = splat_float<kLanes>(as_float(kInfinity)), high = -low;
        for (; d + kLanes <= dim; d += kLanes) {
          const F32<kLanes> raw = element<S, kLanes>(row, d, tensor_scale);
          const U32<kLanes> finite = (bits<U32<kLanes>>(raw) & kInfinity) != kInfinity;
          const F32<kLanes> value = bits<F32<kLanes>>(bits<U32<kLanes>>(raw) & finite);
          low = value < low ? value : low;
          high = value > high ? value : high;
        }
        const int64_t i = granularity == Granularity::kToken ? token : 0;
        for (int lane = 0; lane < kLanes; ++lane) {
          least[i] = low[lane] < least[i] ? low[lane] : least[i];
          most[i] = high[lane] > most[i] ? high[lane] : most[i];
        }
      }
      for (; d < dim; ++d) {
        const int64_t i = granularity == Granularity::kChannel ? d : granularity == Granularity::kToken ? token : 0;
        const float value = finite_or_zero(element<S, 1>(row, d, tensor_scale)[0]);
        least[i] = value < least[i] ? value : least[i];
        most[i] = value > most[i] ? value : most[i];
      }
    }
}

// Fills scratch.scale, .inverse and .zero; returns how many there are.
template <typename S>
int64_t find_scales(const RowRun* runs, int64_t run_count, int64_t tokens, int64_t dim, const WireFormat& format,
                    float tensor_scale, const Scratch& scratch) {
  const int64_t count = scale_count(format, tokens, dim);
  if (format.zero_point) {
    fold_extremes<S>(runs, run_count, dim, format.granularity, tensor_scale, count, scratch);
    for (int64_t i = 0; i < count; ++i) {
      const float zero = bf16_down(scratch.zero[i]) + 0.0f;  // -0 becomes +0
      const float span = (scratch.scale[i] - zero) * kReciprocalLevels;
      scratch.zero[i] = zero;
      scratch.scale[i] = clamped_scale(bf16_up(span < as_float(kScaleMaxBits) ? span : as_float(kScaleMaxBits)));
    }
  } else {
    if (format.granularity == Granularity::kChannel) {
      channel_largest<S>(runs, run_count, dim, scratch.scale);
    } else {
      int64_t token = 0;
      scratch.scale[0] = 0;
      for (int64_t r = 0; r < run_count; ++r)
        for (int64_t t = 0; t < runs[r].count; ++t, ++token) {
          const float largest = row_largest<S>(runs[r].base + t * runs[r].stride, dim);
          if (format.granularity == Granularity::kToken)
            scratch.scale[token] = largest;
          else if (largest > scratch.scale[0])
            scratch.scale[0] = largest;
        }
    }
    const float reciprocal = reciprocal_of(format.dtype);
    for (int64_t i = 0; i < count; ++i) {
      float largest = scratch.scale[i];
      if (sizeof(typename S::Raw) == 1) largest *= tensor_scale;
      scratch.scale[i] = clamped_scale(bf16_up(largest * reciprocal));
    }
  }
  for (int64_t i = 0; i < count; ++i) scratch.inverse[i] = 1.0f / scratch.scale[i];
  return count;
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
template <Granularity G, bool ZeroPoint, int N>
SAGE_KVT_INLINE U32<N> int4_code(F32<N> value, const Scratch& scratch, int64_t token, int64_t d) {
  const U32<N> all = bits<U32<N>>(value);
  value = bits<F32<N>>(select<N>((all & 0x7FFFFFFFu) > splat<N>(kInfinity), splat<N>(0), all));
  if constexpr (ZeroPoint) value -= factor<G, N>(scratch.zero, token, d);
  value *= factor<G, N>(scratch.inverse, token, d);
  value = ZeroPoint ? clamp<N>(value, 0.0f, 15.0f) : clamp<N>(value, -7.0f, 7.0f);
  return bits<U32<N>>(value + splat_float<N>(12582912.0f)) & 15u;
}

template <typename S, Granularity G, bool ZeroPoint>
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
            int4_code<G, ZeroPoint, kLanes>(element<S, kLanes>(row, d, tensor_scale), scratch, token, d));
      for (; d < dim; ++d)
        scratch.code_bytes[d] =
            static_cast<uint8_t>(int4_code<G, ZeroPoint, 1>(element<S, 1>(row, d, tensor_scale), scratch, token, d)[0]);
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

template <typename S, typename W, Granularity G>
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
        store_float<W, kLanes>(out + d, value);
      }
      for (; d < dim; ++d) {
        F32<1> value = element<S, 1>(row, d, tensor_scale);
        if constexpr (G != Granularity::kNone) value *= factor<G, 1>(scratch.inverse, token, d);
        store_float<W, 1>(out + d, value);
      }
    }
}

template <typename S, typename W, Granularity G>
void decode_float(const uint8_t* codes, const RowRun* runs, int64_t run_count, int64_t dim, float inverse_scale,
                  const Scratch& scratch) {
  const auto* in = reinterpret_cast<const typename W::Raw*>(codes);
  int64_t token = 0;
  const auto place = [&]<int N>(uint8_t* row, int64_t d) __attribute__((always_inline)) {
    F32<N> value = load_float<W, N>(in + d);
    if constexpr (G != Granularity::kNone) value *= factor<G, N>(scratch.scale, token, d);
    if (sizeof(typename S::Raw) == 1) value *= splat_float<N>(inverse_scale);
    store_float<S, N>(reinterpret_cast<typename S::Raw*>(row) + d, value);
  };
  for (int64_t r = 0; r < run_count; ++r)
    for (int64_t t = 0; t < runs[r].count; ++t, ++token, in += dim) {
      uint8_t* row = runs[r].base + t * runs[r].stride;
      int64_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) place.template operator()<kLanes>(row, d);
      for (; d < dim; ++d) place.template operator()<1>(row, d);
    }
}

template <typename S, Granularity G, bool ZeroPoint>
void decode_int4(const uint8_t* codes, const RowRun* runs, int64_t run_count, int64_t dim, float inverse_scale,
                 const Scratch& scratch) {
  int64_t token = 0, index = 0;
  const auto place = [&]<int N>(uint8_t* row, int64_t d) __attribute__((always_inline)) {
    I32<N> code = bits<I32<N>>(load_wide<uint8_t, N>(scratch.code_bytes + d));
    if constexpr (!ZeroPoint) code = (code ^ 8) - 8;
    F32<N> value = __builtin_convertvector(code, F32<N>) * factor<G, N>(scratch.scale, token, d);
    if constexpr (ZeroPoint) value += factor<G, N>(scratch.zero, token, d);
    if (sizeof(typename S::Raw) == 1) value *= splat_float<N>(inverse_scale);
    store_float<S, N>(reinterpret_cast<typename S::Raw*>(row) + d, value);
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
    if (format.granularity == Granularity::kTensor) {
      scratch.inverse[0] = 1.0f / wire_scale;
    } else if (format.granularity != Granularity::kNone) {
      const int64_t count = find_scales<S>(runs, run_count, tokens, dim, format, tensor_scale, scratch);
      store_bf16(tile, scratch.scale, count, size.scales);
      if (format.zero_point) store_bf16(tile + size.scales, scratch.zero, count, size.zeros);
    }
    with_granularity(format.granularity, [&]<Granularity G>() {
      switch (format.dtype) {
        case Dtype::kFp32:
          return encode_float<S, Fp32, Granularity::kNone>(runs, run_count, dim, tensor_scale, codes, scratch);
        case Dtype::kFp16:
          return encode_float<S, Fp16, Granularity::kNone>(runs, run_count, dim, tensor_scale, codes, scratch);
        case Dtype::kBf16:
          return encode_float<S, Bf16, Granularity::kNone>(runs, run_count, dim, tensor_scale, codes, scratch);
        case Dtype::kFp8E4M3:
          return encode_float<S, E4M3, G>(runs, run_count, dim, tensor_scale, codes, scratch);
        case Dtype::kFp8E5M2:
          return encode_float<S, E5M2, G>(runs, run_count, dim, tensor_scale, codes, scratch);
        case Dtype::kInt4:
          if (format.zero_point) return encode_int4<S, G, true>(runs, run_count, dim, tensor_scale, codes, scratch);
          return encode_int4<S, G, false>(runs, run_count, dim, tensor_scale, codes, scratch);
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
    if (format.granularity == Granularity::kTensor) {
      scratch.scale[0] = wire_scale;
    } else if (format.granularity != Granularity::kNone) {
      const int64_t count = scale_count(format, tokens, dim);
      load_bf16(tile, scratch.scale, count);
      if (format.zero_point) load_bf16(tile + size.scales, scratch.zero, count);
    }
    with_granularity(format.granularity, [&]<Granularity G>() {
      switch (format.dtype) {
        case Dtype::kFp32:
          return decode_float<S, Fp32, Granularity::kNone>(codes, runs, run_count, dim, inverse_scale, scratch);
        case Dtype::kFp16:
          return decode_float<S, Fp16, Granularity::kNone>(codes, runs, run_count, dim, inverse_scale, scratch);
        case Dtype::kBf16:
          return decode_float<S, Bf16, Granularity::kNone>(codes, runs, run_count, dim, inverse_scale, scratch);
        case Dtype::kFp8E4M3:
          return decode_float<S, E4M3, G>(codes, runs, run_count, dim, inverse_scale, scratch);
        case Dtype::kFp8E5M2:
          return decode_float<S, E5M2, G>(codes, runs, run_count, dim, inverse_scale, scratch);
        case Dtype::kInt4:
          if (format.zero_point) return decode_int4<S, G, true>(codes, runs, run_count, dim, inverse_scale, scratch);
          return decode_int4<S, G, false>(codes, runs, run_count, dim, inverse_scale, scratch);
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
