// SPDX-License-Identifier: Apache-2.0
// Tiles by every instruction set over scattered pages, and a pool that converts, cancels and closes.
#include <algorithm>
#include <cstring>
#include <random>

#include "check.h"
#include "conversion/pool.h"

using namespace sage_kvt;

namespace {

constexpr int64_t kPages = 24, kPageTokens = 20, kHeads = 2, kDim = 64;
constexpr int64_t kHeadBytes = kPageTokens * kDim * 2, kPlaneBytes = kHeads * kHeadBytes, kPageBytes = 2 * kPlaneBytes;

struct Cache {
  std::vector<uint8_t> bytes = std::vector<uint8_t>(kPages * kPageBytes);

  // Finite bf16 of magnitudes 2^-12 to 2^3, the same on every machine.
  void fill(uint32_t seed) {
    std::mt19937 random(seed);
    for (size_t i = 0; i < bytes.size(); i += 2) {
      const uint32_t drawn = random();
      const auto raw = static_cast<uint16_t>((drawn & 0x807F) | ((115 + (drawn >> 16) % 16) << 7));
      std::memcpy(bytes.data() + i, &raw, 2);
    }
  }

  PagedConverter converter(const WireFormat& format, const TileKernels& kernels) {
    const ElementOrder rows{1 << 20, kDim * 2, kDim * 2 << 20, 1 << 20, 2, 2 << 20};
    const ElementOrder columns{1 << 20, 2, 2 << 20, 1 << 20, kPageTokens * 2, kPageTokens * 2 << 20};
    std::vector<ConvertedPlane> planes;
    for (int plane = 0; plane < 2; ++plane) {
      ConvertedPlane one;
      one.order = plane ? rows : columns;
      one.head_stride = kHeadBytes, one.page_stride = kPageBytes, one.dim = kDim, one.format = format;
      one.bases = {reinterpret_cast<uint64_t>(bytes.data()) + plane * kPlaneBytes};
      one.memory_scales = one.wire_scales = {1.0f};
      planes.push_back(one);
    }
    return PagedConverter(Dtype::kBf16, kPageTokens, kPages, kHeads, std::move(planes), kernels);
  }
};

Span all_of_it(uint32_t seed) {
  Span span{0, 1, 0, kHeads, 3, (kPages - 1) * kPageTokens, {}};
  for (int64_t page = 0; page < kPages; ++page) span.pages.push_back(page);
  std::shuffle(span.pages.begin(), span.pages.end(), std::mt19937(seed));
  return span;
}

struct Golden {
  WireFormat format;
  uint64_t wire, pages;  // FNV-1a of what the reference's equal on x86-64 wrote
};
const Golden kGolden[] = {{{Dtype::kFp8E4M3, Granularity::kToken, 64, 0}, 0x6a12f45c4cc625fd, 0xbfe9cd266896140d},
                          {{Dtype::kFp8E5M2, Granularity::kChannel, 16, 0}, 0x71b460fe0932306, 0x8ae2a93014a41875},
                          {{Dtype::kInt4, Granularity::kChannel, 64, 1}, 0xe2916a88779ce005, 0x58f4bd8f333dc61},
                          {{Dtype::kInt4, Granularity::kToken, 24, 0}, 0x7abecfb80816b83e, 0xece2f818a404427},
                          {{Dtype::kBf16, Granularity::kNone, 64, 0}, 0xb708b47e3d64d065, 0xd2692725d7120079}};

uint64_t fnv(const std::vector<uint8_t>& bytes) {
  uint64_t hash = 0xCBF29CE484222325u;
  for (const uint8_t byte : bytes) hash = (hash ^ byte) * 0x100000001B3u;
  return hash;
}

void every_instruction_set_writes_the_same_bytes() {
  Cache source;
  source.fill(1);
  Span span{0, 1, 0, kHeads, 3, (kPages - 1) * kPageTokens, {}};
  for (int64_t page = 0; page < kPages; ++page) span.pages.push_back(page * 7 % kPages);
  for (const auto& golden : kGolden)
    for (const char* name : {"portable", "avx2", "avx512"}) {
      const TileKernels* kernels = tile_kernels_named(name);
      if (!kernels) continue;
      const auto converter = source.converter(golden.format, *kernels);
      std::vector<uint8_t> wire(converter.wire_bytes(span));
      converter.encode(span, wire.data());
      Cache target;
      target.converter(golden.format, *kernels).decode(span, wire.data());
      if (fnv(wire) != golden.wire || fnv(target.bytes) != golden.pages)
        std::fprintf(stderr, "\n%s, dtype %d: wire 0x%llx, pages 0x%llx\n", name, static_cast<int>(golden.format.dtype),
                     static_cast<unsigned long long>(fnv(wire)), static_cast<unsigned long long>(fnv(target.bytes)));
      CHECK(fnv(wire) == golden.wire && fnv(target.bytes) == golden.pages);
    }
}

void a_pool_ends_each_job_once() {
  Cache source, target;
  source.fill(3);
  const auto& kernels = chosen_tile_kernels();
  const auto from = source.converter(kGolden[0].format, kernels), to = target.converter(kGolden[0].format, kernels);
  const Span span = all_of_it(4);
  const size_t length = from.wire_bytes(span);
  constexpr int kJobs = 40;
  std::vector<std::vector<uint8_t>> wires(kJobs, std::vector<uint8_t>(length));
  ConversionPool pool(2);
  std::vector<uint64_t> jobs;
  for (auto& wire : wires) {
    jobs.push_back(pool.encode(&from, span, reinterpret_cast<uint64_t>(wire.data()), length));
    if (jobs.size() % 4 == 0) pool.cancel(jobs[jobs.size() - 2]);
  }
  int ended = 0, done = 0;
  while (ended < kJobs) {
    pool.completions().wait(~uint64_t{0});
    for (const Event& event : pool.completions().take(64)) {
      CHECK(event.kind == EventKind::kConverted);
      CHECK(event.status == Status::kOk || event.status == Status::kCancelled);
      ++ended, done += event.status == Status::kOk;
    }
  }
  CHECK(done >= kJobs - kJobs / 4);
  const uint64_t last = pool.decode(&to, span, reinterpret_cast<uint64_t>(wires.back().data()), length);
  pool.cancel(last);  // whether it ran or not: the memory is ours again
  std::memset(wires.back().data(), 0, length);
}

void a_closed_pool_leaves_memory_alone() {
  Cache source;
  source.fill(5);
  const auto from = source.converter(kGolden[2].format, chosen_tile_kernels());
  const Span span = all_of_it(6);
  const size_t length = from.wire_bytes(span);
  std::vector<std::vector<uint8_t>> wires(8, std::vector<uint8_t>(length));
  ConversionPool pool(2);
  for (auto& wire : wires) pool.encode(&from, span, reinterpret_cast<uint64_t>(wire.data()), length);
  pool.close();
  wires.clear();
}

}  // namespace

int main() {
  RUN(every_instruction_set_writes_the_same_bytes);
  RUN(a_pool_ends_each_job_once);
  RUN(a_closed_pool_leaves_memory_alone);
}
