// SPDX-License-Identifier: Apache-2.0
// The parts below connections, one at a time.
#include <algorithm>
#include <cstring>
#include <map>
#include <random>
#include <thread>

#include "check.h"
#include "crc32c.h"
#include "liveness.h"
#include "pair.h"
#include "shm/arena.h"
#include "shm/ring.h"

using namespace sage_kvt;

namespace {

// Spans never overlap and never leave the arena, in whatever order they are given back.
void arena_spans_are_disjoint() {
  std::mt19937_64 random(1);
  for (uint64_t size : {1000ull, 4096ull}) {
    ShmArena arena(size);
    std::map<uint64_t, uint64_t> taken;  // offset -> end
    std::map<size_t, uint64_t> by_slot;  // slot -> offset
    size_t next_slot = 0, refused = 0;
    for (int step = 0; step < 200000; ++step) {
      if (by_slot.empty() || random() % 2 == 0) {
        const uint64_t length = random() % 5 == 0 ? size / 4 : 1 + random() % (size / 4);
        const size_t slot = next_slot++;
        const auto offset = arena.take(length, slot);
        if (!offset) {
          ++refused;
          CHECK(!by_slot.empty());  // an empty arena always has room
        } else {
          CHECK(*offset + length <= size);
          auto after = taken.lower_bound(*offset);
          CHECK(after == taken.end() || after->first >= *offset + length);
          CHECK(after == taken.begin() || std::prev(after)->second <= *offset);
          if (random() % 8 == 0) {
            arena.undo_take();
          } else {
            taken[*offset] = *offset + length;
            by_slot[slot] = *offset;
          }
        }
      }
      if (!by_slot.empty() && random() % 2 == 0) {
        auto victim = std::next(by_slot.begin(), static_cast<long>(random() % std::min<size_t>(by_slot.size(), 3)));
        arena.free(victim->first);
        taken.erase(victim->second);
        by_slot.erase(victim);
      }
    }
    CHECK(refused > 100);
  }
}

// Records of all sizes through a ring, from one thread to another.
void ring_keeps_records() {
  auto index = std::make_unique<RingIndex>();
  Bytes memory(kRingBytes);
  constexpr int kRecords = 20000;
  std::thread writer([&] {
    RingWriter ring(*index, memory.data());
    std::mt19937 random(3);
    for (int i = 0; i < kRecords; ++i) {
      std::vector<uint8_t> body(random() % 3000, static_cast<uint8_t>(i));
      MessageRecord header{{static_cast<uint32_t>(padded_to_8(sizeof header + body.size())), 1}, body.size()};
      while (!ring.write({{&header, sizeof header}, {body.data(), body.size()}})) std::this_thread::yield();
    }
  });
  RingReader ring(*index, memory.data());
  std::mt19937 random(3);
  std::vector<uint8_t> record;
  for (int i = 0; i < kRecords; ++i) {
    RingReader::Result result;
    while ((result = ring.read(&record)) == RingReader::Result::kEmpty) std::this_thread::yield();
    CHECK(result == RingReader::Result::kRecord);
    MessageRecord header;
    std::memcpy(&header, record.data(), sizeof header);
    CHECK(header.length == random() % 3000);
    CHECK(std::all_of(record.begin() + sizeof header, record.begin() + static_cast<long>(sizeof header + header.length),
                      [i](uint8_t b) { return b == static_cast<uint8_t>(i); }));
  }
  writer.join();
  CHECK(ring.empty());
}

// What a hostile peer may leave in the shared indices and headers is found, not followed.
void ring_survives_a_hostile_peer() {
  Bytes memory(kRingBytes);
  std::vector<uint8_t> record;
  for (uint64_t head : {1ull, 7ull, static_cast<unsigned long long>(kRingBytes) + 1, ~0ull}) {
    RingIndex index{};
    index.head = head;
    RingReader reader(index, memory.data());
    CHECK(reader.read(&record) == RingReader::Result::kBroken);
  }
  for (uint32_t size : {0u, 4u, 9u, 24u, 0xfffffff8u}) {
    RingIndex index{};
    RecordHeader header{size, 1};
    std::memcpy(memory.data(), &header, sizeof header);
    index.head = 16;
    RingReader reader(index, memory.data());
    CHECK(reader.read(&record) == RingReader::Result::kBroken);
  }
  for (uint64_t tail : {1ull, static_cast<unsigned long long>(kRingBytes), ~0ull}) {
    RingIndex index{};
    index.tail = tail;  // beyond what was written
    RingWriter writer(index, memory.data());
    CHECK(!writer.write({{memory.data(), 64}}));
    CHECK(writer.wait_for_room(64));
  }
}

// One answer is for all pings that came before it, and is seen once.
void ring_answers_pings() {
  RingIndex index{};
  RingWriter writer(index, nullptr);
  RingReader reader(index, nullptr);
  CHECK(!reader.pinged() && !writer.answered());
  for (int round = 0; round < 3; ++round) {
    writer.ping();
    writer.ping();
    CHECK(reader.pinged() && !writer.answered());
    reader.answer_ping();
    CHECK(!reader.pinged() && writer.answered() && !writer.answered());
  }
  index.pings = ~0u;  // whatever a peer writes there
  CHECK(reader.pinged());
  reader.answer_ping();
  CHECK(!reader.pinged() && index.answered == ~0u && writer.answered());
}

// Three pings without a sign of life, then silence; looks of one timeout fall together.
void liveness_takes_three_pings() {
  using Verdict = Liveness::Verdict;
  constexpr uint64_t kTimeout = 30000000, kInterval = kTimeout / 3;
  Liveness liveness;
  uint64_t now = 7 * kInterval + 1;
  const auto pings_until_silence = [&] {
    int pings = 0;
    for (Verdict verdict = Verdict::kPing; verdict == Verdict::kPing; pings += verdict == Verdict::kPing) {
      CHECK(liveness.due() > now && liveness.due() % kInterval == 0);
      CHECK(liveness.look(now) == Verdict::kWait);
      now = liveness.due();
      verdict = liveness.look(now);
      CHECK(verdict != Verdict::kWait);
    }
    CHECK(liveness.due() == 0 && liveness.look(now + kTimeout) == Verdict::kWait);  // said once
    return pings;
  };
  CHECK(liveness.due() == 0 && liveness.look(now) == Verdict::kWait);
  liveness.watch(kTimeout, now);
  CHECK(pings_until_silence() == 3);
  for (int signs_after = 1; signs_after <= 3; ++signs_after) {
    liveness.watch(kTimeout, now);
    for (int ping = 0; ping < signs_after; ++ping) CHECK(liveness.look(now = liveness.due()) == Verdict::kPing);
    liveness.heard();
    CHECK(pings_until_silence() == 3);
  }
  liveness.watch(kTimeout, now);
  liveness.unwatch();
  CHECK(liveness.due() == 0 && liveness.look(now + kTimeout) == Verdict::kWait);
  liveness.watch(1, now);  // no time is too short
  CHECK(liveness.due() > now);
}

// A window counts every byte once, against a map of bytes.
void window_counts_bytes_once() {
  std::mt19937 random(5);
  Bytes memory(2000);
  for (int round = 0; round < 200; ++round) {
    const std::vector<Segment> segments{{address_of(memory), 700}, {address_of(memory) + 1000, 500}};
    Window window(1, 1, 9, std::make_unique<SegmentSpace>(segments), false, {});
    CHECK(window.size() == 1200);
    std::vector<bool> taken(1200);
    for (int i = 0; i < 200; ++i) {
      const uint64_t offset = random() % 1300, length = random() % 60;
      const bool inside = length > 0 && offset + length <= 1200;
      bool overlap = false;
      for (uint64_t b = offset; inside && b < offset + length; ++b) overlap |= taken[b];
      CHECK(window.reserve(offset, length, 8) == Status::kStaleGeneration);
      const Status status = window.reserve(offset, length, 9);
      CHECK(status == (!inside ? Status::kOutOfBounds : overlap ? Status::kOverlap : Status::kOk));
      if (status != Status::kOk) continue;
      std::fill(taken.begin() + static_cast<long>(offset), taken.begin() + static_cast<long>(offset + length), true);
      std::vector<iovec> pieces;
      CHECK(window.space().pieces(offset, length, 16, &pieces) == length);
      uint64_t at = offset;
      for (const auto& piece : pieces) {
        CHECK(reinterpret_cast<uint64_t>(piece.iov_base) == address_of(memory) + (at < 700 ? at : at + 300));
        at += piece.iov_len;
      }
    }
  }
}

void crcs_agree() {
  const Bytes data = random_bytes(10000, 6);
  for (const auto& implementation : crc32c_implementations()) {
    CHECK(implementation.run(0, "123456789", 9) == 0xE3069283u);
    for (size_t size = 0; size < 3000; size += 13)
      CHECK(implementation.run(7, data.data() + size % 11, size) ==
            crc32c_implementations().back().run(7, data.data() + size % 11, size));
  }
}

}  // namespace

int main() {
  RUN(arena_spans_are_disjoint);
  RUN(ring_keeps_records);
  RUN(ring_survives_a_hostile_peer);
  RUN(ring_answers_pings);
  RUN(liveness_takes_three_pings);
  RUN(window_counts_bytes_once);
  RUN(crcs_agree);
}
