// SPDX-License-Identifier: Apache-2.0
// The network of a simulation: packets in flight between endpoints of one process, late by seed, cut, lost and held.
//
// Packets of one direction of one link keep their order; links of one connection don't keep step. Nothing here has a
// thread: what is due is delivered when the endpoint that it is for takes a step.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "connection.h"

namespace sage_kvt::simulation {

class SteppedChannel;
class SteppedEndpoint;

// How a wire behaves. Times in nanoseconds; chances out of 1000.
struct Manners {
  uint64_t shortest_ns = 10000, longest_ns = 1000000;
  // Receivers read the sender's memory, and acknowledge; else bytes are in flight.
  bool pulls = false;
  uint64_t packets_in_flight = 8;  // of one direction of a link
  int corrupt = 0, duplicate = 0;  // chunks
};

struct Packet {
  enum class Kind { kEstablished, kRefused, kMessage, kChunk, kAck, kGrant, kPing, kPong, kClosed };
  Kind kind = Kind::kPing;
  uint64_t due = 0;
  std::string bytes;          // of a message, or of a chunk that is pushed
  std::vector<iovec> pieces;  // of a chunk that is pulled
  uint64_t window = 0, offset = 0, length = 0, generation = 0, number = 0;
  Status status = Status::kOk;
  bool checksum = false, corrupt = false, revoked = false;
};

// One way of a link.
struct Way {
  std::deque<Packet> packets;
  uint64_t last_due = 0;
  bool gone = false;  // nobody reads it any more
};

struct Link {
  std::string from, to;
  Way to_acceptor, to_connector;
  bool silent = false;  // whatever is sent from now on is lost, and nobody is told
};

// A link that is not accepted yet.
struct Call {
  uint64_t due = 0;
  std::shared_ptr<Link> link;
  uint64_t joins = 0;  // the acceptor's connection, of a further lane
};

class Wire {
 public:
  explicit Wire(uint64_t seed) : random_(seed) {}

  Manners manners;
  std::set<std::string> silent_hosts;  // calls to them are lost

  void call(std::shared_ptr<Link> link, uint64_t joins);
  void send(Link& link, Way& way, Packet packet);
  // The next call to this host that is due.
  bool take_call(const std::string& host, Call* call);
  // When the next call to it arrives, UINT64_MAX: none.
  uint64_t next_call(const std::string& host) const;
  bool chance(int out_of_1000);
  void listening(const std::string& host, bool up);
  // Every link of this host breaks: both sides are told, or nobody is.
  void cut(const std::string& host, bool silently);
  uint64_t links() const;

 private:
  uint64_t late();

  std::mt19937_64 random_;
  std::set<std::string> hosts_;
  std::vector<Call> calls_;
  std::vector<std::weak_ptr<Link>> links_;
};

}  // namespace sage_kvt::simulation
