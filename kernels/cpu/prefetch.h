// SPDX-License-Identifier: Apache-2.0
// Brings the next tile's memory into the cache, some lines for each row that is computed.
//
// Arithmetic and memory each take about half of a conversion's time, and a hardware prefetcher
// does not follow a page table; asked for ahead, the next tile arrives while this one is computed.
#pragma once

#include "tile.h"

namespace sage_kvt::SAGE_KVT_ISA {
namespace {

template <bool Write>
class Prefetcher {
 public:
  Prefetcher(const TilePieces& where, int64_t steps) : run_(where.ahead), end_(where.ahead + where.ahead_count) {
    int64_t lines = 0;
    for (const Ahead* run = run_; run != end_; ++run) lines += run->rows * ((run->bytes + kLine - 1) / kLine);
    lines_ = (lines + steps - 1) / steps;
  }

  // One of `steps` equal shares.
  void step() {
    for (int64_t i = 0; i < lines_ && run_ != end_; ++i) {
      __builtin_prefetch(run_->base + row_ * run_->stride + offset_, Write, 2);
      offset_ += kLine;
      if (offset_ < run_->bytes) continue;
      offset_ = 0;
      if (++row_ < run_->rows) continue;
      row_ = 0;
      ++run_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const Ahead *run_, *end_;
  int64_t row_ = 0, offset_ = 0, lines_ = 0;
};

}  // namespace
}  // namespace sage_kvt::SAGE_KVT_ISA
