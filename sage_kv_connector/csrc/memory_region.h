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
  struct Region {
    uint64_t address, length;
    bool holds(uint64_t a, uint64_t n) const {
      return n > 0 && a >= address && n <= length && a - address <= length - n;
    }
    bool touches(uint64_t a, uint64_t n) const { return a < address + length && address < a + n; }
  };
  // False if unknown.
  bool get(uint64_t id, Region* region) const;
  bool remove(uint64_t id);
  // The first run that is empty or not wholly inside one region; the size if all are. A run is
  // anything with an address and a length, told by `address_of` and `length_of`.
  template <typename Runs, typename Address, typename Length>
  size_t first_outside(const Runs& runs, Address address_of, Length length_of) const {
    std::lock_guard lock(mutex_);
    const Region* last = nullptr;  // neighbours mostly lie in the same region
    for (size_t i = 0; i < runs.size(); ++i) {
      const uint64_t address = address_of(runs[i]), length = length_of(runs[i]);
      if (last && last->holds(address, length)) continue;
      last = find(address, length);
      if (!last) return i;
    }
    return runs.size();
  }

 private:
  const Region* find(uint64_t address, uint64_t length) const;
  mutable std::mutex mutex_;
  std::map<uint64_t, Region> regions_;
  uint64_t next_ = 1;
};

}  // namespace sage_kvt
