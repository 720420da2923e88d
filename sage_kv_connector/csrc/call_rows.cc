// SPDX-License-Identifier: Apache-2.0
#include "call_rows.h"

namespace sage_kvt {

RowsCalled call_rows(uintptr_t function, const uint64_t (*rows)[3], size_t count,
                     const std::array<Word, kMostWords>& words) {
  using Function = int (*)(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t);
  const auto call = reinterpret_cast<Function>(function);
  RowsCalled called;
  for (; called.done < count; ++called.done) {
    std::array<uint64_t, kMostWords> given;
    for (size_t i = 0; i < kMostWords; ++i)
      given[i] = words[i].column < 0 ? words[i].value : rows[called.done][words[i].column];
    called.status = call(given[0], given[1], given[2], given[3], given[4], given[5]);
    if (called.status != 0) return called;
  }
  return called;
}

}  // namespace sage_kvt
