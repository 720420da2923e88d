// SPDX-License-Identifier: Apache-2.0
// One call of a vendor's C function for each row of a table, without an interpreter between them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace sage_kvt {

constexpr size_t kMostWords = 6;

// An argument: a column of the row, or the same for all. Integers and pointers, no more than registers hold.
struct Word {
  int column = -1;  // -1: `value`
  uint64_t value = 0;
};

struct RowsCalled {
  size_t done = 0;  // rows whose call returned 0
  int status = 0;   // what the first other one returned; no row behind it was called
};

// `rows`: three columns. `function` takes at most kMostWords arguments, as the platform's C passes integers, and
// returns a status; those that it does not take it does not see.
RowsCalled call_rows(uintptr_t function, const uint64_t (*rows)[3], size_t count,
                     const std::array<Word, kMostWords>& words);

}  // namespace sage_kvt
