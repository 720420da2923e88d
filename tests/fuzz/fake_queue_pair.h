// SPDX-License-Identifier: Apache-2.0
// A queue pair and a device without RDMA: what they are told is written down, and a hostile peer says what comes of it.
// Linked in place of csrc/rdma/queue_pair.cc and device.cc.
#pragma once

#include <deque>
#include <vector>

#include "rdma/queue_pair.h"

namespace sage_kvt::fuzz {

struct OrderedRead {
  std::vector<ibv_sge> into;
  bool last;
  uint64_t tag;
};

// Of the one queue pair that there is at a time.
struct FakePair {
  std::deque<QueuePair::Done> completions;
  std::deque<OrderedRead> reads;
  std::vector<PathWord> told;
  bool takes_orders = true, destroyed = false, has_keys = true;
  uint8_t* cells = nullptr;

  // The card reads so many orders of those that wait, and the peer's memory holds this byte.
  void read(size_t orders, uint8_t byte);
};

FakePair& fake_pair();
std::unique_ptr<QueuePair> new_fake_pair();

}  // namespace sage_kvt::fuzz
