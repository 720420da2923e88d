// SPDX-License-Identifier: Apache-2.0
#include "carried/slots.h"

#include <sys/mman.h>

#include <cerrno>
#include <system_error>
#include <utility>

namespace sage_kvt {

Slots::Slots(size_t count, uint64_t bytes)
    : count_(count),
      bytes_(bytes),
      memory_(::mmap(nullptr, count * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
  if (memory_ == MAP_FAILED)
    throw std::system_error(errno, std::generic_category(), "no memory for what a library reads");
  // The first ones are taken again and again, so that few pages are ever touched.
  for (size_t i = count; i > 0; --i) free_.push_back(begin() + (i - 1) * bytes);
}

Slots::~Slots() {
  if (!abandoned_) ::munmap(memory_, count_ * bytes_);
}

uint64_t Slots::take(const std::shared_ptr<SlotWaiter>& waiter) {
  std::lock_guard lock(mutex_);
  if (free_.empty()) {
    waiting_.push_back(waiter);
    return 0;
  }
  const uint64_t address = free_.back();
  free_.pop_back();
  return address;
}

void Slots::give_back(uint64_t address) {
  std::vector<std::weak_ptr<SlotWaiter>> waiting;
  {
    std::lock_guard lock(mutex_);
    free_.push_back(address);
    waiting.swap(waiting_);
  }
  for (const auto& one : waiting)
    if (const auto waiter = one.lock()) waiter->look_again();
}

}  // namespace sage_kvt
