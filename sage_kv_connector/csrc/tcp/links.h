// SPDX-License-Identifier: Apache-2.0
// Connections with several links: their lanes end alone, and are dialled again.
//
// Life of a lane there: it is the first, or joins -> its socket breaks, or its network acknowledges nothing any more ->
// each side tells the other, over all other lanes, how much it had taken of it; until then nothing leaves that has an
// order -> what was not taken leaves by other lanes -> who dialled the connection dials the lane again, later each
// time.
//
// Threads: `ended` and `peer_ended` take notes only, with a channel's mutex held; lanes' threads look at these in
// `tend`, without one.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "connection.h"
#include "endpoint.h"
#include "tcp/frame.h"
#include "tcp/kept.h"
#include "tcp/socket_address.h"

namespace sage_kvt {

class TcpChannel;
class TcpEndpoint;
struct Joinable;

// A lane that is gone on this side.
struct LaneEnded {
  std::shared_ptr<Connection> connection;
  LaneId id;
  bool first;             // what has an order went over it
  uint64_t silent_since;  // its network did it, and ends those beside it; 0: something else did
  Kept kept;
  uint64_t taken;  // frames of the peer
};

class Links : public Tender {
 public:
  static constexpr uint64_t kNever = UINT64_MAX;

  explicit Links(TcpEndpoint& endpoint) : endpoint_(endpoint) {}

  // The other side may add lanes to a connection that it dialled.
  void accepted(const std::shared_ptr<Connection>& connection, const Joinable& joinable);
  // This side may, and does. `addresses`: the one that was dialled, and those of other links.
  void dialled(const std::shared_ptr<Connection>& connection, const Joinable& joinable);
  void forget(uint64_t connection);

  // The connection that a lane with this token belongs to, 0 if there is none; and whether this lane may join it now.
  uint64_t joins(const Token& token, const LaneId& id);
  bool admit(uint64_t connection, const LaneId& id);
  size_t link_of(uint64_t connection, const LaneId& id);

  void ended(LaneEnded ended);
  void peer_ended(const std::shared_ptr<Connection>& connection, const LaneId& id, uint64_t taken);
  void tend() override;
  // Whether bytes came by another network later than that; and have such networks show it.
  static bool another_lives(const TcpChannel& lane, uint64_t since);
  static void ask_others(const TcpChannel& lane);
  // When `tend` has something to do (now_ns).
  uint64_t next_due() const { return next_due_; }

 private:
  struct LaneState {
    uint32_t next_turn = 0;
    bool begun = false;  // the turn before that, and both sides have not settled it
    std::optional<LaneEnded> left;
    std::optional<uint64_t> told;  // by the peer
    std::optional<uint64_t> said;  // to the peer, until the next turn: it may get lost with the lanes that carry it
    uint64_t due = kNever, backoff_ns = 0, since = 0;
  };
  struct Linked {
    std::shared_ptr<Connection> connection;
    Token token{};
    bool dials = false;
    std::vector<SocketAddress> addresses;
    std::vector<LaneState> lanes;
  };
  struct PeerEnded {
    std::shared_ptr<Connection> connection;
    LaneId id;
    uint64_t taken;
  };

  void add(const std::shared_ptr<Connection>& connection, const Joinable& joinable, bool dials);
  LaneState* find(uint64_t connection, const LaneId& id);
  void on_ended(LaneEnded ended);
  void on_peer_ended(const PeerEnded& ended);
  void settle(uint64_t connection, const LaneId& id);
  void dial_again(Linked& linked, LaneState& lane);
  void dial_due(uint64_t now);
  void say(const Connection& connection);

  TcpEndpoint& endpoint_;
  std::mutex mutex_;
  std::unordered_map<uint64_t, Linked> linked_;
  std::vector<LaneEnded> ended_;
  std::vector<PeerEnded> peer_ended_;
  std::atomic<bool> noted_{false};
  std::atomic<uint64_t> next_due_{kNever};
};

}  // namespace sage_kvt
