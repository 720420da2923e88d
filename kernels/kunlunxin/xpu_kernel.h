// SPDX-License-Identifier: Apache-2.0
// Encoding and decoding of tiles in XPU C++: a core takes every (clusters × cores)-th tile.
//
// A core's share of local memory is 8 KiB, so rows pass through it one at a time, twice:
// for the magnitudes and for the codes. Magnitudes and scaling are SIMD instructions on
// 16 floats; codes are made one at a time, in integers. dim is at most 512, and so are the
// tokens of a group with a scale each. Never run on a card; host_shim.h emulates the built-ins.
#pragma once

#ifdef KV_HOST_SHIM
#include "host_shim.h"
#else
#include "xpu/kernel/xtdk.h"
#include "xpu/kernel/xtdk_math.h"
#include "xpu/kernel/xtdk_simd.h"
#endif
#define KV_FN __device__ inline
#include "core_tile.h"

namespace {

constexpr int kMaxCells = 512, kLanes = 16;

// The buffers of one core, in its local memory.
struct CoreBuffers {
  float row[kMaxCells];      // values of a row, and after scaling
  float cells[kMaxCells];    // magnitude, then scale or its reciprocal, of each scale
  uint32_t raw[kMaxCells];   // a row as it lies in memory, or scales as they are sent
  uint8_t codes[kMaxCells];  // a row as it is on the wire
};

__device__ inline __global_ptr__ char* global(unsigned long long address) {
  return reinterpret_cast<__global_ptr__ char*>(address);
}

__device__ inline unsigned long long row_address(const kv::CoreLaunch& launch, const kv::CoreTile& tile, int token) {
  __local__ unsigned long long page[1];
  GM2LM(global(launch.pages + 8 * kv::page_of(launch, tile, token)), page, 8);
  return page[0] + kv::row_offset(launch, tile, token);
}

__device__ inline void load_row(const kv::CoreLaunch& launch, const kv::CoreTile& tile, int token, CoreBuffers* lm,
                                bool only_finite) {
  GM2LM(global(row_address(launch, tile, token)), lm->raw, launch.dim * kv::memory_bytes(launch));
  for (int i = 0; i < (launch.dim + kLanes - 1) / kLanes * kLanes; ++i) {
    const float value = i < launch.dim ? kv::load_element(launch.memory, lm->raw, i) : 0.0f;
    lm->row[i] = only_finite ? kv::float_of(kv::finite_magnitude(value)) : value;
  }
  mfence_lm();
}

__device__ inline void scale_row(const kv::CoreLaunch& launch, int token, CoreBuffers* lm) {
  const float factor = lm->cells[launch.granularity == kv::kPerToken ? token : 0];
  for (int i = 0; i < launch.dim; i += kLanes) {
    float32x16_t values = vload_lm_float32x16(lm->row + i);
    if (launch.granularity == kv::kPerChannel) {
      values = vvmul_float32x16(values, vload_lm_float32x16(lm->cells + i));
    } else {
      values = svmul_float32x16(factor, values);
    }
    vstore_lm_float32x16(lm->row + i, values);
  }
  mfence_lm();
}

// Value before scaling, or a NaN of its sign: the SIMD unit may change a NaN's.
__device__ inline float before(const kv::CoreLaunch& launch, const CoreBuffers* lm, int i) {
  return kv::load_element(launch.memory, lm->raw, i);
}

__device__ inline void encode_tile(const kv::CoreLaunch& launch, const kv::CoreTile& tile, CoreBuffers* lm) {
  for (int i = 0; i < kMaxCells; ++i) lm->cells[i] = 0.0f;
  mfence_lm();
  for (int token = 0; token < tile.tokens; ++token) {
    load_row(launch, tile, token, lm, true);
    if (launch.granularity == kv::kPerChannel) {
      for (int i = 0; i < launch.dim; i += kLanes) {
        const float32x16_t largest = vload_lm_float32x16(lm->cells + i);
        vstore_lm_float32x16(lm->cells + i, vvmax_float32x16(largest, vload_lm_float32x16(lm->row + i)));
      }
      mfence_lm();
      continue;
    }
    float32x16_t largest = vload_lm_float32x16(lm->row);
    for (int i = kLanes; i < launch.dim; i += kLanes) {
      largest = vvmax_float32x16(largest, vload_lm_float32x16(lm->row + i));
    }
    vstore_lm_float32x16(lm->row, largest);
    mfence_lm();
    float* cell = lm->cells + (launch.granularity == kv::kPerToken ? token : 0);
    for (int i = 0; i < kLanes; ++i) *cell = fmax(*cell, lm->row[i]);
  }
  uint16_t* sent = reinterpret_cast<uint16_t*>(lm->raw);
  for (int i = 0; i < tile.scale_bytes / 2; ++i) {
    sent[i] = 0;
    if (i >= tile.scale_count) continue;
    const uint32_t scale = kv::scale_of(kv::bits_of(lm->cells[i]), kv::reciprocal_up(launch));
    sent[i] = uint16_t(scale >> 16);
    lm->cells[i] = kv::reciprocal(kv::float_of(scale));
  }
  mfence_lm();
  LM2GM(sent, global(tile.scales), tile.scale_bytes);
  for (int token = 0; token < tile.tokens; ++token) {
    load_row(launch, tile, token, lm, false);
    scale_row(launch, token, lm);
    for (int i = 0; i < launch.dim; ++i) {
      kv::store_code(launch.wire_dtype, lm->codes, i, before(launch, lm, i), lm->row[i]);
    }
    mfence_lm();
    LM2GM(lm->codes, global(tile.codes + token * tile.row_bytes), tile.row_bytes);
  }
  const int used = tile.tokens * tile.row_bytes;
  if (used < tile.codes_bytes) {
    for (int i = 0; i < tile.codes_bytes - used; ++i) lm->codes[i] = 0;
    mfence_lm();
    LM2GM(lm->codes, global(tile.codes + used), tile.codes_bytes - used);
  }
}

__device__ inline void decode_tile(const kv::CoreLaunch& launch, const kv::CoreTile& tile, CoreBuffers* lm) {
  GM2LM(global(tile.scales), lm->raw, tile.scale_bytes);
  for (int i = 0; i < tile.scale_count; ++i) {
    lm->cells[i] = kv::Bf16::load(reinterpret_cast<const uint16_t*>(lm->raw)[i]);
  }
  for (int token = 0; token < tile.tokens; ++token) {
    GM2LM(global(tile.codes + token * tile.row_bytes), lm->codes, tile.row_bytes);
    for (int i = 0; i < launch.dim; ++i) lm->row[i] = kv::load_code(launch.wire_dtype, lm->codes, i);
    mfence_lm();
    scale_row(launch, token, lm);
    for (int i = 0; i < launch.dim; ++i) {
      const float code = kv::load_code(launch.wire_dtype, lm->codes, i);
      const bool nan = (kv::bits_of(code) & ~kv::kSign) > kv::kInfinity;
      kv::store_element(launch.memory, lm->raw, i, nan ? code : lm->row[i]);
    }
    mfence_lm();
    LM2GM(lm->raw, global(row_address(launch, tile, token)), launch.dim * kv::memory_bytes(launch));
  }
}

}  // namespace
