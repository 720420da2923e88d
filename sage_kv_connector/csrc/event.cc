// SPDX-License-Identifier: Apache-2.0
#include "event.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <system_error>

namespace sage_kvt {

#ifdef SAGE_KVT_SIMULATION
namespace {
std::atomic<uint64_t> simulated_ns{0};
}
void simulate_now(uint64_t ns) { simulated_ns = ns; }
#endif

uint64_t now_ns() {
#ifdef SAGE_KVT_SIMULATION
  if (const uint64_t simulated = simulated_ns.load(std::memory_order_relaxed)) return simulated;
#endif
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1000000000ull + static_cast<uint64_t>(t.tv_nsec);
}

CompletionQueue::CompletionQueue() : fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
}

CompletionQueue::~CompletionQueue() { close(); }

void CompletionQueue::push(Event event) {
  event.time_ns = now_ns();
  std::lock_guard lock(mutex_);
  events_.push_back(std::move(event));
  // Written under the lock so that a take that empties the queue also clears the eventfd.
  if (events_.size() == 1 && !closed_) {
    uint64_t one = 1;
    (void)!::write(fd_, &one, sizeof one);
  }
}

std::vector<Event> CompletionQueue::take(size_t max_events) {
  std::vector<Event> out;
  std::lock_guard lock(mutex_);
  while (!events_.empty() && out.size() < max_events) {
    out.push_back(std::move(events_.front()));
    events_.pop_front();
  }
  if (events_.empty() && !out.empty() && !closed_) {
    uint64_t value;
    (void)!::read(fd_, &value, sizeof value);
  }
  return out;
}

bool CompletionQueue::empty() const {
  std::lock_guard lock(mutex_);
  return events_.empty();
}

int CompletionQueue::fd() const {
  std::lock_guard lock(mutex_);
  return fd_;
}

bool CompletionQueue::wait(uint64_t deadline_ns) {
  std::unique_lock lock(mutex_);
  ++waiting_;
  while (events_.empty() && !closed_) {
    const uint64_t now = now_ns();
    if (now >= deadline_ns) break;
    pollfd p{fd_, POLLIN, 0};
    lock.unlock();
    ::poll(&p, 1, static_cast<int>(std::min<uint64_t>((deadline_ns - now - 1) / 1000000 + 1, 60000)));
    lock.lock();
  }
  if (--waiting_ == 0) nobody_waits_.notify_all();
  return !events_.empty();
}

void CompletionQueue::close() {
  std::unique_lock lock(mutex_);
  if (closed_) return;
  closed_ = true;
  uint64_t one = 1;
  (void)!::write(fd_, &one, sizeof one);
  nobody_waits_.wait(lock, [this] { return waiting_ == 0; });
  ::close(fd_);
  fd_ = -1;
}

}  // namespace sage_kvt
