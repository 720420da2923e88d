// SPDX-License-Identifier: Apache-2.0
// CRC32C, merging of descriptors, cutting of posts, windows and rings, without any peer.
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "crc32c.h"
#include "memory_region.h"
#include "post.h"
#include "shm_ring.h"
#include "window.h"

using namespace sage_kvt;

namespace {

// RFC 3720, appendix B.4, and the check value of the CRC catalogues.
void crc_has_its_known_values() {
  CHECK_EQUAL(crc32c(0, "123456789", 9), 0xE3069283u);
  const std::string zeros(32, '\0'), ones(32, '\xff');
  CHECK_EQUAL(crc32c(0, zeros.data(), 32), 0x8A9136AAu);
  CHECK_EQUAL(crc32c(0, ones.data(), 32), 0x62A8AB43u);
}

void crc_of_parts_is_crc_of_the_whole() {
  std::mt19937 random(1);
  std::vector<uint8_t> data(10000);
  for (auto& b : data) b = static_cast<uint8_t>(random());
  for (int i = 0; i < 200; ++i) {
    const size_t size = random() % data.size(), cut = size ? random() % size : 0;
    CHECK_EQUAL(crc32c(crc32c(0, data.data(), cut), data.data() + cut, size - cut), crc32c(0, data.data(), size));
  }
}

void merged_descriptors_name_the_same_bytes() {
  std::mt19937 random(2);
  for (int round = 0; round < 500; ++round) {
    std::vector<Descriptor> list;
    uint64_t local = 1000, remote = 0;
    for (int i = 0; i < 20; ++i) {
      if (random() % 3 == 0) local += 64;
      if (random() % 3 == 0) remote += 64;
      const uint64_t length = random() % 3 * 8;
      list.push_back({local, remote, length});
      local += length;
      remote += length;
    }
    std::map<uint64_t, uint64_t> before, after;
    for (const auto& d : list)
      for (uint64_t i = 0; i < d.length; ++i) before[d.remote + i] = d.local + i;
    const auto merged = merge_descriptors(list);
    for (size_t k = 0; k < merged.size(); ++k) {
      const auto& d = merged[k];
      CHECK(d.length > 0);
      if (k > 0)
        CHECK(merged[k - 1].local + merged[k - 1].length != d.local ||
              merged[k - 1].remote + merged[k - 1].length != d.remote);
      for (uint64_t i = 0; i < d.length; ++i) after[d.remote + i] = d.local + i;
    }
    CHECK(before == after);
  }
}

void chunks_cover_a_post_once() {
  Post post;
  post.descriptors = {{100, 0, 50}, {300, 50, 70}, {500, 200, 10}};
  uint64_t bytes = 0;
  for (Chunk chunk = post.cut(32, 2); chunk.length > 0; chunk = post.cut(32, 2)) {
    CHECK(chunk.length <= 32 && chunk.pieces.size() <= 2);
    bytes += chunk.length;
  }
  CHECK_EQUAL(bytes, 130u);
  CHECK(post.all_cut());
}

void a_window_takes_each_byte_once() {
  Window window(1, 1, 7, {{4096, 100}, {8192, 100}}, false);
  CHECK(window.reserve(0, 50, 8) == Status::kStaleGeneration);
  CHECK(window.reserve(150, 51, 7) == Status::kOutOfBounds);
  CHECK(window.reserve(~0ull, 2, 7) == Status::kOutOfBounds);
  CHECK(window.reserve(50, 100, 7) == Status::kOk);
  CHECK(window.reserve(149, 1, 7) == Status::kOverlap);
  CHECK(window.reserve(0, 51, 7) == Status::kOverlap);
  CHECK(window.reserve(0, 50, 7) == Status::kOk);
  CHECK(window.reserve(150, 50, 7) == Status::kOk);
  std::vector<iovec> pieces;
  CHECK_EQUAL(window.pieces(90, 20, 8, &pieces), 20u);
  CHECK_EQUAL(pieces.size(), 2u);
  CHECK(pieces[0].iov_base == reinterpret_cast<void*>(4096 + 90) && pieces[0].iov_len == 10);
  CHECK(pieces[1].iov_base == reinterpret_cast<void*>(8192) && pieces[1].iov_len == 10);
  CHECK(!window.land(199));
  CHECK(window.land(1));
}

void memory_is_found_in_one_region_only() {
  MemoryRegions regions;
  const uint64_t first = regions.add(1000, 100);
  regions.add(1100, 100);
  const auto outside = [&](std::vector<Segment> list) {
    return regions.first_outside(
        list, [](const Segment& s) { return s.address; }, [](const Segment& s) { return s.length; });
  };
  CHECK_EQUAL(outside({{1000, 100}, {1150, 50}}), 2u);
  CHECK_EQUAL(outside({{1000, 100}, {1199, 2}}), 1u);
  CHECK_EQUAL(outside({{1050, 100}}), 0u);
  CHECK_EQUAL(outside({{1000, 0}}), 0u);
  CHECK_EQUAL(outside({{1000, ~0ull}}), 0u);
  CHECK(regions.remove(first) && !regions.remove(first));
  CHECK_EQUAL(outside({{1000, 1}}), 0u);
}

void a_ring_survives_hostile_indices() {
  RingIndex index{};
  std::vector<uint8_t> data(kRingBytes);
  RingReader reader(index, data.data());
  std::vector<uint8_t> record;
  CHECK(reader.read(&record) == RingReader::Result::kEmpty);
  index.head = kRingBytes + 8;
  CHECK(reader.read(&record) == RingReader::Result::kBroken);
  index.head = 4;
  CHECK(reader.read(&record) == RingReader::Result::kBroken);
  index.head = 64;
  for (uint32_t size : {0u, 4u, 12u, 72u, ~0u}) {
    std::memcpy(data.data(), &size, sizeof size);
    CHECK(reader.read(&record) == RingReader::Result::kBroken);
  }
  RingWriter writer(index, data.data());
  index.tail = ~0ull;
  CHECK(!writer.write({{"12345678", 8}}));
}

}  // namespace

int main() {
  RUN(crc_has_its_known_values());
  RUN(crc_of_parts_is_crc_of_the_whole());
  RUN(merged_descriptors_name_the_same_bytes());
  RUN(chunks_cover_a_post_once());
  RUN(a_window_takes_each_byte_once());
  RUN(memory_is_found_in_one_region_only());
  RUN(a_ring_survives_hostile_indices());
}
