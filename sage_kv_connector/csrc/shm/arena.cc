// SPDX-License-Identifier: Apache-2.0
#include "shm/arena.h"

namespace sage_kvt {

std::optional<uint64_t> ShmArena::take(uint64_t length, size_t slot) {
  if (used_ == 0) head_ = 0;
  const bool wraps = length > size_ - head_;
  const uint64_t gap = wraps ? size_ - head_ : 0;  // left unused, so that a span is contiguous
  if (gap + length > size_ - used_) return std::nullopt;
  const uint64_t offset = wraps ? 0 : head_;
  spans_.push_back({gap + length, head_, slot, false});
  head_ = offset + length;
  used_ += gap + length;
  return offset;
}

void ShmArena::undo_take() {
  used_ -= spans_.back().bytes;
  head_ = spans_.back().head_before;
  spans_.pop_back();
}

void ShmArena::free(size_t slot) {
  for (auto& span : spans_)
    if (span.slot == slot && !span.freed) {
      span.freed = true;
      break;
    }
  while (!spans_.empty() && spans_.front().freed) {
    used_ -= spans_.front().bytes;
    spans_.pop_front();
  }
}

}  // namespace sage_kvt
