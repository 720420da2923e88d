// SPDX-License-Identifier: Apache-2.0
#include "endpoint.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace sage_kvt {
namespace {
// With more channels than this a waiting thread leaves them to their lanes.
constexpr size_t kMaxDrivenByWaiter = 4;
// A waiter whose events keep coming just after it slept spins up to this many times longer.
constexpr uint64_t kMostSpins = 4;
constexpr double kMaxTimeoutS = 86400;
// What an event costs besides its payload.
constexpr size_t kEventBytes = sizeof(Event);

bool fills_inbox(const Event& event) { return event.kind == EventKind::kMessage || event.kind == EventKind::kLanded; }
}  // namespace

Endpoint::Endpoint(const EndpointOptions& options) : options_(options), wait_spin_ns_(options.spin_ns) {
  for (int i = 0; i < options.lanes; ++i)
    lanes_.push_back(std::make_unique<Lane>(options.spin_ns, [this] { bury_doomed(); }));
}

Endpoint::~Endpoint() { close(); }

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
  for (uint64_t id : windows) close_window(id);
  completions_.close();
}

void Endpoint::throw_if_closed() const {
  if (closed_) throw std::invalid_argument("the backend is closed");
}

uint64_t Endpoint::deadline_after(double timeout_s) {
  if (!(timeout_s > 0) || timeout_s > kMaxTimeoutS)
    throw std::invalid_argument("timeout_s is " + std::to_string(timeout_s) + ", must be more than 0 and at most " +
                                std::to_string(static_cast<int>(kMaxTimeoutS)));
  return now_ns() + static_cast<uint64_t>(timeout_s * 1e9);
}

std::shared_ptr<Connection> Endpoint::new_connection(bool incoming) {
  if (incoming && unauthorized_ >= kMaxUnauthorizedConnections) return nullptr;
  auto connection = std::make_shared<Connection>(*this, next_id_++);
  connection->announced = !incoming;
  connection->counted = incoming;
  std::unique_lock lock(mutex_);
  if (closed_) return nullptr;
  unauthorized_ += incoming;
  connections_[connection->id] = connection;
  return connection;
}

void Endpoint::no_longer_counted(Connection& connection) {
  if (connection.counted.exchange(false)) --unauthorized_;
}

void Endpoint::forget(const std::shared_ptr<Connection>& connection) {
  no_longer_counted(*connection);
  connection->drop_channels();
  std::unique_lock lock(mutex_);
  connections_.erase(connection->id);
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

void Endpoint::emit(EventKind kind, uint64_t connection) {
  Event event;
  event.kind = kind;
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

std::vector<Event> Endpoint::poll(size_t max_events) {
  auto events = completions_.take(max_events);
  for (const auto& event : events) {
    if (!fills_inbox(event)) continue;
    auto connection = find_connection(event.connection);
    if (!connection) continue;
    const bool was_full = connection->inbox_full();
    connection->inbox_bytes -= kEventBytes + event.payload.size();
    if (!was_full || connection->inbox_full()) continue;
    for (const auto& channel : connection->channels()) channel->woken = true;
    kick(*connection);
  }
  return events;
}

void Endpoint::authorize(uint64_t id) {
  auto connection = find_connection(id);
  if (!connection) return;
  connection->authorized = true;
  no_longer_counted(*connection);
  kick(*connection);
}

ConnectionInfo Endpoint::info(uint64_t id) {
  auto connection = find_connection(id);
  return connection ? connection->info() : ConnectionInfo{};
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
  bool announced = false;
  {
    std::unique_lock lock(mutex_);
    auto found = connections_.find(id);
    if (found != connections_.end()) {
      announced = found->second->announced;
      no_longer_counted(*found->second);
      connections_.erase(found);
    }
    for (const auto& [window_id, window] : windows_)
      if (window->connection == id) orphans.push_back(window);
  }
  for (const auto& window : orphans) window_failed(window, Status::kConnectionLost, 0, window->size(), detail);
  forgotten(id);
  if (!announced) return;
  Event event;
  event.kind = EventKind::kClosed;
  event.connection = id;
  event.status = status;
  event.detail = detail;
  completions_.push(std::move(event));
}

void Endpoint::kick(Connection& connection) {
  for (const auto& channel : connection.channels()) channel->lane->kick();
}

bool Endpoint::send(uint64_t id, std::string message) {
  auto connection = find_connection(id);
  if (!connection) return true;
  const size_t most = connection->authorized ? kMaxMessageBytes : kMaxUnauthorizedMessageBytes;
  if (message.size() > most)
    throw std::invalid_argument("message has " + std::to_string(message.size()) + " bytes, at most " +
                                std::to_string(most) + " are allowed");
  if (!connection->queue_message(std::move(message))) return false;
  kick(*connection);
  return true;
}

uint64_t Endpoint::open_window(uint64_t id, const std::vector<Segment>& segments, uint64_t generation, bool notify) {
  if (!find_connection(id)) throw std::invalid_argument("connection " + std::to_string(id) + " is closed");
  if (generation == 0) throw std::invalid_argument("generation must not be 0");
  if (segments.empty()) throw std::invalid_argument("a window needs at least one segment");
  for (size_t i = 0; i < segments.size(); ++i)
    if (segments[i].length == 0) throw std::invalid_argument("segment " + std::to_string(i) + " has length 0");
  auto window =
      std::make_shared<Window>(next_id_++, id, generation, segments, notify, regions_.use(segments, "segment"));
  {
    std::unique_lock lock(mutex_);
    if (connections_.count(id) > 0) {
      windows_[window->id] = window;
      return window->id;
    }
  }
  regions_.release(window->regions);
  throw std::invalid_argument("connection " + std::to_string(id) + " is closed");
}

WindowDescriptor Endpoint::describe(uint64_t id) {
  auto window = find_window(id);
  if (!window) throw std::invalid_argument("window " + std::to_string(id) + " is unknown");
  return {window->id, window->generation, window->size()};
}

uint64_t Endpoint::close_window(uint64_t id) {
  std::shared_ptr<Window> window;
  {
    std::unique_lock lock(mutex_);
    auto found = windows_.find(id);
    if (found == windows_.end()) return 0;
    window = found->second;
    windows_.erase(found);
  }
  const uint64_t landed = window->close();
  regions_.release(window->regions);
  return landed;
}

uint64_t Endpoint::post(uint64_t id, const WindowDescriptor& target, const std::vector<Descriptor>& descriptors,
                        uint64_t generation, int priority, bool checksum) {
  auto connection = find_connection(id);
  if (!connection) throw std::invalid_argument("connection " + std::to_string(id) + " is closed");
  if (generation == 0) throw std::invalid_argument("generation must not be 0");
  auto post = std::make_shared<Post>();
  post->descriptors = merge_descriptors(descriptors);
  if (post->descriptors.empty()) throw std::invalid_argument("descriptors hold no bytes");
  std::vector<Segment> local;
  local.reserve(descriptors.size());
  for (const auto& d : descriptors)
    if (d.length > 0) local.push_back({d.local, d.length});
  for (const auto& d : post->descriptors) {
    if (d.remote > target.size || d.length > target.size - d.remote)
      throw std::invalid_argument("descriptor at offset " + std::to_string(d.remote) + ", length " +
                                  std::to_string(d.length) + " leaves the window of " + std::to_string(target.size) +
                                  " bytes");
    post->total += d.length;
  }
  post->regions = regions_.use(local, "descriptor");
  post->id = next_id_++;
  post->window = target.window;
  post->generation = generation;
  post->priority = priority;
  post->checksum = checksum;
  const bool small = post->total <= options_.inline_bytes;
  {
    std::unique_lock lock(mutex_);
    post_owner_[post->id] = connection;
  }
  if (!connection->queue_post(post)) {
    post_ended(*post);
    throw std::invalid_argument("connection " + std::to_string(id) + " is closed");
  }
  if (small) {
    auto channels = connection->channels();
    if (!channels.empty()) {
      std::unique_lock lock(channels[0]->mutex, std::try_to_lock);
      if (lock.owns_lock() && !channels[0]->dead) {
        channels[0]->progress();
        channels[0]->hot_until = now_ns() + options_.spin_ns;
        if (!connection->has_work() && (channels[0]->dead || !channels[0]->stuck())) return post->id;
      }
    }
  }
  kick(*connection);
  return post->id;
}

void Endpoint::post_ended(const Post& post) {
  regions_.release(post.regions);
  std::unique_lock lock(mutex_);
  post_owner_.erase(post.id);
}

void Endpoint::cancel(uint64_t id) {
  std::shared_ptr<Connection> connection;
  {
    std::shared_lock lock(mutex_);
    auto found = post_owner_.find(id);
    if (found == post_owner_.end()) return;
    connection = found->second;
  }
  auto post = connection->stop_post(id);
  if (!post) return;
  for (const auto& channel : connection->channels()) {
    std::lock_guard lock(channel->mutex);
    if (!channel->dead) channel->revoke(*post);
  }
  connection->settle(post);
}

void Endpoint::window_landed(const std::shared_ptr<Window>& window, uint64_t offset, uint64_t length) {
  counters.bytes_landed += length;
  ++counters.chunks_landed;
  Event event;
  event.connection = window->connection;
  event.id = window->id;
  // Told before it counts, so that another lane's last chunk can't end the window first.
  if (window->notify_chunks) {
    event.kind = EventKind::kLanded;
    event.offset = offset;
    event.length = length;
    if (auto connection = find_connection(window->connection)) connection->inbox_bytes += kEventBytes;
    completions_.push(event);
  }
  if (!window->land(length)) return;
  event.kind = EventKind::kWindowDone;
  event.offset = 0;
  event.length = window->size();
  completions_.push(std::move(event));
}

void Endpoint::window_failed(const std::shared_ptr<Window>& window, Status status, uint64_t offset, uint64_t length,
                             const std::string& detail) {
  if (status == Status::kChecksumMismatch) ++counters.checksum_failures;
  if (status == Status::kStaleGeneration) ++counters.stale_chunks;
  if (!window->fail()) return;
  Event event;
  event.kind = EventKind::kWindowFailed;
  event.connection = window->connection;
  event.id = window->id;
  event.status = status;
  event.offset = offset;
  event.length = length;
  event.detail = detail;
  completions_.push(std::move(event));
}

std::vector<std::shared_ptr<Channel>> Endpoint::all_channels() {
  std::vector<std::shared_ptr<Channel>> all;
  for (const auto& lane : lanes_)
    for (auto& channel : lane->channels()) all.push_back(std::move(channel));
  return all;
}

bool Endpoint::wait(double timeout_s) {
  if (!completions_.empty()) return true;
  const uint64_t begun = now_ns();
  uint64_t deadline = begun;  // not a number is no time either
  if (timeout_s > kMaxTimeoutS)
    deadline = std::numeric_limits<uint64_t>::max();
  else if (timeout_s > 0)
    deadline += static_cast<uint64_t>(timeout_s * 1e9);
  auto channels = all_channels();
  if (options_.spin_ns > 0 && channels.size() <= kMaxDrivenByWaiter) {
    for (const auto& channel : channels) {
      std::lock_guard lock(channel->mutex);
      if (!channel->dead) channel->disarm(true);
    }
    const uint64_t spin_ns = wait_spin_ns_;
    Spinner spinner;
    uint64_t spin_until = std::min(begun + spin_ns, deadline);
    while (completions_.empty() && now_ns() < spin_until) {
      for (const auto& channel : channels) {
        std::unique_lock lock(channel->mutex, std::try_to_lock);
        if (lock.owns_lock() && !channel->dead && channel->progress())
          spin_until = std::min(now_ns() + spin_ns, deadline);
      }
      bury_doomed();
      spinner.turn();
    }
    bool left = false;
    for (const auto& channel : channels) {
      std::lock_guard lock(channel->mutex);
      if (!channel->dead && !channel->arm()) left = true;
    }
    if (left)
      for (const auto& lane : lanes_) lane->kick();
  }
  const uint64_t asleep = now_ns();
  const bool slept = completions_.empty();
  const bool found = completions_.wait(deadline);
  // Two sides that fell asleep on each other pay a wake-up each time; a longer spin brings them back in step.
  if (slept)
    wait_spin_ns_ = found && now_ns() - asleep < 4 * options_.spin_ns
                        ? std::min<uint64_t>(2 * wait_spin_ns_, kMostSpins * options_.spin_ns)
                        : options_.spin_ns;
  return found;
}

}  // namespace sage_kvt
