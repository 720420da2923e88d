// SPDX-License-Identifier: Apache-2.0
// Tiles by every instruction set over scattered pages, and a pool that converts, cancels and closes.
#include <algorithm>
#include <cstring>
#include <random>

#include "check.h"
#include "conversion_pool.h"

using namespace sage_kvt;

namespace {

constexpr int64_t kPages = 24, kPageTokens = 20, kHeads = 2, kDim = 64;
constexpr int64_t kHeadBytes = kPageTokens * kDim * 2, kPlaneBytes = kHeads * kHeadBytes, kPageBytes = 2 * kPlaneBytes;

struct Cache {
  std::vector<uint8_t> bytes = std::vector<uint8_t>(kPages * kPageBytes);

  void fill(uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> values;
    for (size_t i = 0; i < bytes.size(); i += 2) {
      const auto raw = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, values(random)) >> 16);
      std::memcpy(bytes.data() + i, &raw, 2);
    }
  }

  PagedConverter converter(const WireFormat& format, const TileKernels& kernels) {
    const PageLayout rows{1 << 20, kDim * 2, kDim * 2 << 20, 1 << 20, 2, 2 << 20};
    const PageLayout columns{1 << 20, 2, 2 << 20, 1 << 20, kPageTokens * 2, kPageTokens * 2 << 20};
    std::vector<ConvertedPlane> planes;
    for (int plane = 0; plane < 2; ++plane) {
      ConvertedPlane one;
      one.layout = plane ? rows : columns;
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

const WireFormat kFormats[] = {{Dtype::kFp8E4M3, Granularity::kToken, 64, 0},
                               {Dtype::kFp8E5M2, Granularity::kChannel, 16, 0},
                               {Dtype::kInt4, Granularity::kChannel, 64, 1},
                               {Dtype::kInt4, Granularity::kToken, 24, 0},
                               {Dtype::kBf16, Granularity::kNone, 64, 0}};

void every_instruction_set_writes_the_same_bytes() {
  Cache source;
  source.fill(1);
  const Span span = all_of_it(2);
  for (const auto& format : kFormats) {
    std::vector<uint8_t> wire, pages;
    for (const char* name : {"portable", "avx2", "avx512"}) {
      const TileKernels* kernels = tile_kernels_named(name);
      if (!kernels) continue;
      const auto converter = source.converter(format, *kernels);
      std::vector<uint8_t> here(converter.wire_bytes(span));
      converter.encode(span, here.data());
      Cache target;
      target.converter(format, *kernels).decode(span, here.data());
      if (wire.empty()) wire = here, pages = target.bytes;
      CHECK(wire == here && pages == target.bytes);
    }
  }
}

void a_pool_ends_each_job_once() {
  Cache source, target;
  source.fill(3);
  const auto& kernels = chosen_tile_kernels();
  const auto from = source.converter(kFormats[0], kernels), to = target.converter(kFormats[0], kernels);
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
  const auto from = source.converter(kFormats[2], chosen_tile_kernels());
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
