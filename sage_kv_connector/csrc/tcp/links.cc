// SPDX-License-Identifier: Apache-2.0
#include "tcp/links.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "tcp/tcp_endpoint.h"

namespace sage_kvt {
namespace {

constexpr uint64_t kFirstBackoffNs = 250000000, kLongestBackoffNs = 5000000000;
// A lane that lived so long is dialled again as soon as one that never broke.
constexpr uint64_t kLongLifeNs = 1000000000;

// Lanes that still live. One that is locked here lives on, or has ended.
std::vector<std::shared_ptr<TcpChannel>> lanes_of(const Connection& connection) {
  std::vector<std::shared_ptr<TcpChannel>> lanes;
  for (const auto& channel : connection.channels())
    if (!channel->is_path()) lanes.push_back(std::static_pointer_cast<TcpChannel>(channel));
  return lanes;
}

}  // namespace

void Links::add(const std::shared_ptr<Connection>& connection, const Joinable& joinable, bool dials) {
  std::lock_guard lock(mutex_);
  auto& linked = linked_[connection->id];
  linked = {connection, joinable.token, dials, joinable.addresses, {}};
  linked.lanes.resize(std::min<uint64_t>(joinable.lanes + 1, kMaxLanes));
  linked.lanes[0].next_turn = 1;
  linked.lanes[0].begun = true;
  linked.lanes[0].since = now_ns();
}

void Links::accepted(const std::shared_ptr<Connection>& connection, const Joinable& joinable) {
  add(connection, joinable, false);
}

void Links::dialled(const std::shared_ptr<Connection>& connection, const Joinable& joinable) {
  add(connection, joinable, true);
  {
    std::lock_guard lock(mutex_);
    auto& lanes = linked_[connection->id].lanes;
    for (size_t i = 1; i < lanes.size(); ++i) lanes[i].due = 0;
    next_due_ = 0;
  }
  connection->kick();
}

void Links::forget(uint64_t connection) {
  std::lock_guard lock(mutex_);
  linked_.erase(connection);
  std::erase_if(ended_, [&](const auto& one) { return one.connection->id == connection; });
  std::erase_if(peer_ended_, [&](const auto& one) { return one.connection->id == connection; });
}

uint64_t Links::joins(const Token& token, const LaneId& id) {
  std::lock_guard lock(mutex_);
  uint64_t found = 0;
  for (const auto& [connection, linked] : linked_)
    if (!linked.dials && equal_in_constant_time(linked.token, token) && id.lane < linked.lanes.size())
      found = connection;
  return found;
}

// Each turn once, and only when the one before is settled.
bool Links::admit(uint64_t connection, const LaneId& id) {
  std::lock_guard lock(mutex_);
  const auto found = linked_.find(connection);
  if (found == linked_.end() || id.lane >= found->second.lanes.size()) return false;
  auto& lane = found->second.lanes[id.lane];
  if (id.turn < lane.next_turn || lane.begun) return false;
  lane.next_turn = id.turn + 1;
  lane.begun = true;
  lane.said.reset();
  lane.since = now_ns();
  return true;
}

size_t Links::link_of(uint64_t connection, const LaneId& id) {
  std::lock_guard lock(mutex_);
  const auto found = linked_.find(connection);
  return found == linked_.end() ? 0 : id.lane % (found->second.addresses.size() + (found->second.dials ? 0 : 1));
}

void Links::ended(LaneEnded ended) {
  const auto connection = ended.connection;
  if (ended.first) connection->hold();
  {
    std::lock_guard lock(mutex_);
    ended_.push_back(std::move(ended));
    noted_ = true;
  }
  connection->kick();
}

void Links::peer_ended(const std::shared_ptr<Connection>& connection, const LaneId& id, uint64_t taken) {
  {
    std::lock_guard lock(mutex_);
    // More than two sides have to say in earnest.
    if (peer_ended_.size() >= 64 * kMaxLanes) return;
    peer_ended_.push_back({connection, id, taken});
    noted_ = true;
  }
  connection->kick();
}

void Links::tend() {
  while (true) {
    if (const uint64_t due = next_due_; due != kNever)
      if (const uint64_t now = now_ns(); now >= due) dial_due(now);
    if (!noted_.exchange(false)) return;
    std::vector<LaneEnded> ended;
    std::vector<PeerEnded> peer_ended;
    {
      std::lock_guard lock(mutex_);
      ended.swap(ended_);
      peer_ended.swap(peer_ended_);
    }
    for (auto& one : ended) on_ended(std::move(one));
    for (const auto& one : peer_ended) on_peer_ended(one);
  }
}

// All that may not have got there, over all lanes: one that is about to end is one of them.
void Links::say(const Connection& connection) {
  std::vector<std::pair<LaneId, uint64_t>> words;
  {
    std::lock_guard lock(mutex_);
    const auto found = linked_.find(connection.id);
    if (found == linked_.end()) return;
    const auto& lanes = found->second.lanes;
    for (size_t i = 0; i < lanes.size(); ++i)
      if (lanes[i].said) words.push_back({{i, lanes[i].next_turn - 1}, *lanes[i].said});
  }
  for (const auto& lane : lanes_of(connection)) {
    std::lock_guard lock(lane->mutex);
    if (lane->dead || !lane->carries_messages()) continue;
    for (const auto& [id, taken] : words) lane->queue_control(FrameType::kEnded, {}, taken, id.packed());
    lane->woken = true;
    lane->lane->kick();
  }
}

Links::LaneState* Links::find(uint64_t connection, const LaneId& id) {
  const auto found = linked_.find(connection);
  if (found == linked_.end() || id.lane >= found->second.lanes.size()) return nullptr;
  return &found->second.lanes[id.lane];
}

void Links::on_ended(LaneEnded ended) {
  const auto connection = ended.connection;
  const auto id = ended.id;
  const uint64_t silent_since = ended.silent_since;
  {
    std::lock_guard lock(mutex_);
    if (auto* lane = find(connection->id, id)) {
      lane->said = ended.taken;
      lane->left = std::move(ended);
    }
  }
  say(*connection);
  if (silent_since != 0) {
    const size_t link = link_of(connection->id, id);
    for (const auto& lane : lanes_of(*connection)) {
      if (lane->link() != link || lane->heard() > silent_since) continue;
      std::lock_guard lock(lane->mutex);
      if (!lane->dead && connection->survives_without(*lane)) lane->end("its network acknowledges nothing");
    }
  }
  settle(connection->id, id);
}

void Links::on_peer_ended(const PeerEnded& ended) {
  const auto& connection = ended.connection;
  bool unknown = false;
  {
    std::lock_guard lock(mutex_);
    auto* lane = find(connection->id, ended.id);
    if (!lane || ended.id.turn > kMostTurns) return;
    unknown = ended.id.turn >= lane->next_turn;
    if (unknown) {  // it never came to be here
      if (lane->begun) return;
      lane->next_turn = ended.id.turn + 1;
      lane->said = 0;
    } else if (ended.id.turn + 1 == lane->next_turn && lane->begun && !lane->told) {
      lane->told = ended.taken;
    } else {
      return;  // it is told over each lane, and counts once
    }
  }
  if (unknown) return say(*connection);
  for (const auto& lane : lanes_of(*connection)) {
    if (lane->id() != ended.id) continue;
    std::lock_guard lock(lane->mutex);
    if (!lane->dead) lane->end("the peer ended it");
  }
  settle(connection->id, ended.id);
}

bool Links::another_lives(const TcpChannel& lane, uint64_t since) {
  const auto lanes = lanes_of(*lane.connection);
  return std::any_of(lanes.begin(), lanes.end(), [&](const auto& other) {
    return other->link() != lane.link() && !other->dead && other->heard() > since;
  });
}

void Links::ask_others(const TcpChannel& lane) {
  for (const auto& other : lanes_of(*lane.connection))
    if (other->link() != lane.link()) other->show_life();
}

// Both sides are done with a lane: what the peer has is sent, the rest leaves another way.
void Links::settle(uint64_t id, const LaneId& lane_id) {
  std::optional<LaneEnded> left;
  uint64_t told = 0;
  {
    std::lock_guard lock(mutex_);
    auto* lane = find(id, lane_id);
    if (!lane || !lane->left || !lane->told) return;
    left = std::exchange(lane->left, std::nullopt);
    told = *std::exchange(lane->told, std::nullopt);
    lane->begun = false;
    dial_again(linked_[id], *lane);
  }
  const auto& connection = left->connection;
  if (!left->kept.taken(*connection, told))
    return endpoint_.doom(connection, Status::kProtocolError, "the peer took what never left");
  left->kept.send_again(*connection);
  if (left->first)
    connection->let_go();
  else
    connection->kick();
}

void Links::dial_again(Linked& linked, LaneState& lane) {
  if (!linked.dials) return;
  const uint64_t now = now_ns();
  const bool lived = now - lane.since > kLongLifeNs;
  lane.backoff_ns = std::clamp(lived ? 0 : 2 * lane.backoff_ns, kFirstBackoffNs, kLongestBackoffNs);
  lane.due = now + lane.backoff_ns;
  next_due_ = std::min<uint64_t>(next_due_, lane.due);
  // Somebody is to be awake then.
  for (const auto& channel : linked.connection->channels()) {
    if (const uint64_t alarm = channel->alarm; alarm == 0 || alarm > lane.due) channel->alarm = lane.due;
    channel->lane->wake_by(lane.due);
  }
}

void Links::dial_due(uint64_t now) {
  struct Dial {
    std::shared_ptr<Connection> connection;
    SocketAddress address;
    Token token;
    LaneId id;
    size_t link;
  };
  std::vector<Dial> dials;
  {
    std::lock_guard lock(mutex_);
    uint64_t next = kNever;
    for (auto& [connection, linked] : linked_)
      for (size_t i = 0; i < linked.lanes.size(); ++i) {
        auto& lane = linked.lanes[i];
        if (lane.due <= now && lane.next_turn <= kMostTurns) {
          const size_t link = i % linked.addresses.size();
          lane.due = kNever;
          lane.since = now;
          lane.begun = true;
          lane.said.reset();
          dials.push_back({linked.connection, linked.addresses[link], linked.token, {i, lane.next_turn++}, link});
        }
        next = std::min(next, lane.due);
      }
    next_due_ = next;
  }
  for (const auto& dial : dials) {
    try {
      endpoint_.open_lane(dial.connection, dial.address, dial.token, dial.id, true, dial.link);
    } catch (const std::exception&) {
      ended({dial.connection, dial.id, false, 0, {}, 0});
    }
  }
}

}  // namespace sage_kvt
