// SPDX-License-Identifier: Apache-2.0
#include "event.h"

#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <system_error>

namespace sage_kvt {

uint64_t now_ns() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1000000000ull + static_cast<uint64_t>(t.tv_nsec);
}

CompletionQueue::CompletionQueue() : fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
}

CompletionQueue::~CompletionQueue() { ::close(fd_); }

void CompletionQueue::push(Event event) {
  event.time_ns = now_ns();
  bool first;
  {
    std::lock_guard lock(mutex_);
    first = events_.empty();
    events_.push_back(std::move(event));
    // Written under the lock so that a take that empties the queue also clears the eventfd.
    if (first) {
      uint64_t one = 1;
      (void)!::write(fd_, &one, sizeof one);
    }
  }
}

std::vector<Event> CompletionQueue::take(size_t max_events) {
  std::vector<Event> out;
  std::lock_guard lock(mutex_);
  while (!events_.empty() && out.size() < max_events) {
    out.push_back(std::move(events_.front()));
    events_.pop_front();
  }
  if (events_.empty() && !out.empty()) {
    uint64_t value;
    (void)!::read(fd_, &value, sizeof value);
  }
  return out;
}

bool CompletionQueue::empty() const {
  std::lock_guard lock(mutex_);
  return events_.empty();
}

}  // namespace sage_kvt
