// SPDX-License-Identifier: Apache-2.0
// Space of one side's arena: spans are taken in order and given back in any order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>

namespace sage_kvt {

class ShmArena {
 public:
  explicit ShmArena(uint64_t size) : size_(size) {}

  // Offset of `length` contiguous bytes (at most the whole arena) that belong to `slot`, or nothing for now.
  std::optional<uint64_t> take(uint64_t length, size_t slot);
  // Give the newest span back as if it had not been taken.
  void undo_take();
  // Give back what belongs to `slot`; nothing if it has no span.
  void free(size_t slot);

 private:
  struct Span {
    uint64_t bytes;        // with the gap before it
    uint64_t head_before;  // for undo_take
    size_t slot;
    bool freed;
  };
  const uint64_t size_;
  uint64_t head_ = 0, used_ = 0;
  std::deque<Span> spans_;  // oldest first
};

}  // namespace sage_kvt
