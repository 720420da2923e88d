// SPDX-License-Identifier: Apache-2.0
#include "endpoint.h"

#include <poll.h>

#include <algorithm>
#include <stdexcept>

namespace sage_kvt {
namespace {
// With more channels than this a waiting thread leaves them to their lanes.
constexpr size_t kMaxDrivenByWaiter = 4;
// A waiter whose events keep coming just after it slept spins up to this many times longer.
constexpr uint64_t kMostSpins = 4;
}  // namespace

Endpoint::Endpoint(const EndpointOptions& options) : options_(options), wait_spin_ns_(options.spin_ns) {
  for (int i = 0; i < options.lanes; ++i)
    lanes_.push_back(std::make_unique<Lane>(options.spin_ns, [this] { bury_doomed(); }));
}

Endpoint::~Endpoint() { close(); }

void Endpoint::close() {
  if (closed_.exchange(true)) return;
  std::vector<uint64_t> ids;
  {
    std::shared_lock lock(mutex_);
    for (const auto& [id, connection] : connections_) ids.push_back(id);
  }
  for (uint64_t id : ids) close_connection(id, Status::kCancelled, "closed here");
  for (auto& lane : lanes_) lane->stop();
}

void Endpoint::deregister_memory(uint64_t region) {
  const std::string name = "memory region " + std::to_string(region);
  MemoryRegions::Region bounds;
  if (!regions_.get(region, &bounds)) throw std::invalid_argument(name + " is unknown");
  std::vector<std::shared_ptr<Connection>> connections;  // asked without our lock: theirs is the outer one
  {
    std::shared_lock lock(mutex_);
    for (const auto& [id, window] : windows_)
      if (window->touches(bounds)) throw std::invalid_argument(name + " is used by window " + std::to_string(id));
    for (const auto& [id, connection] : connections_) connections.push_back(connection);
  }
  for (const auto& connection : connections)
    if (connection->posts_touch(bounds)) throw std::invalid_argument(name + " is used by a post that has not ended");
  regions_.remove(region);
}

std::shared_ptr<Connection> Endpoint::new_connection(bool incoming) {
  if (closed_ || (incoming && unauthorized_ >= kMaxUnauthorizedConnections)) return nullptr;
  auto connection = std::make_shared<Connection>(*this, next_id_++);
  connection->announced = !incoming;
  connection->counted = incoming;
  unauthorized_ += incoming;
  std::unique_lock lock(mutex_);
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
  channel->connection->add_channel(channel);
  lane(next_lane_++).add(channel);
}

void Endpoint::emit(EventKind kind, uint64_t connection, std::string payload) {
  Event event;
  event.kind = kind;
  event.connection = connection;
  event.payload = std::move(payload);
  completions_.push(std::move(event));
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
  for (const auto& channel : connection->channels()) {
    std::lock_guard lock(channel->mutex);
    if (!channel->dead.exchange(true)) channel->shut();
  }
  connection->close(status, detail);
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
  for (const auto& channel : connection.channels())
    if (channel->lane) channel->lane->kick();
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
  const size_t outside = regions_.first_outside(
      segments, [](const Segment& s) { return s.address; }, [](const Segment& s) { return s.length; });
  if (outside < segments.size())
    throw std::invalid_argument("segment [" + std::to_string(segments[outside].address) + ", +" +
                                std::to_string(segments[outside].length) + ") is not registered memory");
  auto window = std::make_shared<Window>(next_id_++, id, generation, segments, notify);
  std::unique_lock lock(mutex_);
  if (connections_.find(id) == connections_.end())
    throw std::invalid_argument("connection " + std::to_string(id) + " is closed");
  windows_[window->id] = window;
  return window->id;
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
  return window->close();
}

uint64_t Endpoint::post(uint64_t id, const WindowDescriptor& target, const std::vector<Descriptor>& descriptors,
                        uint64_t generation, int priority, bool checksum) {
  auto connection = find_connection(id);
  if (!connection) throw std::invalid_argument("connection " + std::to_string(id) + " is closed");
  auto post = std::make_shared<Post>();
  post->descriptors = merge_descriptors(descriptors);
  if (post->descriptors.empty()) throw std::invalid_argument("descriptors hold no bytes");
  const size_t outside = regions_.first_outside(
      post->descriptors, [](const Descriptor& d) { return d.local; }, [](const Descriptor& d) { return d.length; });
  if (outside < post->descriptors.size())
    throw std::invalid_argument("descriptor [" + std::to_string(post->descriptors[outside].local) + ", +" +
                                std::to_string(post->descriptors[outside].length) + ") is not registered memory");
  for (const auto& d : post->descriptors) {
    if (d.remote > target.size || d.length > target.size - d.remote)
      throw std::invalid_argument("descriptor at offset " + std::to_string(d.remote) + ", length " +
                                  std::to_string(d.length) + " leaves the window of " + std::to_string(target.size) +
                                  " bytes");
    post->total += d.length;
  }
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
    post_ended(post->id);
    throw std::invalid_argument("connection " + std::to_string(id) + " is closed");
  }
  if (small) {
    auto channels = connection->channels();
    if (!channels.empty()) {
      std::unique_lock lock(channels[0]->mutex, std::try_to_lock);
      if (lock.owns_lock() && !channels[0]->dead) {
        channels[0]->progress();
        channels[0]->hot_until = now_ns() + options_.spin_ns;
        if (!connection->has_work()) return post->id;
      }
    }
  }
  kick(*connection);
  return post->id;
}

void Endpoint::post_ended(uint64_t id) {
  std::unique_lock lock(mutex_);
  post_owner_.erase(id);
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
  const bool complete = window->land(length);
  Event event;
  event.connection = window->connection;
  event.id = window->id;
  if (window->notify_chunks) {
    event.kind = EventKind::kLanded;
    event.offset = offset;
    event.length = length;
    completions_.push(event);
  }
  if (complete) {
    event.kind = EventKind::kWindowDone;
    event.offset = 0;
    event.length = window->size();
    completions_.push(std::move(event));
  }
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
  const auto deadline = begun + static_cast<uint64_t>(std::max(0.0, timeout_s) * 1e9);
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
  while (completions_.empty()) {
    const uint64_t now = now_ns();
    if (now >= deadline) return false;
    pollfd p{completions_.fd(), POLLIN, 0};
    const auto ms = static_cast<int>(std::min<uint64_t>((deadline - now + 999999) / 1000000, 60000));
    ::poll(&p, 1, ms);
  }
  // Two sides that fell asleep on each other pay a wake-up each time; a longer spin brings them back in step.
  if (slept)
    wait_spin_ns_ = now_ns() - asleep < 4 * options_.spin_ns
                        ? std::min<uint64_t>(2 * wait_spin_ns_, kMostSpins * options_.spin_ns)
                        : options_.spin_ns;
  return true;
}

}  // namespace sage_kvt
