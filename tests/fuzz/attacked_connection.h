// SPDX-License-Identifier: Apache-2.0
// One connection whose peer is hostile, and what must hold of it whatever that peer does.
#pragma once

#include <memory>
#include <vector>

#include "endpoint.h"
#include "input.h"

namespace sage_kvt::fuzz {

constexpr uint64_t kGeneration = 7;
// How an input names windows that the peer may know of, as their numbers are never the same twice.
constexpr uint64_t kOwnWindow = 1, kClosedWindow = 2, kForeignWindow = 3;

// For endpoints that live as long as the process.
EndpointOptions stepped_options(int lanes);

// An endpoint whose lanes are driven by hand.
class Stepped {
 public:
  virtual ~Stepped() = default;
  virtual Endpoint& endpoint() = 0;
  // Each lane once; true if something moved.
  virtual bool step() = 0;
};

template <typename Base>
class SteppedEndpoint : public Stepped, public Base {
 public:
  using Base::Base;
  Endpoint& endpoint() override { return *this; }
  bool step() override {
    bool moved = false;
    for (int i = 0; i < this->options().lanes; ++i) moved |= this->lane(static_cast<size_t>(i)).step();
    return moved;
  }
};

class AttackedConnection {
 public:
  // With a window into memory of its own if the layer above trusts the peer, which `authorize` says.
  AttackedConnection(Stepped& stepped, bool incoming);
  ~AttackedConnection();

  const std::shared_ptr<Connection>& connection() const { return connection_; }
  void authorize();
  bool authorized() const { return connection_->authorized; }
  // Something to be sent, into a window of the peer's.
  void post(bool checksum);
  void cancel() { endpoint_.cancel(post_); }
  void close_window() { endpoint_.close_window(window_); }
  void say(size_t bytes) { endpoint_.send(connection_->id, std::string(bytes, 'x')); }
  // The layer above takes what came.
  void take_events();
  // Drives all channels once; true if something moved.
  bool turn();
  // What `kOwnWindow` and the like stand for; anything else stands for itself.
  uint64_t window_named(uint64_t name) const;
  // The connection ends, if it has not, and all that is left is checked.
  void end();

 private:
  struct Counts {
    int closed = 0, done = 0, failed = 0, sent = 0;
  };
  Stepped& stepped_;
  Endpoint& endpoint_;
  const std::shared_ptr<Connection> connection_;
  std::vector<uint64_t> regions_;
  std::vector<std::vector<uint8_t>> memory_;
  uint64_t window_ = 0, closed_window_ = 0, window_size_ = 0, post_ = 0;
  std::vector<bool> landed_;  // by byte of the window
  std::vector<uint8_t> source_;
  Counts counts_;
};

}  // namespace sage_kvt::fuzz
