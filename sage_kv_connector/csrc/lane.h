// SPDX-License-Identifier: Apache-2.0
// A lane: one thread that drives channels, spins briefly after activity and then sleeps in epoll.
//
// A channel is driven under its own mutex, by its lane or by a thread that waits for
// completions (Endpoint::wait) or posts (small posts leave at once).
#pragma once

#include <sys/epoll.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "connection.h"
#include "listener.h"

namespace sage_kvt {

class Lane;

// One turn of a spin: lets another thread of this core run now and then, which may be the very peer that
// is waited for.
class Spinner {
 public:
  void turn();

 private:
  unsigned turns_ = 0;
};

class Channel {
 public:
  explicit Channel(std::shared_ptr<Connection> connection) : connection(std::move(connection)) {}
  virtual ~Channel() = default;

  std::mutex mutex;
  const std::shared_ptr<Connection> connection;
  Lane* lane = nullptr;                // set once, before the channel is published, as is
  std::atomic<bool> first{false};      // of its connection: it carries messages, and looks after the peer
  std::atomic<uint64_t> hot_until{0};  // spinning is worth it until then
  std::atomic<bool> woken{true};       // something happened that `progress` has not seen yet
  std::atomic<bool> resting{false};    // whatever happens makes it `woken`: nothing is to be looked at before
  std::atomic<uint64_t> deadline{0};   // set-up must be over by then (now_ns), 0: it is
  std::atomic<uint64_t> alarm{0};      // `alarmed` is to be called then (now_ns), 0: it is not
  std::atomic<bool> dead{false};

  // When something is to be done even if nothing happens (now_ns), 0: never.
  uint64_t due() const;

  // All below with `mutex` held.
  virtual bool progress() = 0;  // true if something moved
  // Sends a chunk that waits if no byte of it is copied or summed up here, and does nothing else: for an engine's own
  // thread. True if nothing is left to send.
  virtual bool push() { return false; }
  virtual bool arm() = 0;  // before sleeping: false if work is there already
  // Work was taken off the connection that waits here for `arm`'s wake-up.
  virtual bool stuck() const = 0;
  virtual void expire() = 0;  // the deadline is over
  virtual void ping() = 0;    // have the peer's lane show that it lives
  virtual void alarmed(uint64_t) {}
  // Chunks go over such channels first, and nothing else does.
  virtual bool is_path() const { return false; }
  // Its connection does without: it ends alone.
  virtual bool expendable() const { return false; }
  // It may be the first of its connection. Without its mutex.
  virtual bool carries_messages() const { return !is_path(); }
  // Of those that a connection has: which network it goes by.
  virtual size_t link() const { return 0; }
  // It is due.
  void on_time(uint64_t now);
  // `arm`, and `disarm`.
  bool rest();
  void rouse(bool lane_sleeps);
  // Somebody polls again, so wake-ups cost the peer for nothing. `lane_sleeps`: a waiting thread
  // polls while the lane stays in epoll, which must not wake either.
  virtual void disarm(bool lane_sleeps) = 0;
  virtual void revoke(const Post& post) = 0;  // what is in flight of it is void; ends those chunks
  virtual void shut() = 0;                    // close descriptors, end chunks in flight
  virtual std::vector<int> fds() const = 0;

 protected:
  // Shuts it, and ends its connection a moment later.
  void broken(Status status, const std::string& detail);
  // Why it is being shut; kOk: its connection ends.
  Status broke_with_ = Status::kOk;
};

class Lane {
  static constexpr uint64_t kForEver = UINT64_MAX;

 public:
  // `housekeeping` runs on the lane's thread after it drove channels, without locks.
  // `stepped`: without a thread, `step` is all that drives it.
  Lane(uint64_t spin_ns, std::function<void()> housekeeping, bool stepped = false);
  ~Lane();

  void add(const std::shared_ptr<Channel>& channel);
  // Called back on the lane's thread for each socket that the listener accepted.
  void watch(std::unique_ptr<Listener> listener, std::function<void(int)> on_accepted);
  void kick();
  // It looks at its channels at that moment at the latest.
  void wake_by(uint64_t due);
  // Before it is closed: what a peer shares stays in epoll as long as the peer keeps it open.
  void forget(int fd);
  void modify(int fd, uint32_t events, void* owner);
  std::vector<std::shared_ptr<Channel>> channels();
  // One look at every channel, of a lane that is stepped; true if something moved.
  bool step() { return drive(); }
  // Joins the thread, closes the listeners and the lane's own descriptors, lets go of the channels.
  void stop();

 private:
  void reap();
  void run();
  // Its own list of them, without a lock and a copy where none came or went.
  const std::vector<std::shared_ptr<Channel>>& driven();
  void wake_up();
  void close_descriptors();
  bool drive();
  // False if a channel has work already; `timeout_ms` until the next deadline, -1 for none.
  bool arm_all(int* timeout_ms);
  void accept_all();

  const uint64_t spin_ns_;
  const std::function<void()> housekeeping_;
  int epoll_, wake_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<Channel>> channels_;
  std::vector<std::shared_ptr<Channel>> driven_;  // the lane's thread's
  std::atomic<bool> changed_{false};              // `channels_`, since `driven_` was copied
  struct Watched {
    std::unique_ptr<Listener> listener;
    std::function<void(int)> on_accepted;
  };
  std::vector<std::shared_ptr<Watched>> watched_;
  std::atomic<bool> sleeping_{false}, kicked_{false}, stopping_{false};
  std::atomic<uint64_t> sleeps_until_{kForEver};
  std::thread thread_;
};

}  // namespace sage_kvt
