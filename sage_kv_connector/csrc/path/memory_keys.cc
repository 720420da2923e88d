// SPDX-License-Identifier: Apache-2.0
#include "path/memory_keys.h"

#include <algorithm>
#include <utility>

namespace sage_kvt {

std::shared_ptr<const KeyTable> by_address(KeyTable keys) {
  std::sort(keys.begin(), keys.end(), [](const auto& a, const auto& b) { return a.address < b.address; });
  return std::make_shared<const KeyTable>(std::move(keys));
}

const MemoryKeys* find_keys(const KeyTable& table, uint64_t address, uint64_t length) {
  auto next = std::upper_bound(table.begin(), table.end(), address,
                               [](uint64_t at, const MemoryKeys& keys) { return at < keys.address; });
  // Registrations may overlap; those that begin last are tried first.
  while (next != table.begin())
    if ((--next)->hold(address, length)) return &*next;
  return nullptr;
}

}  // namespace sage_kvt
