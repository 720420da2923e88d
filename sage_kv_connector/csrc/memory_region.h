// SPDX-License-Identifier: Apache-2.0
// Memory that posts and windows may use; everything else is refused before it is touched.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

namespace sage_kvt {

struct Segment {
  uint64_t address, length;
};

class MemoryRegions {
 public:
  // Throws std::invalid_argument for an empty or overflowing range.
  uint64_t add(uint64_t address, uint64_t length);
  // Throws std::invalid_argument for an unknown region, or one that is still used.
  void remove(uint64_t id);

  // Every segment must lie in one region; these regions stay until `release` of what is returned.
  // Throws std::invalid_argument, calling a segment `name`.
  std::vector<uint64_t> use(const std::vector<Segment>& segments, const char* name);
  void release(const std::vector<uint64_t>& ids);

 private:
  struct Region {
    uint64_t address, length, uses;
    bool contains(const Segment& s) const {
      return s.address >= address && s.length <= length && s.address - address <= length - s.length;
    }
  };
  std::mutex mutex_;
  std::map<uint64_t, Region> regions_;
  uint64_t next_ = 1;
};

}  // namespace sage_kvt
