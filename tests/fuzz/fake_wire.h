// SPDX-License-Identifier: Apache-2.0
// A path's wire that goes nowhere: what it is told is written down, and a hostile peer says what comes of it.
#pragma once

#include <deque>
#include <vector>

#include "path/wire.h"

namespace sage_kvt::fuzz {

struct OrderedRead {
  std::vector<LocalPiece> into;
  bool last;
  uint64_t tag;
};

// Of the one wire that there is at a time.
struct FakeState {
  std::deque<PathWire::Done> completions;
  std::deque<OrderedRead> reads;
  std::vector<LocalPiece> brought;  // by the chunk that was told of last, where reads are not in place
  std::vector<LocalPiece> begun;    // of a chunk that did not come whole
  std::deque<std::vector<LocalPiece>> waiting;
  std::vector<PathWord> told;
  bool takes_orders = true, destroyed = false, has_keys = true, in_place = true;
  uint8_t* cells = nullptr;

  // So many orders of those that wait are carried out, and the peer's memory holds this byte; or it can't be read.
  void read(size_t orders, uint8_t byte, bool fails = false);
};

FakeState& fake_wire();
std::unique_ptr<PathWire> new_fake_wire();

}  // namespace sage_kvt::fuzz
