// SPDX-License-Identifier: Apache-2.0
// The sender's side of a transfer: bytes that are cut into chunks as lanes ask for them.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <string>
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
  bool ack_later = false;  // nobody waits for its end: nothing more of its post can be cut for now
};

// Joins neighbours that are adjacent on both sides; keeps the order.
std::vector<Descriptor> merge_descriptors(const std::vector<Descriptor>& descriptors);

// Guarded by its connection's mutex.
struct Post {
  virtual ~Post() = default;
  uint64_t id = 0;
  uint64_t window = 0, generation = 0;
  int priority = 0;
  bool checksum = true;
  bool plain = false;                    // no path can carry it: its memory, or its window's, is not registered
  uint64_t total = 0;                    // bytes
  uint64_t queued_ns = 0, began_ns = 0;  // when it was posted, and its first chunk cut
  size_t chunks_in_flight = 0;
  Status status = Status::kOk;
  std::string detail;
  std::vector<uint64_t> regions;  // in use until the post ended

  virtual bool all_cut() const = 0;
  // Nothing more can be cut until `Connection::resume`. Of the last `cut`.
  virtual bool waits() const { return false; }
  // Next chunk of at most `max_bytes` and `max_pieces`. Length 0: nothing can be cut (now), or `status` says why
  // nothing ever can.
  virtual Chunk cut(uint64_t max_bytes, size_t max_pieces) = 0;
  // It waits for the ends of its chunks, too.
  virtual bool needs_acks() const { return false; }
  // A chunk left, or was taken: its memory is read no more.
  virtual void sent(uint64_t, uint64_t) {}
  // The receiver has room for so many of its parts.
  virtual void granted(uint64_t) {}
  // It ended.
  virtual void finished() {}
};

// Descriptors that are all there from the beginning.
struct DescriptorPost : Post {
  explicit DescriptorPost(const std::vector<Descriptor>& descriptors);
  bool all_cut() const override { return next == descriptors.size(); }
  Chunk cut(uint64_t max_bytes, size_t max_pieces) override;

  const std::vector<Descriptor> descriptors;
  size_t next = 0;      // first descriptor not cut completely
  uint64_t within = 0;  // bytes of it that were cut
};

// How a post is sent.
struct PostOptions {
  uint64_t generation = 0;
  int priority = 0;
  bool checksum = true;
};

}  // namespace sage_kvt
