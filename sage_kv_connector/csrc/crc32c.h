// SPDX-License-Identifier: Apache-2.0
// CRC32C (Castagnoli, reflected polynomial 0x82F63B78), the fastest way this CPU has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace sage_kvt {

// Continue `crc` (0 to begin) over `size` bytes.
uint32_t crc32c(uint32_t crc, const void* data, size_t size);

// Every implementation this CPU can run, the chosen one first; for tests.
struct Crc32cImplementation {
  std::string name;
  uint32_t (*run)(uint32_t, const void*, size_t);
};
const std::vector<Crc32cImplementation>& crc32c_implementations();

}  // namespace sage_kvt
