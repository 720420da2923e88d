// SPDX-License-Identifier: Apache-2.0
// What an endpoint does for transfers: messages, windows, posts, and how they end.
#include <stdexcept>

#include "endpoint.h"

namespace sage_kvt {

bool Endpoint::send(uint64_t id, std::string message) {
  auto connection = find_connection(id);
  if (!connection) return true;
  const size_t most = connection->authorized ? kMaxMessageBytes : kMaxUnauthorizedMessageBytes;
  if (message.size() > most)
    throw std::invalid_argument("message has " + std::to_string(message.size()) + " bytes, at most " +
                                std::to_string(most) + " are allowed");
  if (!connection->queue_message(std::move(message))) return false;
  connection->kick();
  return true;
}

uint64_t Endpoint::open_window(uint64_t id, const std::vector<Segment>& segments, uint64_t generation, bool notify) {
  if (!find_connection(id)) throw ConnectionClosed(id);
  if (segments.empty()) throw std::invalid_argument("a window needs at least one segment");
  for (size_t i = 0; i < segments.size(); ++i)
    if (segments[i].length == 0) throw std::invalid_argument("segment " + std::to_string(i) + " has length 0");
  return open_window(id, std::make_unique<SegmentSpace>(segments), segments, generation, notify);
}

uint64_t Endpoint::open_window(uint64_t id, std::unique_ptr<Space> space, const std::vector<Segment>& memory,
                               uint64_t generation, bool notify) {
  if (generation == 0) throw std::invalid_argument("generation must not be 0");
  auto window =
      std::make_shared<Window>(next_id_++, id, generation, std::move(space), notify, regions_.use(memory, "segment"));
  {
    std::unique_lock lock(mutex_);
    if (connections_.count(id) > 0) {
      windows_[window->id] = window;
      return window->id;
    }
  }
  regions_.release(window->regions);
  throw ConnectionClosed(id);
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
  auto post = std::make_shared<DescriptorPost>(descriptors);
  if (post->descriptors.empty()) throw std::invalid_argument("descriptors hold no bytes");
  std::vector<Segment> local;
  local.reserve(descriptors.size());
  for (const auto& d : descriptors)
    if (d.length > 0) local.push_back({d.local, d.length});
  for (const auto& d : post->descriptors)
    if (d.remote > target.size || d.length > target.size - d.remote)
      throw std::invalid_argument("descriptor at offset " + std::to_string(d.remote) + ", length " +
                                  std::to_string(d.length) + " leaves the window of " + std::to_string(target.size) +
                                  " bytes");
  return this->post(id, target, post, local, {generation, priority, checksum});
}

uint64_t Endpoint::post(uint64_t id, const WindowDescriptor& target, const std::shared_ptr<Post>& post,
                        const std::vector<Segment>& memory, const PostOptions& how) {
  auto connection = find_connection(id);
  if (!connection) throw ConnectionClosed(id);
  if (how.generation == 0) throw std::invalid_argument("generation must not be 0");
  post->regions = regions_.use(memory, "descriptor");
  post->id = next_id_++;
  post->window = target.window;
  post->generation = how.generation;
  post->priority = how.priority;
  post->checksum = how.checksum;
  const bool small = post->total <= options_.inline_bytes;
  {
    std::unique_lock lock(mutex_);
    post_owner_[post->id] = connection;
  }
  if (!connection->queue_post(post)) {
    post_ended(*post);
    throw ConnectionClosed(id);
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
  connection->kick();
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

void Endpoint::window_landed(Connection& connection, const std::shared_ptr<Window>& window, uint64_t offset,
                             uint64_t length) {
  connection.traffic.landed += length;
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
    connection.inbox_bytes += kEventBytes;
    completions_.push(event);
  }
  if (!window->land(offset, length)) return;
  event.kind = EventKind::kWindowDone;
  event.offset = 0;
  event.length = window->size();
  event.began_ns = window->began_ns();
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
  event.began_ns = window->began_ns();
  completions_.push(std::move(event));
}

}  // namespace sage_kvt
