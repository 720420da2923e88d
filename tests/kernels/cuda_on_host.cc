// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels' own code as plain C++: each phase runs for all threads of a block in turn.
#include <string.h>

#include <vector>

#include "kv_convert.cuh"

namespace {

template <class Memory, class Wire>
void encode(const kv::Plane& plane, const kv::Shape& shape, int tiles, int threads) {
  for (int index = 0; index < tiles; ++index) {
    const kv::Tile tile = kv::tile_at(shape, plane, index, Wire::kBits);
    std::vector<int32_t> shared(2 * tile.scale_count + 1);
    std::vector<kv::Encoder<Memory, Wire>> block(threads);
    for (int t = 0; t < threads; ++t) block[t].prepare(shape, tile, shared.data(), t, threads);
    for (int t = 0; t < threads; ++t) block[t].reduce(shape, plane, tile, shared.data(), t, threads);
    for (int t = 0; t < threads; ++t) block[t].scale(shape, tile, shared.data(), t, threads);
    for (int t = 0; t < threads; ++t) block[t].code(shape, plane, tile, shared.data(), t, threads);
  }
}

template <class Memory, class Wire>
void run(bool decode, const kv::Plane& plane, const kv::Shape& shape, int tiles, int threads) {
  if (!decode) return encode<Memory, Wire>(plane, shape, tiles, threads);
  for (int index = 0; index < tiles; ++index) {
    const kv::Tile tile = kv::tile_at(shape, plane, index, Wire::kBits);
    for (int t = 0; t < threads; ++t) kv::Decoder<Memory, Wire>::decode(shape, plane, tile, t, threads);
  }
}

template <class Wire>
int run_memory(const char* memory, bool decode, const kv::Plane& plane, const kv::Shape& shape, int tiles,
               int threads) {
  if (!strcmp(memory, "fp32")) return run<kv::Fp32, Wire>(decode, plane, shape, tiles, threads), 0;
  if (!strcmp(memory, "fp16")) return run<kv::Fp16, Wire>(decode, plane, shape, tiles, threads), 0;
  if (!strcmp(memory, "bf16")) return run<kv::Bf16, Wire>(decode, plane, shape, tiles, threads), 0;
  if (!strcmp(memory, "fp8_e4m3")) return run<kv::Fp8E4m3, Wire>(decode, plane, shape, tiles, threads), 0;
  if (!strcmp(memory, "fp8_e5m2")) return run<kv::Fp8E5m2, Wire>(decode, plane, shape, tiles, threads), 0;
  return -1;
}

}  // namespace

extern "C" int kv_launch(const char* memory, const char* wire, int decode, const kv::Plane* plane,
                         const kv::Shape* shape, int tiles, int threads) {
  if (!strcmp(wire, "fp32")) return run_memory<kv::Fp32Wire>(memory, decode, *plane, *shape, tiles, threads);
  if (!strcmp(wire, "fp16")) return run_memory<kv::Fp16Wire>(memory, decode, *plane, *shape, tiles, threads);
  if (!strcmp(wire, "bf16")) return run_memory<kv::Bf16Wire>(memory, decode, *plane, *shape, tiles, threads);
  if (!strcmp(wire, "fp8_e4m3")) return run_memory<kv::Fp8E4m3Wire>(memory, decode, *plane, *shape, tiles, threads);
  if (!strcmp(wire, "fp8_e5m2")) return run_memory<kv::Fp8E5m2Wire>(memory, decode, *plane, *shape, tiles, threads);
  if (!strcmp(wire, "int4")) return run_memory<kv::Int4Wire>(memory, decode, *plane, *shape, tiles, threads);
  return -1;
}
