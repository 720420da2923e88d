// SPDX-License-Identifier: Apache-2.0
// How a thread gets an endpoint's events: it takes them, or waits, and drives the lanes meanwhile.
#include <algorithm>
#include <limits>

#include "endpoint.h"

namespace sage_kvt {
namespace {
// With more channels than this a waiting thread leaves them to their lanes.
constexpr size_t kMaxDrivenByWaiter = 4;
// A waiter whose events keep coming just after it slept spins up to this many times longer.
constexpr uint64_t kMostSpins = 4;

bool fills_inbox(const Event& event) { return event.kind == EventKind::kMessage || event.kind == EventKind::kLanded; }
}  // namespace

std::vector<Event> Endpoint::poll(size_t max_events) {
  auto events = completions_.take(max_events);
  for (const auto& event : events) {
    if (!fills_inbox(event)) continue;
    auto connection = find_connection(event.connection);
    if (!connection) continue;
    const bool was_full = connection->inbox_full();
    connection->inbox_bytes -= kEventBytes + event.payload.size();
    if (!was_full || connection->inbox_full()) continue;
    connection->kick();
  }
  return events;
}

std::vector<std::shared_ptr<Channel>> Endpoint::all_channels() {
  std::vector<std::shared_ptr<Channel>> all;
  for (const auto& lane : lanes_)
    for (auto& channel : lane->channels()) all.push_back(std::move(channel));
  return all;
}

bool Endpoint::wait(double timeout_s) {
  if (!completions_.empty()) return true;
  const uint64_t begun = now_ns();
  uint64_t deadline = begun;  // not a number is no time either
  if (timeout_s > kMaxTimeoutS)
    deadline = std::numeric_limits<uint64_t>::max();
  else if (timeout_s > 0)
    deadline += static_cast<uint64_t>(timeout_s * 1e9);
  auto channels = all_channels();
  if (options_.spin_ns > 0 && channels.size() <= kMaxDrivenByWaiter) {
    for (const auto& channel : channels) {
      std::lock_guard lock(channel->mutex);
      if (!channel->dead) channel->rouse(true);
    }
    const uint64_t spin_ns = wait_spin_ns_;
    Spinner spinner;
    uint64_t spin_until = std::min(begun + spin_ns, deadline);
    while (completions_.empty() && now_ns() < spin_until) {
      for (const auto& channel : channels) {
        std::unique_lock lock(channel->mutex, std::try_to_lock);
        if (lock.owns_lock() && !channel->dead && channel->progress())
          spin_until = std::min(now_ns() + spin_ns, deadline);
      }
      tend();
      spinner.turn();
    }
    bool left = false;
    for (const auto& channel : channels) {
      std::lock_guard lock(channel->mutex);
      if (!channel->dead && !channel->rest()) left = true;
    }
    if (left)
      for (const auto& lane : lanes_) lane->kick();
  }
  const uint64_t asleep = now_ns();
  const bool slept = completions_.empty();
  const bool found = completions_.wait(deadline);
  // Two sides that fell asleep on each other pay a wake-up each time; a longer spin brings them back in step.
  if (slept)
    wait_spin_ns_ = found && now_ns() - asleep < 4 * options_.spin_ns
                        ? std::min<uint64_t>(2 * wait_spin_ns_, kMostSpins * options_.spin_ns)
                        : options_.spin_ns;
  return found;
}

}  // namespace sage_kvt
