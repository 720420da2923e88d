// SPDX-License-Identifier: Apache-2.0
#include "space.h"

#include <algorithm>

namespace sage_kvt {

bool add_piece(uint64_t address, uint64_t length, size_t max, std::vector<iovec>* out) {
  if (!out->empty()) {
    auto& last = out->back();
    if (reinterpret_cast<uint64_t>(last.iov_base) + last.iov_len == address) {
      last.iov_len += length;
      return true;
    }
  }
  if (out->size() >= max) return false;
  out->push_back({reinterpret_cast<void*>(address), length});
  return true;
}

SegmentSpace::SegmentSpace(const std::vector<Segment>& segments) {
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

uint64_t SegmentSpace::pieces(uint64_t offset, uint64_t length, size_t max, std::vector<iovec>* out) const {
  auto i = static_cast<size_t>(std::upper_bound(starts_.begin(), starts_.end(), offset) - starts_.begin()) - 1;
  uint64_t within = offset - starts_[i], covered = 0;
  for (; covered < length; ++i, within = 0) {
    const uint64_t n = std::min(length - covered, segments_[i].length - within);
    if (!add_piece(segments_[i].address + within, n, max, out)) break;
    covered += n;
  }
  return covered;
}

}  // namespace sage_kvt
