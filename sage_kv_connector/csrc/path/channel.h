// SPDX-License-Identifier: Apache-2.0
// A path of a connection: its life (channel.cc), what it sends (send.cc) and receives (receive.cc).
//
// The sender writes a notice into a cell of the receiver; the receiver reads the bytes from the sender's pages straight
// into its window, and says how that ended. So nobody but a window's owner writes into its memory, and once a window is
// closed nothing does. Few bytes come with their notice, and are copied.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "lane.h"
#include "path/wire.h"
#include "window.h"

namespace sage_kvt {

class Endpoint;
class PathChannel;

// A chunk of ours that was told to the peer.
struct Flight {
  std::shared_ptr<Post> post;  // empty: the cell is free
  Chunk chunk;
  uint64_t number = 0;
};
using Flights = std::array<Flight, kCells>;

// It ended at the peer, as that says: by the status of an event, or by `kElsewhere`.
void end_flight(Connection& connection, Flight flight, uint64_t status);

// Who knows all paths of an endpoint.
class PathOwner {
 public:
  virtual ~PathOwner() = default;
  // A channel ended (its mutex held), and its wire is destroyed. `flights` were under way, `results` are what the peer
  // may believe of its own.
  virtual void path_ended(const PathChannel& channel, Flights flights, const Results& results) = 0;
};

class PathChannel : public Channel {
 public:
  PathChannel(std::shared_ptr<Connection> connection, PathOwner& owner, std::unique_ptr<PathWire> wire, uint32_t path);
  ~PathChannel() override;

  bool is_path() const override { return true; }
  bool progress() override;
  bool arm() override;
  void disarm(bool lane_sleeps) override;
  // What is under way is read before its memory is free: nothing to do.
  void revoke(const Post&) override {}
  void shut() override;
  bool stuck() const override { return !acks_.empty() || !told_.empty(); }
  void expire() override {}
  void ping() override {}
  bool expendable() const override { return true; }
  std::vector<int> fds() const override { return {wire_->fd()}; }

  const uint32_t path;
  const PathWire& wire() const { return *wire_; }
  // It can't go on (mutex held).
  void end(const std::string& why);
  // Why it ended, if it did.
  const std::string& why() const { return why_; }

 private:
  // A chunk of the peer on its way into a window.
  struct Arrival {
    uint32_t cell = 0;
    CellNotice notice{};
    std::vector<RemotePiece> from;
    std::shared_ptr<Window> window;
    std::unique_ptr<WindowPin> pin;
    std::vector<iovec> into;
    // What was ordered of it.
    size_t next_from = 0, next_into = 0;
    uint64_t within_from = 0, within_into = 0, ordered = 0;
  };

  bool take_completions();
  void on_told(const PathWord& word);
  void set_open(bool open);
  void take_read();

  bool send_some();
  bool send_chunk();
  bool can_send() const { return open_ && free_ > 0 && bytes_in_flight_ < kMaxBytesInFlight && wire_->room(kSpare); }
  bool write_notice(size_t cell, const Flight& flight);
  void on_ended(const PathWord& word);

  bool receive_some();
  void take(uint32_t cell);
  bool valid(const CellNotice& notice, const std::vector<RemotePiece>& pieces) const;
  bool pin(Arrival& arrival);
  Status place_from_cell(const Arrival& arrival, std::string* detail);
  Status held(const Arrival& arrival, std::string* detail);
  bool order_reads(Arrival& arrival);
  void finish(Arrival& arrival, Status status, const std::string& detail);
  void tell_end(const Arrival& arrival, uint32_t status);

  static constexpr uint64_t kMaxBytesInFlight = 16u << 20;
  // Orders that are kept for words.
  static constexpr size_t kSpare = 4 * kCells;

  Endpoint& endpoint_;
  PathOwner& owner_;
  const std::unique_ptr<PathWire> wire_;
  bool open_ = false;
  std::string why_;

  // sending
  Flights flights_;
  size_t free_ = kCells, next_cell_ = 0;
  uint64_t next_number_ = 1, bytes_in_flight_ = 0;

  // receiving
  std::deque<uint32_t> told_;  // cells that hold a notice which was not looked at
  std::deque<Arrival> arrivals_;
  std::deque<PathWord> acks_;
  Results results_{};
};

}  // namespace sage_kvt
