// SPDX-License-Identifier: Apache-2.0
// An endpoint whose chunks a library fetches: sockets for messages, and for what it can't fetch.
//
// Life of a path: the side that accepted a connection invites the other one -> each tells the other how its library is
// reached -> each tries, and says whether it can read there -> chunks go the way of who can be read from. One thread of
// the backend's calls the library: it takes jobs here, and says how they ended.
#pragma once

#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>

#include "carried/slots.h"
#include "carried/wire.h"
#include "path/channel.h"
#include "tcp/tcp_endpoint.h"

namespace sage_kvt {

struct CarriedOptions {
  std::string name;  // of the library, as `mode` shows it
  size_t slots = 8;
};

struct CarriedJob {
  enum class What { kMeet, kRead, kForget } what;
  uint64_t connection;
  std::string description;            // kMeet: of the peer's library
  std::shared_ptr<CarriedRead> read;  // kRead
};

class CarriedEndpoint : public TcpEndpoint, public PathOwner, public Reader {
 public:
  CarriedEndpoint(const EndpointOptions& options, const TcpOptions& tcp, const CarriedOptions& carried);
  ~CarriedEndpoint() override;

  void authorize(uint64_t connection) override;
  void deregister_memory(uint64_t region) override;
  bool on_note(const std::shared_ptr<Connection>& connection, const std::string& note) override;
  void close() override;

  // -- for the thread that calls the library

  // Nothing if none came in that time. Throws std::invalid_argument for a time that is not allowed.
  std::optional<CarriedJob> next_job(double timeout_s);
  // What peers need to know of the library here from now on. Throws std::invalid_argument where that is too long.
  void describe_library(std::string description);
  // The library knows a region, so that peers may read it.
  void carry(uint64_t region, uint64_t address, uint64_t length);
  // Whether the peer can be read from: "", or why not.
  void met(uint64_t connection, const std::string& why);
  // Once for each read that `next_job` gave, whatever became of its connection.
  void read_ended(uint64_t number, bool failed);
  Slots& slots() { return slots_; }

 private:
  struct Peer {
    std::shared_ptr<Connection> connection;
    bool dialled = false, invited = false;
    std::shared_ptr<WireEnd> end;               // once its path is there
    std::string arriving;                       // the description, as far as it came
    std::string not_from_here, not_from_there;  // why the peer can't read here, and why it can't be read from
  };
  struct Region {
    uint64_t address, length;
  };

  void forgotten(uint64_t connection) override;
  void path_ended(const PathChannel& channel, Flights flights, const Results& results) override;
  void submit(const std::shared_ptr<CarriedRead>& read, const std::shared_ptr<WireEnd>& from) override;
  std::shared_ptr<const KeyTable> readable() const override;
  void publish();

  // With `mutex_` held.
  Peer& peer_of(const std::shared_ptr<Connection>& connection);
  void want_path(const Peer& peer);
  bool described(Peer& peer, const CarriedNote& note);
  void describe_to(const Peer& peer);
  void show_way(const Peer& peer);
  void begin(uint64_t connection, std::unique_lock<std::mutex>& lock);

  const std::string name_;
  Slots slots_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::string description_;
  std::unordered_map<uint64_t, Peer> peers_;
  std::deque<uint64_t> wanting_;  // connections whose path is to be made
  std::deque<CarriedJob> jobs_;
  struct Reading {
    std::shared_ptr<CarriedRead> read;
    std::shared_ptr<WireEnd> from;
  };
  std::unordered_map<uint64_t, Reading> reading_;
  uint64_t next_number_ = 1;
  bool ended_ = false;
  std::map<uint64_t, Region> regions_;
  std::shared_ptr<const KeyTable> readable_ = std::make_shared<const KeyTable>();
};

}  // namespace sage_kvt
