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
  Lane* lane = nullptr;
  std::atomic<uint64_t> hot_until{0};  // spinning is worth it until then
  std::atomic<bool> dead{false};

  // All below with `mutex` held.
  virtual bool progress() = 0;  // true if something moved
  virtual bool arm() = 0;       // before sleeping: false if work is there already
  // Somebody polls again, so wake-ups cost the peer for nothing. `lane_sleeps`: a waiting thread
  // polls while the lane stays in epoll, which must not wake either.
  virtual void disarm(bool lane_sleeps) = 0;
  virtual void revoke(const Post& post) = 0;  // what is in flight of it is void; ends those chunks
  virtual void shut() = 0;                    // close descriptors, end chunks in flight
  virtual std::vector<int> fds() const = 0;
};

class Lane {
 public:
  // `housekeeping` runs on the lane's thread after it drove channels, without locks.
  Lane(uint64_t spin_ns, std::function<void()> housekeeping);
  ~Lane();

  void add(const std::shared_ptr<Channel>& channel);
  // A descriptor that is not a channel's (a listener); called back on the lane's thread.
  void watch(int fd, std::function<void()> on_ready);
  void kick();
  void forget(int fd);
  void modify(int fd, uint32_t events, void* owner);
  std::vector<std::shared_ptr<Channel>> channels();
  void stop();
  uint64_t spin_ns() const { return spin_ns_; }

 private:
  void reap();
  void run();
  bool drive();
  bool arm_all();

  const uint64_t spin_ns_;
  const std::function<void()> housekeeping_;
  int epoll_, wake_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<Channel>> channels_;
  std::vector<std::pair<int, std::function<void()>>> watched_;
  std::atomic<bool> sleeping_{false}, kicked_{false}, stopping_{false};
  std::thread thread_;
};

}  // namespace sage_kvt
