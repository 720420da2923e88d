// SPDX-License-Identifier: Apache-2.0
// Whether a connection's peer still lives, asked only while somebody wants to know.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

namespace sage_kvt {

// Times are now_ns(). Looks fall on multiples of a third of the timeout, so that many connections share a wake-up.
class Liveness {
 public:
  enum class Verdict { kWait, kPing, kSilent };

  // From now on; a peer is silent once `timeout_ns` passed after a ping without a sign of life.
  void watch(uint64_t timeout_ns, uint64_t now);
  void unwatch();
  // The peer showed itself, by whatever bytes.
  void heard() {
    if (!heard_.load(std::memory_order_relaxed)) heard_.store(true, std::memory_order_relaxed);
  }
  // When to look, 0: nobody wants to know.
  uint64_t due() const { return due_; }
  // What is to be done now. Silence is said once; then nobody wants to know any more.
  Verdict look(uint64_t now);
  uint64_t timeout_ns() const;

 private:
  uint64_t next_look(uint64_t now) const { return (now / interval_ + 1) * interval_; }

  mutable std::mutex mutex_;
  std::atomic<uint64_t> due_{0};
  std::atomic<bool> heard_{false};
  uint64_t timeout_ = 0, interval_ = 0;
  unsigned unanswered_ = 0;
};

}  // namespace sage_kvt
