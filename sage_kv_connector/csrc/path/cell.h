// SPDX-License-Identifier: Apache-2.0
// What a path carries beside the bytes of pages. docs/protocol.md, "rdma", is the format.
//
// Each side has cells that the other one fills, one for each chunk that may be under way. A cell holds a notice: where
// the chunk's bytes lie, or, if they are few, the bytes. The receiver reads them from there into its window.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace sage_kvt {

constexpr size_t kCells = 64;
constexpr uint64_t kCellBytes = 16u << 10;

struct CellNotice {
  uint64_t number;  // of the chunk, on this path in this direction; from 1 on
  uint64_t window, offset, length, generation;
  uint32_t crc;
  uint16_t flags, pieces;
  std::array<uint8_t, 16> zero;
};
static_assert(sizeof(CellNotice) == 64);

constexpr uint16_t kNoticeHasCrc = 1, kNoticeHoldsBytes = 2;
constexpr uint64_t kMostInCell = kCellBytes - sizeof(CellNotice);

// Memory of the sender.
struct RemotePiece {
  uint64_t address;
  uint32_t length, key;
};
static_assert(sizeof(RemotePiece) == 16);

// Comes with a write, or alone.
enum class Told : uint32_t { kHello = 1, kChunk = 2, kEnded = 3 };

struct PathWord {
  Told what;
  uint32_t cell = 0, status = 0;

  uint32_t packed() const { return static_cast<uint32_t>(what) << 24 | cell << 8 | status; }
  static PathWord unpacked(uint32_t word) { return {static_cast<Told>(word >> 24), word >> 8 & 0xffff, word & 0xff}; }
};

// A status of `kEnded` besides those of events: the chunk can't come this way.
constexpr uint32_t kElsewhere = 0xff;

// How the last chunk of each cell ended at the receiver: what a sender may believe once the path is gone.
struct Result {
  uint64_t number = 0;
  uint64_t status = 0;
};
using Results = std::array<Result, kCells>;

}  // namespace sage_kvt
