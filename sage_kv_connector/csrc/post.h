// SPDX-License-Identifier: Apache-2.0
// The sender's side of a transfer: descriptors, cut into chunks as lanes ask for them.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <vector>

#include "event.h"

namespace sage_kvt {

struct Descriptor {
  uint64_t local, remote, length;
};

// Bytes that are contiguous in the peer's window, with the local memory they come from.
struct Chunk {
  uint64_t offset = 0, length = 0;
  std::vector<iovec> pieces;
};

// Joins neighbours that are adjacent on both sides; keeps the order.
std::vector<Descriptor> merge_descriptors(const std::vector<Descriptor>& descriptors);

// Guarded by its connection's mutex.
struct Post {
  uint64_t id = 0;
  uint64_t window = 0, generation = 0;
  int priority = 0;
  bool checksum = true;
  std::vector<Descriptor> descriptors;
  size_t next = 0;      // first descriptor not cut completely
  uint64_t within = 0;  // bytes of it that were cut
  uint64_t total = 0;   // bytes of all descriptors
  size_t chunks_in_flight = 0;
  Status status = Status::kOk;
  std::string detail;
  std::vector<uint64_t> regions;  // in use until the post ended

  bool all_cut() const { return next == descriptors.size(); }
  // Next chunk of at most `max_bytes` and `max_pieces`; length 0 when all were cut.
  Chunk cut(uint64_t max_bytes, size_t max_pieces);
};

}  // namespace sage_kvt
