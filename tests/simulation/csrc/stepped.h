// SPDX-License-Identifier: Apache-2.0
// An endpoint whose lanes have no threads: they move when the simulation takes a step. Everything but the wire is the
// data plane's own: connections, posts, windows, regions, cursors, part streams, liveness.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "endpoint.h"
#include "wire.h"

namespace sage_kvt::simulation {

class SteppedChannel : public Channel {
 public:
  SteppedChannel(std::shared_ptr<Connection> connection, SteppedEndpoint& endpoint, std::shared_ptr<Link> link,
                 bool connecting, bool joins);

  bool progress() override;
  bool arm() override { return false; }
  bool stuck() const override { return sending_.post != nullptr; }
  void expire() override;
  void ping() override { say(Packet::Kind::kPing); }
  bool expendable() const override { return joins_ && !established_; }
  void disarm(bool) override {}
  void revoke(const Post& post) override;
  void shut() override;
  std::vector<int> fds() const override { return {}; }

  // When a packet for it is due, UINT64_MAX: never.
  uint64_t next_due() const;
  bool can_send() const;

 private:
  struct Flight {
    std::shared_ptr<Post> post;
    uint64_t offset = 0, length = 0;
  };

  bool send_some();
  bool receive_some();
  void send_chunk();
  bool on_packet(Packet& packet);
  void place(Packet& packet);
  void say(Packet::Kind kind);
  const Way& in() const { return connecting_ ? link_->to_connector : link_->to_acceptor; }
  const Way& out() const { return connecting_ ? link_->to_acceptor : link_->to_connector; }
  Way& in() { return connecting_ ? link_->to_connector : link_->to_acceptor; }
  Way& out() { return connecting_ ? link_->to_acceptor : link_->to_connector; }

  SteppedEndpoint& endpoint_;
  const std::shared_ptr<Link> link_;
  const bool connecting_, joins_;
  bool established_;
  // A chunk that is pushed leaves in two steps: until the second its bytes are read.
  struct {
    std::shared_ptr<Post> post;
    Chunk chunk;
    Packet packet;
  } sending_;
  std::unordered_map<uint64_t, Flight> flights_;  // of chunks that are pulled
  uint64_t next_flight_ = 1;
};

class SteppedEndpoint : public Endpoint {
 public:
  SteppedEndpoint(std::shared_ptr<Wire> wire, const EndpointOptions& options, std::string host);
  ~SteppedEndpoint() override { close(); }

  std::string listen(const std::string& address) override;
  uint64_t connect(const std::string& address, double timeout_s) override;
  void authorize(uint64_t connection) override;

  // One turn of all lanes, whatever is due; true if something moved.
  bool step();
  // Something is to be done now.
  bool busy();
  // When something is to be done if nobody orders anything before (now_ns), UINT64_MAX: never.
  uint64_t next_due();
  // The process is gone: nobody hears of it but by the wire.
  void die();

  Wire& wire() { return *wire_; }
  // The acceptor's number of a connection that we made: its further lanes name it.
  void accepted_as(uint64_t connection, uint64_t theirs) { theirs_[connection] = {theirs, theirs_[connection].to}; }

 protected:
  void forgotten(uint64_t connection) override { theirs_.erase(connection); }

 private:
  struct Peer {
    uint64_t number = 0;
    std::string to;
  };
  void take_calls();

  const std::shared_ptr<Wire> wire_;
  const std::string host_;
  bool listens_ = false;
  std::unordered_map<uint64_t, Peer> theirs_;
};

}  // namespace sage_kvt::simulation
