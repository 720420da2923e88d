// SPDX-License-Identifier: Apache-2.0
#include "connection.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "endpoint.h"

namespace sage_kvt {
namespace {
// A peer that reads nothing can't make us keep more than this.
constexpr size_t kMaxQueuedMessageBytes = 16u << 20;
// Nor one that sends more than the layer above takes.
constexpr size_t kMaxInboxBytes = 16u << 20, kMaxUnauthorizedInboxBytes = 1u << 20;
}  // namespace

bool Connection::ordered_may_leave(const Channel& channel) const { return channel.first && held_ == 0; }

bool Connection::take_message(const Channel& channel, std::string* message) {
  std::lock_guard lock(mutex_);
  if (messages_.empty() || !ordered_may_leave(channel)) return false;
  *message = std::move(messages_.front());
  messages_.pop_front();
  message_bytes_ -= message->size();
  return true;
}

bool Connection::take_note(const Channel& channel, std::string* note) {
  std::lock_guard lock(mutex_);
  if (notes_.empty() || !ordered_may_leave(channel)) return false;
  *note = std::move(notes_.front());
  notes_.pop_front();
  return true;
}

bool Connection::take_grant(const Channel& channel, Grant* grant) {
  std::lock_guard lock(mutex_);
  if (grants_.empty() || !ordered_may_leave(channel)) return false;
  const auto next = grants_.begin();
  *grant = {next->first, next->second};
  grants_.erase(next);
  return true;
}

Connection::Queue::const_iterator Connection::next_for(bool path) const {
  if (!authorized) return queue_.end();
  return std::find_if(queue_.begin(), queue_.end(), [&](const auto& entry) { return carries(path, *entry.second); });
}

std::deque<Connection::Returned>::const_iterator Connection::returned_for(bool path) const {
  return std::find_if(returned_.begin(), returned_.end(), [&](const auto& one) { return carries(path, *one.post); });
}

bool Connection::take_returned(bool path, std::shared_ptr<Post>* post, Chunk* chunk) {
  const auto found = returned_for(path);
  if (found == returned_.end()) return false;
  *post = found->post;
  *chunk = found->chunk;
  returned_.erase(found);
  return true;
}

bool Connection::take_chunk(bool path, uint64_t max_bytes, size_t max_pieces, std::shared_ptr<Post>* post,
                            Chunk* chunk) {
  std::lock_guard lock(mutex_);
  if (take_returned(path, post, chunk)) return true;
  for (auto next = next_for(path); next != queue_.end(); next = next_for(path)) {
    const auto found = next->second;
    *chunk = found->cut(max_bytes, max_pieces);
    const bool refused = found->status != Status::kOk;
    if (found->all_cut() || found->waits() || refused) queue_.erase(next);
    if (chunk->length > 0) {
      if (found->began_ns == 0) found->began_ns = now_ns();
      chunk->ack_later = found->waits() && !found->needs_acks();
      ++found->chunks_in_flight;
      *post = found;
      return true;
    }
    if (refused && found->chunks_in_flight == 0) finish_locked(found);
  }
  return false;
}

void Connection::give_back(const std::shared_ptr<Post>& post, Chunk chunk, bool plain) {
  std::lock_guard lock(mutex_);
  post->plain |= plain;
  if (closed_) return;
  if (post->status == Status::kOk)
    returned_.push_back({post, std::move(chunk)});
  else
    chunk_over(post);
}

void Connection::chunk_sent(const std::shared_ptr<Post>& post, uint64_t offset, uint64_t length) {
  traffic.sent += length;
  std::lock_guard lock(mutex_);
  post->sent(offset, length);
  chunk_over(post);
}

void Connection::chunk_failed(const std::shared_ptr<Post>& post, Status status, const std::string& detail) {
  std::lock_guard lock(mutex_);
  if (post->status == Status::kOk) {
    post->status = status;
    post->detail = detail;
    take_off(post);
  }
  chunk_over(post);
}

void Connection::take_off(const std::shared_ptr<Post>& post) {
  queue_.erase({post->priority, post->id});
  post->chunks_in_flight -= std::erase_if(returned_, [&](const auto& one) { return one.post == post; });
}

void Connection::chunk_over(const std::shared_ptr<Post>& post) {
  --post->chunks_in_flight;
  if (post->chunks_in_flight == 0 && (post->all_cut() || post->status != Status::kOk)) finish_locked(post);
}

bool Connection::inbox_full() const {
  return inbox_bytes >= (authorized ? kMaxInboxBytes : kMaxUnauthorizedInboxBytes);
}

bool Connection::has_work() const {
  std::lock_guard lock(mutex_);
  return !messages_.empty() || !notes_.empty() || !grants_.empty() || !queue_.empty() || !returned_.empty();
}

size_t Connection::queued_messages() const {
  std::lock_guard lock(mutex_);
  return messages_.size();
}

bool Connection::has_work_for(const Channel& channel) const {
  std::lock_guard lock(mutex_);
  const bool path = channel.is_path();
  if (next_for(path) != queue_.end() || returned_for(path) != returned_.end()) return true;
  return (!messages_.empty() || !notes_.empty() || !grants_.empty()) && ordered_may_leave(channel);
}

bool Connection::queue_message(std::string message) {
  std::lock_guard lock(mutex_);
  if (closed_) return true;  // CLOSED is on its way; a message more or less makes no difference
  if (message_bytes_ + message.size() > kMaxQueuedMessageBytes) return false;
  message_bytes_ += message.size();
  messages_.push_back(std::move(message));
  return true;
}

void Connection::queue_note(std::string note) {
  {
    std::lock_guard lock(mutex_);
    if (closed_) return;
    notes_.push_back(std::move(note));
  }
  kick();
}

void Connection::send_again(std::deque<std::string> messages, std::deque<std::string> notes) {
  std::lock_guard lock(mutex_);
  if (closed_) return;
  for (const auto& message : messages) message_bytes_ += message.size();
  messages_.insert(messages_.begin(), std::move_iterator(messages.begin()), std::move_iterator(messages.end()));
  notes_.insert(notes_.begin(), std::move_iterator(notes.begin()), std::move_iterator(notes.end()));
}

void Connection::let_go() {
  --held_;
  kick();
}

void Connection::queue_grant(const Grant& grant) {
  std::lock_guard lock(mutex_);
  if (closed_) return;
  auto& parts = grants_[grant.window];
  parts = std::max(parts, grant.parts);
}

void Connection::granted(const Grant& grant) {
  std::lock_guard lock(mutex_);
  for (const auto& [id, post] : posts_)
    if (post->window == grant.window) post->granted(grant.parts);
}

bool Connection::queue_post(const std::shared_ptr<Post>& post) {
  std::lock_guard lock(mutex_);
  if (closed_) return false;
  post->queued_ns = now_ns();
  queue_[{post->priority, post->id}] = post;
  posts_[post->id] = post;
  return true;
}

bool Connection::resume(const std::shared_ptr<Post>& post) {
  std::lock_guard lock(mutex_);
  if (closed_ || post->status != Status::kOk || post->all_cut() || posts_.count(post->id) == 0) return false;
  return queue_.emplace(std::make_pair(post->priority, post->id), post).second;
}

std::shared_ptr<Post> Connection::stop_post(uint64_t post_id) {
  std::lock_guard lock(mutex_);
  auto found = posts_.find(post_id);
  if (found == posts_.end()) return nullptr;
  auto post = found->second;
  if (post->status == Status::kOk) post->status = Status::kCancelled;
  take_off(post);
  return post;
}

void Connection::settle(const std::shared_ptr<Post>& post) {
  std::lock_guard lock(mutex_);
  if (post->chunks_in_flight == 0) finish_locked(post);
}

void Connection::finish_locked(const std::shared_ptr<Post>& post) {
  if (posts_.erase(post->id) == 0) return;
  post->finished();
  Event event;
  event.kind = EventKind::kSent;
  event.connection = id;
  event.id = post->id;
  event.status = post->status;
  event.length = post->status == Status::kOk ? post->total : 0;
  event.detail = post->detail;
  event.began_ns = post->began_ns;
  const auto& options = endpoint.options();
  if (options.measures && post->status == Status::kOk && post->total <= options.inline_bytes)
    endpoint.counters.small_posts.add(now_ns() - post->queued_ns);
  endpoint.post_ended(*post);
  endpoint.completions().push(std::move(event));
}

std::vector<std::shared_ptr<Channel>> Connection::channels() const {
  std::lock_guard lock(mutex_);
  return channels_;
}

bool Connection::push() const {
  std::shared_ptr<Channel> first;
  {
    std::lock_guard lock(mutex_);
    if (!authorized || channels_.empty()) return false;
    first = channels_.front();
  }
  std::unique_lock lock(first->mutex, std::try_to_lock);
  return lock.owns_lock() && !first->dead && first->push();
}

void Connection::kick() const {
  for (const auto& channel : channels()) {
    channel->woken = true;
    channel->lane->kick();
  }
}

void Connection::wake_in_time() const {
  for (const auto& channel : channels())
    if (channel->first) channel->lane->wake_by(liveness.due());
}

bool Connection::add_channel(std::shared_ptr<Channel> channel) {
  std::lock_guard lock(mutex_);
  if (sealed_) return false;
  channel->first = channels_.empty();
  channels_.insert(channel->is_path() ? channels_.begin() : channels_.end(), std::move(channel));
  return true;
}

void Connection::drop_channels() {
  std::vector<std::shared_ptr<Channel>> dropped;
  std::lock_guard lock(mutex_);
  dropped.swap(channels_);
}

bool Connection::drop_channel(const Channel& channel) {
  std::lock_guard lock(mutex_);
  auto* const next = heir(channel);
  std::erase_if(channels_, [&](const auto& known) { return known.get() == &channel; });
  if (next && channel.first) {
    next->first = true;
    next->woken = true;
    next->lane->kick();
  }
  return next != nullptr;
}

bool Connection::survives_without(const Channel& channel) const {
  std::lock_guard lock(mutex_);
  return !sealed_ && heir(channel) != nullptr;
}

// The best over another link: what ended one channel may be about to end those beside it.
Channel* Connection::heir(const Channel& channel) const {
  Channel* found = nullptr;
  for (const auto& other : channels_)
    if (other.get() != &channel && !other->dead && other->carries_messages() &&
        (!found || (found->link() == channel.link() && other->link() != channel.link())))
      found = other.get();
  return found;
}

std::vector<std::shared_ptr<Channel>> Connection::seal(Status status, const std::string& detail) {
  std::lock_guard lock(mutex_);
  if (!std::exchange(sealed_, true)) {
    end_status_ = status;
    end_detail_ = detail;
  }
  return channels_;
}

ConnectionInfo Connection::info() const {
  std::lock_guard lock(mutex_);
  ConnectionInfo info = info_;
  // Not those that are only being set up.
  info.lanes = static_cast<int>(std::count_if(channels_.begin(), channels_.end(), [](const auto& channel) {
    return !channel->dead && (channel->is_path() || channel->carries_messages());
  }));
  return info;
}

void Connection::set_info(const ConnectionInfo& info) {
  std::lock_guard lock(mutex_);
  info_ = info;
}

void Connection::close() {
  {
    std::lock_guard lock(mutex_);
    if (closed_.exchange(true)) return;
    messages_.clear();
    notes_.clear();
    grants_.clear();
    queue_.clear();
    returned_.clear();
    while (!posts_.empty()) {
      auto post = posts_.begin()->second;
      if (post->status == Status::kOk) post->status = Status::kConnectionLost;
      finish_locked(post);
    }
    channels_.clear();
  }
  endpoint.connection_closed(id, end_status_, end_detail_);
}

}  // namespace sage_kvt
