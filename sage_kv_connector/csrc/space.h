// SPDX-License-Identifier: Apache-2.0
// Scattered memory as one linear space: what a window fills, and what a post sends.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <vector>

#include "memory_region.h"

namespace sage_kvt {

class Space {
 public:
  virtual ~Space() = default;
  virtual uint64_t size() const = 0;
  // Memory for [offset, offset + length), which is inside: at most `max` pieces in all in `out`. Returns how many
  // bytes they cover.
  virtual uint64_t pieces(uint64_t offset, uint64_t length, size_t max, std::vector<iovec>* out) const = 0;
  // Whether a peer may fill this now.
  virtual bool admits(uint64_t, uint64_t) const { return true; }
  // It did, and the bytes held.
  virtual void landed(uint64_t, uint64_t) {}
};

// One more piece, or a longer last one where it goes on behind that. False if there is no room for it.
bool add_piece(uint64_t address, uint64_t length, size_t max, std::vector<iovec>* out);

// Segments one after the other.
class SegmentSpace : public Space {
 public:
  explicit SegmentSpace(const std::vector<Segment>& segments);
  uint64_t size() const override { return size_; }
  uint64_t pieces(uint64_t offset, uint64_t length, size_t max, std::vector<iovec>* out) const override;

 private:
  std::vector<Segment> segments_;
  std::vector<uint64_t> starts_;
  uint64_t size_ = 0;
};

}  // namespace sage_kvt
