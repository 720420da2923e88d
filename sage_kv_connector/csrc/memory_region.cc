// SPDX-License-Identifier: Apache-2.0
#include "memory_region.h"

#include <stdexcept>

namespace sage_kvt {

uint64_t MemoryRegions::add(uint64_t address, uint64_t length) {
  if (address == 0 || length == 0 || address + length < address)
    throw std::invalid_argument("memory region [" + std::to_string(address) + ", +" + std::to_string(length) +
                                ") is empty or overflows");
  std::lock_guard lock(mutex_);
  regions_[next_] = {address, length};
  return next_++;
}

bool MemoryRegions::get(uint64_t id, Region* region) const {
  std::lock_guard lock(mutex_);
  auto found = regions_.find(id);
  if (found == regions_.end()) return false;
  *region = found->second;
  return true;
}

bool MemoryRegions::remove(uint64_t id) {
  std::lock_guard lock(mutex_);
  return regions_.erase(id) > 0;
}

const MemoryRegions::Region* MemoryRegions::find(uint64_t address, uint64_t length) const {
  for (const auto& [id, region] : regions_)
    if (region.holds(address, length)) return &region;
  return nullptr;
}

}  // namespace sage_kvt
