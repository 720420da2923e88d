// SPDX-License-Identifier: Apache-2.0
// Tiles for Ascend's cores, which copy rows into their own memory.
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

}  // namespace kv
