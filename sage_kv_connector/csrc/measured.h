// SPDX-License-Identifier: Apache-2.0
// What lanes count as bytes move: totals, working times, and how long small posts took.
//
// Memory model: fixed in size; every number is an atomic of its own, changed by whoever moves the bytes and read by
// anybody at any time. Sums of one moment may differ by what moves at that moment. Clocks are read once a system call
// or chunk, never once a page, and not at all where the endpoint does not measure.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cstdint>

#include "event.h"

namespace sage_kvt {

using Count = std::atomic<uint64_t>;

// Times by powers of two: bucket k counts what took at most 2^k microseconds, the last what took longer, too.
class Histogram {
 public:
  static constexpr size_t kBuckets = 28;

  void add(uint64_t ns) {
    const size_t bucket = bucket_of(ns);
    counts_[bucket].fetch_add(1, std::memory_order_relaxed);
    sums_ns_[bucket].fetch_add(ns, std::memory_order_relaxed);
  }
  static size_t bucket_of(uint64_t ns) {
    const uint64_t us = (ns + 999) / 1000;
    const auto bucket = static_cast<size_t>(us <= 1 ? 0 : std::bit_width(us - 1));
    return bucket < kBuckets ? bucket : kBuckets - 1;
  }
  uint64_t count(size_t bucket) const { return counts_[bucket].load(std::memory_order_relaxed); }
  uint64_t sum_ns(size_t bucket) const { return sums_ns_[bucket].load(std::memory_order_relaxed); }

 private:
  std::array<Count, kBuckets> counts_{}, sums_ns_{};
};

// Adds the time of its own life to a total.
class Stopwatch {
 public:
  Stopwatch(bool measures, Count& total) : total_(total), since_(measures ? now_ns() : 0) {}
  ~Stopwatch() {
    if (since_ > 0) total_.fetch_add(now_ns() - since_, std::memory_order_relaxed);
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  Count& total_;
  const uint64_t since_;
};

// Of an endpoint. Times are sums over its lanes, in nanoseconds: `send`: in calls that hand bytes to the kernel or to
// an arena; `place`: in calls that put them where they belong; `verify`: in checksums and tags.
struct Counters {
  Count bytes_sent{0}, bytes_landed{0}, chunks_sent{0}, chunks_landed{0}, checksum_failures{0}, stale_chunks{0},
      refused_chunks{0}, stalls{0}, messages_sent{0}, messages_received{0}, forged_frames{0}, refused_connections{0};
  Count send_ns{0}, place_ns{0}, verify_ns{0};
  Histogram small_posts;  // from being queued to their end
};

// Bytes of one connection.
struct Traffic {
  Count sent{0}, landed{0};
};

}  // namespace sage_kvt
