// SPDX-License-Identifier: Apache-2.0
// Which memory of ours a path may touch, and by which keys.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace sage_kvt {

// Of memory from `address` on that one registration covers.
struct MemoryKeys {
  uint64_t address, end;
  uint32_t local, remote;
  bool hold(uint64_t from, uint64_t length) const { return from >= address && from < end && length <= end - from; }
};

// A moment's keys, by address.
using KeyTable = std::vector<MemoryKeys>;

// Of keys in any order.
std::shared_ptr<const KeyTable> by_address(KeyTable keys);

// nullptr if no registration covers it.
const MemoryKeys* find_keys(const KeyTable& table, uint64_t address, uint64_t length);

}  // namespace sage_kvt
