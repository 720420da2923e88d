// SPDX-License-Identifier: Apache-2.0
// Launches on the host, for emulated devices and tests: each phase of a block runs for all its threads in turn. What is
// called is the kernels' own code.
#pragma once

#include <cstddef>
#include <vector>

#include "../host_functions.h"
#include "kv_convert.cuh"

namespace kv {

template <class Memory, class Wire>
void encode_on_host(const Shape& shape, const Plane& plane, const Tile& tile, int32_t threads) {
  thread_local std::vector<int32_t> shared;
  thread_local std::vector<Encoder<Memory, Wire>> block;
  shared.assign(2 * std::size_t(tile.scale_count) + 1, 0);
  block.resize(std::size_t(threads));
  for (int32_t t = 0; t < threads; ++t) block[t].prepare(shape, tile, shared.data(), t, threads);
  for (int32_t t = 0; t < threads; ++t) block[t].reduce(shape, plane, tile, shared.data(), t, threads);
  for (int32_t t = 0; t < threads; ++t) block[t].scale(shape, tile, shared.data(), t, threads);
  for (int32_t t = 0; t < threads; ++t) block[t].code(shape, plane, tile, shared.data(), t, threads);
}

template <class Memory, class Wire, bool kEncode>
void launch_on_host(const Launch& launch, const unsigned blocks[2], unsigned threads) {
  for (unsigned row = 0; row < blocks[1]; ++row) {
    const Shape shape = shape_at(launch, int32_t(row));
    const Plane plane = plane_at(launch, int32_t(row));
    for (unsigned index = 0; index < blocks[0]; ++index) {
      if (int32_t(index) >= tile_count(shape)) break;
      const Tile tile = tile_at(shape, plane, int32_t(index), Wire::kBits);
      if constexpr (kEncode) {
        encode_on_host<Memory, Wire>(shape, plane, tile, int32_t(threads));
      } else {
        for (unsigned t = 0; t < threads; ++t)
          Decoder<Memory, Wire>::decode(shape, plane, tile, int32_t(t), int32_t(threads));
      }
    }
  }
}

}  // namespace kv
