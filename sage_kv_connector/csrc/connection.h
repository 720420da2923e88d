// SPDX-License-Identifier: Apache-2.0
// One peer: its queues, shared by the channels that carry it.
#pragma once

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "event.h"
#include "liveness.h"
#include "measured.h"
#include "post.h"

namespace sage_kvt {

class Channel;
class Endpoint;

struct ConnectionInfo {
  std::string peer, mode, reason;
  bool crosses_wire = true;
  int lanes = 1;
  std::string local{};  // this side's own address, "" where there is none
};

// What is done on a connection whose end is told already, or a moment later. ConnectionError in Python.
class ConnectionClosed : public std::runtime_error {
 public:
  explicit ConnectionClosed(uint64_t id) : std::runtime_error("connection " + std::to_string(id) + " is closed") {}
};

// A window's owner has room for its first `parts` parts (csrc/parts).
struct Grant {
  uint64_t window, parts;
};

class Connection {
 public:
  Connection(Endpoint& endpoint, uint64_t id) : endpoint(endpoint), id(id) {}

  Endpoint& endpoint;
  const uint64_t id;
  const uint64_t since = now_ns();
  std::atomic<bool> authorized{false};
  std::atomic<bool> announced{false};  // the layer above knows it, so it gets a CLOSED
  std::atomic<bool> counted{false};    // among the endpoint's unauthorized ones

  // Cost of the events of this peer that nobody took yet; channels read no more while it is full.
  std::atomic<size_t> inbox_bytes{0};
  bool inbox_full() const;
  // Of the peer; the first channel looks after it.
  Liveness liveness;
  Traffic traffic;

  // -- work for channels

  // False if none waits; messages, notes and grants go over the first channel only, and not while the connection is
  // held; chunks once authorized. While there are paths, they take all chunks that they can carry.
  bool take_message(const Channel& channel, std::string* message);
  bool take_note(const Channel& channel, std::string* note);
  bool take_grant(const Channel& channel, Grant* grant);
  bool take_chunk(bool path, uint64_t max_bytes, size_t max_pieces, std::shared_ptr<Post>* post, Chunk* chunk);
  // A chunk that was taken did not get there, and may: another channel takes it. `plain`: no path can carry its post.
  void give_back(const std::shared_ptr<Post>& post, Chunk chunk, bool plain = false);
  // A chunk ended: where it was, or why it did not get there.
  void chunk_sent(const std::shared_ptr<Post>& post, uint64_t offset, uint64_t length);
  void chunk_failed(const std::shared_ptr<Post>& post, Status status, const std::string& detail);
  bool has_work() const;
  size_t queued_messages() const;
  bool has_work_for(const Channel& channel) const;

  // -- orders of the layer above; false or nullptr once closed

  bool queue_message(std::string message);
  // What one endpoint tells the other, and not the layer above.
  void queue_note(std::string note);
  // They left by a channel that is gone, and did not get there: they go before those that wait.
  void send_again(std::deque<std::string> messages, std::deque<std::string> notes);
  // A channel is gone that carried what has an order, and nobody knows yet what of it got there. Once for each.
  void hold() { ++held_; }
  void let_go();
  bool queue_post(const std::shared_ptr<Post>& post);
  // The last one of a window stands for those before it.
  void queue_grant(const Grant& grant);
  // The peer's, for our post into its window; nothing if there is none.
  void granted(const Grant& grant);
  // A post that waited may have more to cut; false if it does not wait (any more).
  bool resume(const std::shared_ptr<Post>& post);
  // The post if it had not ended, taken off the queue.
  std::shared_ptr<Post> stop_post(uint64_t post_id);
  // Reports SENT for a stopped post once nothing of it is in flight.
  void settle(const std::shared_ptr<Post>& post);

  std::vector<std::shared_ptr<Channel>> channels() const;
  // As `Channel::push`, if the first channel is free.
  bool push() const;
  // There is work: the lanes look at it.
  void kick() const;
  // The first channel's lane is awake when its peer is to be looked after.
  void wake_in_time() const;
  // False once sealed: the caller shuts the channel. A path comes before the others.
  bool add_channel(std::shared_ptr<Channel> channel);
  // So many paths can carry chunks: from the first on, the other channels leave chunks to them.
  void path_opened() { ++paths_; }
  void path_closed() { --paths_; }
  void drop_channels();
  // Another one is the first if it was that. False if none is left that carries messages.
  bool drop_channel(const Channel& channel);
  // Whether another one carries messages, and the connection goes on.
  bool survives_without(const Channel& channel) const;
  // From now on add_channel refuses; returns what is there. The first caller says why CLOSED comes.
  std::vector<std::shared_ptr<Channel>> seal(Status status, const std::string& detail);
  ConnectionInfo info() const;
  void set_info(const ConnectionInfo& info);

  // Ends everything once: posts, windows, then CLOSED. It is sealed and its channels are shut.
  void close();
  bool closed() const { return closed_; }

 private:
  // One of the queue that this channel may carry; queue_.end() if there is none.
  using Queue = std::map<std::pair<int, uint64_t>, std::shared_ptr<Post>>;
  Queue::const_iterator next_for(bool path) const;
  bool carries(bool path, const Post& post) const { return path ? !post.plain : post.plain || paths_ == 0; }
  bool ordered_may_leave(const Channel& channel) const;
  Channel* heir(const Channel& channel) const;
  struct Returned {
    std::shared_ptr<Post> post;
    Chunk chunk;
  };
  std::deque<Returned>::const_iterator returned_for(bool path) const;
  bool take_returned(bool path, std::shared_ptr<Post>* post, Chunk* chunk);
  // Nothing more of it leaves.
  void take_off(const std::shared_ptr<Post>& post);
  void chunk_over(const std::shared_ptr<Post>& post);
  void finish_locked(const std::shared_ptr<Post>& post);

  mutable std::mutex mutex_;
  std::deque<std::string> messages_, notes_;
  size_t message_bytes_ = 0;
  std::map<uint64_t, uint64_t> grants_;  // parts by window
  Queue queue_;
  std::deque<Returned> returned_;  // chunks that count as in flight
  std::atomic<int> paths_{0}, held_{0};
  std::unordered_map<uint64_t, std::shared_ptr<Post>> posts_;
  std::vector<std::shared_ptr<Channel>> channels_;
  ConnectionInfo info_;
  bool sealed_ = false;
  Status end_status_ = Status::kOk;
  std::string end_detail_;
  std::atomic<bool> closed_{false};
};

}  // namespace sage_kvt
