// SPDX-License-Identifier: Apache-2.0
#include "window.h"

#include <utility>

namespace sage_kvt {
namespace {
// Scattered arrivals cost memory: a window may have one range for this many bytes, and some more.
constexpr uint64_t kBytesPerRange = 256, kFreeRanges = 4096;
}  // namespace

Window::Window(uint64_t id_, uint64_t connection_, uint64_t generation_, std::unique_ptr<Space> space, bool notify,
               std::vector<uint64_t> regions_)
    : id(id_),
      connection(connection_),
      generation(generation_),
      notify_chunks(notify),
      regions(std::move(regions_)),
      space_(std::move(space)),
      size_(space_->size()) {}

Status Window::reserve(uint64_t offset, uint64_t length, uint64_t generation_) {
  if (generation_ != generation) return Status::kStaleGeneration;
  if (length == 0 || offset > size_ || length > size_ - offset) return Status::kOutOfBounds;
  if (!space_->admits(offset, length)) return Status::kOutOfBounds;
  std::lock_guard lock(mutex_);
  const uint64_t end = offset + length;
  auto next = taken_.lower_bound(offset);
  if (next != taken_.end() && next->first < end) return Status::kOverlap;
  auto before = next == taken_.begin() ? taken_.end() : std::prev(next);
  if (before != taken_.end() && before->second > offset) return Status::kOverlap;
  const bool joins_before = before != taken_.end() && before->second == offset;
  const bool joins_next = next != taken_.end() && next->first == end;
  const uint64_t new_end = joins_next ? next->second : end;
  if (!joins_before && !joins_next && taken_.size() >= kFreeRanges + size_ / kBytesPerRange) return Status::kRefused;
  if (began_ns_ == 0) began_ns_ = now_ns();
  if (joins_next) taken_.erase(next);
  if (joins_before)
    before->second = new_end;
  else
    taken_[offset] = new_end;
  return Status::kOk;
}

void Window::release(uint64_t offset, uint64_t length) {
  std::lock_guard lock(mutex_);
  const uint64_t end = offset + length;
  const auto range = std::prev(taken_.upper_bound(offset));
  const auto [first, last] = *range;
  taken_.erase(range);
  if (first < offset) taken_[first] = offset;
  if (end < last) taken_[end] = last;
}

bool Window::begin_copy() {
  std::lock_guard lock(mutex_);
  if (closed_) return false;
  ++copies_;
  return true;
}

void Window::end_copy() {
  std::lock_guard lock(mutex_);
  if (--copies_ == 0) idle_.notify_all();
}

bool Window::land(uint64_t offset, uint64_t length) {
  space_->landed(offset, length);
  std::lock_guard lock(mutex_);
  landed_ += length;
  return landed_ == size_ && !failed_ && !closed_;
}

bool Window::fail() {
  std::lock_guard lock(mutex_);
  if (failed_ || closed_) return false;
  failed_ = true;
  return landed_ != size_;
}

uint64_t Window::close() {
  std::unique_lock lock(mutex_);
  closed_ = true;
  idle_.wait(lock, [this] { return copies_ == 0; });
  return landed_;
}

}  // namespace sage_kvt
