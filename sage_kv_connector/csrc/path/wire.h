// SPDX-License-Identifier: Apache-2.0
// What carries a path's cells, words and reads: a queue pair of two cards, or a library that reads.
//
// Memory model: cells of both directions. The peer fills those that `cell` shows, nothing else of ours; what is in an
// outgoing cell stays until the peer said that its chunk ended. Reads bring bytes of the peer's memory, and are told of
// in the order in which they were ordered.
//
// Life: made by who sets paths up -> a channel's, which calls it with its mutex held -> `destroy` -> destructed.
// Implementor's contract: no call blocks, but `destroy` for as long as it takes until nothing of a window is written
// any more. What is said of a peer is not believed here: the channel checks it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "path/cell.h"
#include "path/memory_keys.h"

namespace sage_kvt {

// Memory of ours that a read fills.
struct LocalPiece {
  uint64_t address;
  uint32_t length, key;
};

class PathWire {
 public:
  virtual ~PathWire() = default;

  // No byte of a window or a post is read or written any more when this returns, and it takes nothing. Idempotent.
  virtual void destroy() = 0;

  virtual const uint8_t* cell(size_t i) const = 0;
  virtual uint8_t* outgoing(size_t i) = 0;
  // The most bytes of a chunk that the peer takes.
  virtual uint64_t most_in_chunk() const = 0;

  // Room for so many more orders.
  virtual bool room(size_t orders) const = 0;
  // For a read of a chunk of so many bytes, of which some may have been ordered.
  virtual bool room_for_read(uint64_t bytes) = 0;
  // Orders; false if it takes none any more.
  virtual bool send_cell(size_t i, uint64_t bytes, const PathWord& word) = 0;
  virtual bool tell(const PathWord& word) = 0;
  // From the peer's memory into pieces of ours. `last`: of a chunk, whose completion is told, as `tag`.
  virtual bool read(uint64_t address, uint32_t key, const std::vector<LocalPiece>& into, bool last, uint64_t tag) = 0;
  virtual size_t most_pieces() const = 0;
  // Memory that the peer may read, and that reads may fill.
  virtual std::shared_ptr<const KeyTable> readable() const = 0;
  virtual std::shared_ptr<const KeyTable> writable() const = 0;
  // Whether reads write into pieces as they come. Else `place` does: of the read that was told of last.
  virtual bool in_place() const = 0;
  virtual void place() {}

  struct Done {
    enum class What {
      kOpen,     // chunks may leave from now on
      kResting,  // no chunk may leave until it is open again (why)
      kSent,     // room was made
      kRead,     // (tag)
      kNotRead,  // the bytes can't come this way (tag)
      kTold,     // (word)
      kBroken    // (why)
    } what;
    uint64_t tag;
    PathWord word;
    std::string why;
  };
  // False if nothing ended.
  virtual bool next(Done* done) = 0;

  // Something to wait for in epoll: readable once there is something for `next` after `arm`.
  virtual int fd() const = 0;
  // False if it is there already.
  virtual bool arm() = 0;
  virtual void disarm() = 0;
};

}  // namespace sage_kvt
