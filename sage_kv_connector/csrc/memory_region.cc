// SPDX-License-Identifier: Apache-2.0
#include "memory_region.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace sage_kvt {
namespace {

std::string show(uint64_t address, uint64_t length) {
  return "[" + std::to_string(address) + ", +" + std::to_string(length) + ")";
}

}  // namespace

uint64_t MemoryRegions::add(uint64_t address, uint64_t length) {
  if (address == 0 || length == 0 || address + length < address)
    throw std::invalid_argument("memory region " + show(address, length) + " is empty or overflows");
  std::lock_guard lock(mutex_);
  regions_[next_] = {address, length, 0};
  return next_++;
}

void MemoryRegions::remove(uint64_t id) {
  std::lock_guard lock(mutex_);
  auto found = regions_.find(id);
  if (found == regions_.end()) throw std::invalid_argument("memory region " + std::to_string(id) + " is unknown");
  if (found->second.uses > 0)
    throw std::invalid_argument("memory region " + std::to_string(id) + " is used by " +
                                std::to_string(found->second.uses) + " posts and windows that have not ended");
  regions_.erase(found);
}

std::vector<uint64_t> MemoryRegions::use(const std::vector<Segment>& segments, const char* name) {
  std::vector<uint64_t> used;
  std::lock_guard lock(mutex_);
  auto last = regions_.end();  // neighbours mostly lie in the same region
  for (const auto& s : segments) {
    if (last == regions_.end() || !last->second.contains(s)) {
      last = std::find_if(regions_.begin(), regions_.end(), [&](const auto& r) { return r.second.contains(s); });
      if (last == regions_.end())
        throw std::invalid_argument(std::string(name) + " " + show(s.address, s.length) + " is not registered memory");
      if (std::find(used.begin(), used.end(), last->first) == used.end()) used.push_back(last->first);
    }
  }
  for (uint64_t id : used) ++regions_.at(id).uses;
  return used;
}

void MemoryRegions::release(const std::vector<uint64_t>& ids) {
  std::lock_guard lock(mutex_);
  for (uint64_t id : ids) --regions_.at(id).uses;
}

}  // namespace sage_kvt
