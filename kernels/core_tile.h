// SPDX-License-Identifier: Apache-2.0
// Tiles for accelerators whose cores copy rows into their own memory: Ascend, XPU.
//
// The includer defines KV_FN, its language's mark of a device function. Addresses are
// 64-bit integers because pointers of a core are not the host's.
#pragma once

#include "cuda/kv_arithmetic.h"

namespace kv {

enum CoreDtype : int { kFp32 = 0, kFp16 = 1, kBf16 = 2, kFp8E4m3 = 3, kFp8E5m2 = 4, kInt4 = 5 };
enum CoreGranularity : int { kPerChannel = 2, kPerToken = 3, kPerHead = 4 };

// One plane of one layer; strides in elements, channels of a token are neighbours. `pages`
// is the address of a table of page addresses, the first for the page of `first_token`.
// Memory: fp32, fp16, bf16. Wire: fp8 and int4 without zero points (there dim is even).
struct CoreLaunch {
  unsigned long long pages, wire;
  long long first_token, tokens, head_stride, token_stride;
  int page_tokens, group_tokens, first_head, heads, dim;
  int granularity, memory, wire_dtype;
};

struct CoreTile {
  int head, tokens, scale_count;
  long long place;  // first token, counted from the start of the first page
  unsigned long long scales, codes;
  int scale_bytes, row_bytes, codes_bytes;
};

KV_FN int core_padded(int bytes) { return (bytes + 15) / 16 * 16; }

KV_FN int memory_bytes(const CoreLaunch& launch) { return launch.memory == kFp32 ? 4 : 2; }

KV_FN int first_group(const CoreLaunch& launch) {
  const long long room = launch.group_tokens - launch.first_token % launch.group_tokens;
  return int(launch.tokens < room ? launch.tokens : room);
}

KV_FN int core_tiles(const CoreLaunch& launch) {
  const long long rest = launch.tokens - first_group(launch);
  return int(1 + (rest + launch.group_tokens - 1) / launch.group_tokens) * launch.heads;
}

KV_FN int core_scale_count(const CoreLaunch& launch, int tokens) {
  return launch.granularity == kPerChannel ? launch.dim : launch.granularity == kPerToken ? tokens : 1;
}

KV_FN int core_tile_bytes(const CoreLaunch& launch, int tokens, int row_bytes) {
  return core_padded(2 * core_scale_count(launch, tokens)) + core_padded(tokens * row_bytes);
}

KV_FN CoreTile core_tile_at(const CoreLaunch& launch, int index) {
  CoreTile tile;
  const int group = index / launch.heads, first = first_group(launch);
  const long long skipped = group == 0 ? 0 : first + (long long)(group - 1) * launch.group_tokens;
  const long long rest = launch.tokens - skipped;
  tile.head = index - group * launch.heads;
  tile.tokens = group == 0 ? first : int(rest < launch.group_tokens ? rest : launch.group_tokens);
  tile.place = launch.first_token % launch.page_tokens + skipped;
  tile.row_bytes = launch.wire_dtype == kInt4 ? launch.dim / 2 : launch.dim;
  tile.scale_count = core_scale_count(launch, tile.tokens);
  tile.scale_bytes = core_padded(2 * tile.scale_count);
  tile.codes_bytes = core_padded(tile.tokens * tile.row_bytes);
  long long before = 0;
  if (group > 0) {
    before = launch.heads * (core_tile_bytes(launch, first, tile.row_bytes) +
                             (group - 1) * (long long)core_tile_bytes(launch, launch.group_tokens, tile.row_bytes));
  }
  tile.scales = launch.wire + before + (long long)tile.head * core_tile_bytes(launch, tile.tokens, tile.row_bytes);
  tile.codes = tile.scales + tile.scale_bytes;
  return tile;
}

// Which page a token of a tile is in, and how many bytes after that page's start its row lies.
KV_FN int page_of(const CoreLaunch& launch, const CoreTile& tile, int token) {
  return int((tile.place + token) / launch.page_tokens);
}
KV_FN long long row_offset(const CoreLaunch& launch, const CoreTile& tile, int token) {
  const long long slot = (tile.place + token) % launch.page_tokens;
  return ((launch.first_head + tile.head) * launch.head_stride + slot * launch.token_stride) * memory_bytes(launch);
}

// Smallest fp32 that is at least one over the largest code.
KV_FN float reciprocal_up(const CoreLaunch& launch) {
  return float_of(launch.wire_dtype == kInt4 ? 0x3E124925u : launch.wire_dtype == kFp8E4m3 ? 0x3B124925u : 0x37924925u);
}

// -- one element at a time, for cores whose vector unit has no shifts

KV_FN float load_element(int memory, const void* row, int i) {
  if (memory == kFp32) return Fp32::load(static_cast<const uint32_t*>(row)[i]);
  const uint16_t raw = static_cast<const uint16_t*>(row)[i];
  return memory == kFp16 ? Fp16::load(raw) : Bf16::load(raw);
}

KV_FN void store_element(int memory, void* row, int i, float value) {
  if (memory == kFp32) {
    static_cast<uint32_t*>(row)[i] = Fp32::store(value);
  } else {
    static_cast<uint16_t*>(row)[i] = memory == kFp16 ? Fp16::store(value) : Bf16::store(value);
  }
}

// `value` before and `steps` after scaling: a NaN's sign is taken from before.
KV_FN void store_code(int wire_dtype, uint8_t* row, int i, float value, float steps) {
  const bool nan = (bits_of(value) & ~kSign) > kInfinity;
  if (wire_dtype == kInt4) {
    const uint32_t nibble = nibble_of(nan ? value : steps, 1.0f, 0.0f, false);
    row[i / 2] = i % 2 ? uint8_t(row[i / 2] | nibble << 4) : uint8_t(nibble);
  } else {
    row[i] = wire_dtype == kFp8E4m3 ? Fp8E4m3::store(nan ? value : steps) : Fp8E5m2::store(nan ? value : steps);
  }
}

KV_FN float load_code(int wire_dtype, const uint8_t* row, int i) {
  if (wire_dtype == kInt4) return nibble_value(row[i / 2] >> (i % 2 * 4) & 0xFu, false);
  return wire_dtype == kFp8E4m3 ? Fp8E4m3::load(row[i]) : Fp8E5m2::load(row[i]);
}

}  // namespace kv
