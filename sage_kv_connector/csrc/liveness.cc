// SPDX-License-Identifier: Apache-2.0
#include "liveness.h"

#include <algorithm>

namespace sage_kvt {
namespace {
constexpr unsigned kPings = 3;
constexpr uint64_t kShortestInterval = 1000000;
}  // namespace

void Liveness::watch(uint64_t timeout_ns, uint64_t now) {
  std::lock_guard lock(mutex_);
  timeout_ = timeout_ns;
  interval_ = std::max(timeout_ns / kPings, kShortestInterval);
  unanswered_ = 0;
  due_ = next_look(now);
}

void Liveness::unwatch() {
  std::lock_guard lock(mutex_);
  due_ = 0;
}

Liveness::Verdict Liveness::look(uint64_t now) {
  std::lock_guard lock(mutex_);
  if (due_ == 0 || now < due_) return Verdict::kWait;
  if (heard_.exchange(false)) unanswered_ = 0;
  if (unanswered_ == kPings) {
    due_ = 0;
    return Verdict::kSilent;
  }
  ++unanswered_;
  due_ = next_look(now);
  return Verdict::kPing;
}

uint64_t Liveness::timeout_ns() const {
  std::lock_guard lock(mutex_);
  return timeout_;
}

}  // namespace sage_kvt
