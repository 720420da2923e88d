// SPDX-License-Identifier: Apache-2.0
// Memory that posts and windows may use; everything else is refused before it is touched.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>

namespace sage_kvt {

class MemoryRegions {
 public:
  // Throws std::invalid_argument for an empty or overflowing range.
  uint64_t add(uint64_t address, uint64_t length);
  // False if unknown.
  bool remove(uint64_t id);
  bool contains(uint64_t address, uint64_t length) const;

 private:
  struct Region {
    uint64_t address, length;
  };
  mutable std::mutex mutex_;
  std::map<uint64_t, Region> regions_;
  uint64_t next_ = 1;
};

}  // namespace sage_kvt
