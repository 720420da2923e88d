// SPDX-License-Identifier: Apache-2.0
// What a lane of a connection with several links sent, until the peer says that it took it: if the lane ends, the rest
// goes another way.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <variant>

#include "connection.h"

namespace sage_kvt {

class Kept {
 public:
  struct Flight {
    std::shared_ptr<Post> post;  // empty: it was revoked
    Chunk chunk;
  };
  struct Note {
    std::string text;
  };
  // A chunk, a message, a note or a grant.
  using Frame = std::variant<Flight, std::string, Note, Grant>;

  // The next frame that leaves, or begins to.
  void add(Frame frame) { frames_.push_back(std::move(frame)); }
  bool empty() const { return frames_.empty(); }
  // So many left so far.
  uint64_t sent() const { return taken_ + frames_.size(); }
  // The peer took the first `count` that left: their chunks are sent. False if they are fewer than it took before, or
  // more than left.
  bool taken(Connection& connection, uint64_t count);
  // Its chunks are void, whether they got there or not.
  void revoke(Connection& connection, const Post& post);
  // What the peer did not take is to leave once more.
  void send_again(Connection& connection);

 private:
  std::deque<Frame> frames_;
  uint64_t taken_ = 0;
};

}  // namespace sage_kvt
