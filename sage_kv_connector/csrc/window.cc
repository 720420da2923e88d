// SPDX-License-Identifier: Apache-2.0
#include "window.h"

#include <algorithm>
#include <utility>

namespace sage_kvt {
namespace {
// Scattered arrivals cost memory: a window may have one range for this many bytes, and some more.
constexpr uint64_t kBytesPerRange = 256, kFreeRanges = 4096;
}  // namespace

Window::Window(uint64_t id_, uint64_t connection_, uint64_t generation_, const std::vector<Segment>& segments,
               bool notify, std::vector<uint64_t> regions_)
    : id(id_), connection(connection_), generation(generation_), notify_chunks(notify), regions(std::move(regions_)) {
  segments_.reserve(segments.size());
  starts_.reserve(segments.size());
  for (const auto& s : segments) {
    if (!segments_.empty() && segments_.back().address + segments_.back().length == s.address) {
      segments_.back().length += s.length;
    } else {
      segments_.push_back(s);
      starts_.push_back(size_);
    }
    size_ += s.length;
  }
}

Status Window::reserve(uint64_t offset, uint64_t length, uint64_t generation_) {
  if (generation_ != generation) return Status::kStaleGeneration;
  if (length == 0 || offset > size_ || length > size_ - offset) return Status::kOutOfBounds;
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
  if (joins_next) taken_.erase(next);
  if (joins_before)
    before->second = new_end;
  else
    taken_[offset] = new_end;
  return Status::kOk;
}

uint64_t Window::pieces(uint64_t offset, uint64_t length, size_t max, std::vector<iovec>* out) const {
  auto i = static_cast<size_t>(std::upper_bound(starts_.begin(), starts_.end(), offset) - starts_.begin()) - 1;
  uint64_t within = offset - starts_[i], covered = 0;
  for (; covered < length && out->size() < max; ++i, within = 0) {
    const uint64_t n = std::min(length - covered, segments_[i].length - within);
    out->push_back({reinterpret_cast<void*>(segments_[i].address + within), n});
    covered += n;
  }
  return covered;
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

bool Window::land(uint64_t length) {
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
