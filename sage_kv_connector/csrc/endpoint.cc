// SPDX-License-Identifier: Apache-2.0
#include "endpoint.h"

#include <stdexcept>

namespace sage_kvt {
Endpoint::Endpoint(const EndpointOptions& options) : options_(options), wait_spin_ns_(options.spin_ns) {
  for (int i = 0; i < options.lanes; ++i)
    lanes_.push_back(std::make_unique<Lane>(options.spin_ns, [this] { tend(); }, options.stepped));
}

Endpoint::~Endpoint() { Endpoint::close(); }

void Endpoint::close() {
  std::vector<uint64_t> connections, windows;
  {
    std::unique_lock lock(mutex_);
    if (closed_.exchange(true)) return;
    for (const auto& [id, connection] : connections_) connections.push_back(id);
    for (const auto& [id, window] : windows_) windows.push_back(id);
  }
  for (auto& lane : lanes_) lane->stop();
  for (uint64_t id : connections) close_connection(id, Status::kCancelled, "closed here");
  {
    // A thread that waited may be at the end of one: its windows fail before they are closed.
    std::unique_lock lock(mutex_);
    ended_.wait(lock, [this] { return connections_.empty() && ending_ == 0; });
  }
  for (uint64_t id : windows) close_window(id);
  completions_.close();
}

Held Endpoint::held() {
  std::shared_lock lock(mutex_);
  return {connections_.size(), windows_.size(), post_owner_.size()};
}

void Endpoint::throw_if_closed() const {
  if (closed_) throw std::invalid_argument("the backend is closed");
}

uint64_t Endpoint::nanoseconds(double timeout_s) {
  if (!(timeout_s > 0) || timeout_s > kMaxTimeoutS)
    throw std::invalid_argument("timeout_s is " + std::to_string(timeout_s) + ", must be more than 0 and at most " +
                                std::to_string(static_cast<int>(kMaxTimeoutS)));
  return static_cast<uint64_t>(timeout_s * 1e9);
}

std::shared_ptr<Connection> Endpoint::new_connection(bool incoming) {
  if (incoming && unauthorized_ >= kMaxUnauthorizedConnections && !make_place()) return nullptr;
  auto connection = std::make_shared<Connection>(*this, next_id_++);
  connection->announced = !incoming;
  connection->counted = incoming;
  std::unique_lock lock(mutex_);
  if (closed_) return nullptr;
  unauthorized_ += incoming;
  connections_[connection->id] = connection;
  return connection;
}

bool Endpoint::make_place() {
  std::shared_ptr<Connection> oldest;
  {
    std::shared_lock lock(mutex_);
    for (const auto& [id, connection] : connections_)
      if (connection->counted && (!oldest || id < oldest->id)) oldest = connection;
  }
  if (!oldest || now_ns() - oldest->since < kSafePlaceNs) return false;
  close_connection(oldest->id, Status::kRefused, "others wait for its place, and it did not prove who it is");
  return unauthorized_ < kMaxUnauthorizedConnections;
}

void Endpoint::turned_away(const std::string& who, Status status, const std::string& why) {
  constexpr uint64_t kBetweenNs = 1000000000;
  ++counters.refused_connections;
  std::lock_guard lock(turned_away_mutex_);
  const uint64_t now = now_ns();
  if (turned_away_told_ != 0 && now - turned_away_told_ < kBetweenNs) {
    ++turned_away_untold_;
    return;
  }
  Event event;
  event.kind = EventKind::kTurnedAway;
  event.status = status;
  event.length = turned_away_untold_;
  event.detail = who + ": " + why;
  turned_away_told_ = now;
  turned_away_untold_ = 0;
  completions_.push(std::move(event));
}

void Endpoint::no_longer_counted(Connection& connection) {
  if (connection.counted.exchange(false)) --unauthorized_;
}

void Endpoint::forget(const std::shared_ptr<Connection>& connection) {
  no_longer_counted(*connection);
  connection->drop_channels();
  std::unique_lock lock(mutex_);
  connections_.erase(connection->id);
  ended_.notify_all();
}

std::shared_ptr<Connection> Endpoint::find_connection(uint64_t id) {
  std::shared_lock lock(mutex_);
  auto found = connections_.find(id);
  return found == connections_.end() ? nullptr : found->second;
}

std::shared_ptr<Window> Endpoint::find_window(uint64_t id) {
  std::shared_lock lock(mutex_);
  auto found = windows_.find(id);
  return found == windows_.end() ? nullptr : found->second;
}

void Endpoint::attach(const std::shared_ptr<Channel>& channel) {
  auto& lane = this->lane(next_lane_++);
  channel->lane = &lane;
  if (channel->connection->add_channel(channel)) {
    lane.add(channel);
  } else {
    std::lock_guard lock(channel->mutex);
    if (!channel->dead.exchange(true)) channel->shut();
  }
}

void Endpoint::emit(EventKind kind, uint64_t connection, const std::string& detail) {
  Event event;
  event.kind = kind;
  event.detail = detail;
  event.connection = connection;
  completions_.push(std::move(event));
}

void Endpoint::emit_message(Connection& connection, std::string payload) {
  ++counters.messages_received;
  connection.inbox_bytes += kEventBytes + payload.size();
  Event event;
  event.kind = EventKind::kMessage;
  event.connection = connection.id;
  event.payload = std::move(payload);
  completions_.push(std::move(event));
}

void Endpoint::authorize(uint64_t id) {
  auto connection = find_connection(id);
  if (!connection) return;
  connection->authorized = true;
  no_longer_counted(*connection);
  connection->kick();
}

ConnectionInfo Endpoint::info(uint64_t id) {
  auto connection = find_connection(id);
  return connection ? connection->info() : ConnectionInfo{};
}

void Endpoint::watch(uint64_t id, double timeout_s) {
  const uint64_t timeout = nanoseconds(timeout_s);
  auto connection = find_connection(id);
  if (!connection) return;
  connection->liveness.watch(timeout, now_ns());
  connection->wake_in_time();
}

void Endpoint::unwatch(uint64_t id) {
  if (auto connection = find_connection(id)) connection->liveness.unwatch();
}

void Endpoint::close_connection(uint64_t id, Status status, const std::string& detail) {
  auto connection = find_connection(id);
  if (!connection) return;
  const auto channels = connection->seal(status, detail);
  for (const auto& channel : channels) {
    std::lock_guard lock(channel->mutex);
    if (!channel->dead.exchange(true)) channel->shut();
  }
  connection->close();
  for (const auto& channel : channels) channel->lane->kick();  // it lets go of what is dead
}

void Endpoint::doom(const std::shared_ptr<Connection>& connection, Status status, const std::string& detail) {
  {
    std::lock_guard lock(doomed_mutex_);
    doomed_.push_back({connection, status, detail});
    any_doomed_ = true;
  }
  lanes_[0]->kick();
}

void Endpoint::tend() {
  bury_doomed();
  if (auto* tender = tender_.load()) tender->tend();
}

void Endpoint::bury_doomed() {
  if (!any_doomed_.exchange(false)) return;
  std::vector<Doomed> doomed;
  {
    std::lock_guard lock(doomed_mutex_);
    doomed.swap(doomed_);
  }
  for (const auto& d : doomed) close_connection(d.connection->id, d.status, d.detail);
}

void Endpoint::connection_closed(uint64_t id, Status status, const std::string& detail) {
  std::vector<std::shared_ptr<Window>> orphans;
  std::shared_ptr<Connection> gone;
  {
    std::unique_lock lock(mutex_);
    ++ending_;
    auto found = connections_.find(id);
    if (found != connections_.end()) {
      gone = found->second;
      no_longer_counted(*found->second);
      connections_.erase(found);
    }
    for (const auto& [window_id, window] : windows_)
      if (window->connection == id) orphans.push_back(window);
  }
  for (const auto& window : orphans) window_failed(window, Status::kConnectionLost, 0, window->size(), detail);
  forgotten(id);
  if (gone) tell_end(*gone, status, detail);
  std::unique_lock lock(mutex_);
  --ending_;
  ended_.notify_all();  // with the lock: whoever waits may destroy this
}

void Endpoint::tell_end(const Connection& connection, Status status, const std::string& detail) {
  if (!connection.announced) {
    // Who only came and went is nobody's business.
    if (status != Status::kConnectionLost && status != Status::kCancelled)
      turned_away(connection.info().peer, status, detail);
    return;
  }
  Event event;
  event.kind = EventKind::kClosed;
  event.connection = connection.id;
  event.status = status;
  event.detail = detail;
  event.offset = connection.traffic.sent;
  event.length = connection.traffic.landed;
  completions_.push(std::move(event));
}

std::vector<std::tuple<uint64_t, uint64_t, uint64_t>> Endpoint::traffic() {
  std::shared_lock lock(mutex_);
  std::vector<std::tuple<uint64_t, uint64_t, uint64_t>> out;
  out.reserve(connections_.size());
  for (const auto& [id, connection] : connections_)
    if (connection->announced) out.emplace_back(id, connection->traffic.sent, connection->traffic.landed);
  return out;
}

}  // namespace sage_kvt
