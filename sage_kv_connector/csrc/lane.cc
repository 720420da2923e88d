// SPDX-License-Identifier: Apache-2.0
#include "lane.h"

#include <pthread.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sage_kvt {
namespace {
void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}
constexpr unsigned kTurnsAYield = 8;
}  // namespace

void Spinner::turn() {
  if (++turns_ % kTurnsAYield == 0)
    ::sched_yield();
  else
    pause_cpu();
}

Lane::Lane(uint64_t spin_ns, std::function<void()> housekeeping)
    : spin_ns_(spin_ns),
      housekeeping_(std::move(housekeeping)),
      epoll_(epoll_create1(EPOLL_CLOEXEC)),
      wake_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  if (epoll_ < 0 || wake_ < 0) throw std::system_error(errno, std::generic_category(), "lane");
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.ptr = nullptr;
  epoll_ctl(epoll_, EPOLL_CTL_ADD, wake_, &event);
  thread_ = std::thread([this] { run(); });
}

Lane::~Lane() {
  stop();
  ::close(epoll_);
  ::close(wake_);
}

void Lane::stop() {
  stopping_ = true;
  uint64_t one = 1;
  (void)!::write(wake_, &one, sizeof one);
  if (thread_.joinable()) thread_.join();
}

void Lane::add(const std::shared_ptr<Channel>& channel) {
  {
    std::lock_guard lock(mutex_);
    channel->lane = this;
    channel->hot_until = now_ns() + spin_ns_;
    channels_.push_back(channel);
  }
  {
    std::lock_guard lock(channel->mutex);
    if (channel->dead) return;
    for (int fd : channel->fds()) {
      epoll_event event{};
      event.events = EPOLLIN | EPOLLRDHUP;
      event.data.ptr = channel.get();
      epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event);
    }
  }
  kick();
}

void Lane::watch(int fd, std::function<void()> on_ready) {
  {
    std::lock_guard lock(mutex_);
    watched_.emplace_back(fd, std::move(on_ready));
  }
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.ptr = nullptr;
  epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event);
}

void Lane::modify(int fd, uint32_t events, void* owner) {
  epoll_event event{};
  event.events = events;
  event.data.ptr = owner;
  epoll_ctl(epoll_, EPOLL_CTL_MOD, fd, &event);
}

void Lane::forget(int fd) { epoll_ctl(epoll_, EPOLL_CTL_DEL, fd, nullptr); }

void Lane::kick() {
  kicked_ = true;
  if (sleeping_) {
    uint64_t one = 1;
    (void)!::write(wake_, &one, sizeof one);
  }
}

std::vector<std::shared_ptr<Channel>> Lane::channels() {
  std::lock_guard lock(mutex_);
  return channels_;
}

void Lane::reap() {
  std::vector<std::shared_ptr<Channel>> gone;  // destroyed after the lock
  std::lock_guard lock(mutex_);
  auto first_dead = std::stable_partition(channels_.begin(), channels_.end(), [](const auto& c) { return !c->dead; });
  gone.assign(first_dead, channels_.end());
  channels_.erase(first_dead, channels_.end());
}

bool Lane::drive() {
  bool moved = false, any_dead = false;
  const uint64_t now = now_ns();
  for (const auto& channel : channels()) {
    if (now >= channel->hot_until && !channel->connection->has_work()) continue;
    std::unique_lock lock(channel->mutex, std::try_to_lock);
    if (!lock.owns_lock()) continue;
    if (!channel->dead && channel->progress()) {
      moved = true;
      channel->hot_until = now_ns() + spin_ns_;
    }
    any_dead |= channel->dead;
  }
  if (any_dead) reap();
  housekeeping_();
  return moved;
}

bool Lane::arm_all() {
  bool idle = true;
  for (const auto& channel : channels()) {
    std::lock_guard lock(channel->mutex);
    if (!channel->dead && !channel->arm()) {
      channel->hot_until = now_ns() + spin_ns_;
      idle = false;
    }
  }
  return idle;
}

void Lane::run() {
  ::pthread_setname_np(::pthread_self(), "sage-kvt-lane");
  uint64_t spin_until = 0;
  Spinner spinner;
  epoll_event events[64];
  while (!stopping_) {
    if (drive() || kicked_.exchange(false)) {
      spin_until = now_ns() + spin_ns_;
      continue;
    }
    if (now_ns() < spin_until) {
      spinner.turn();
      continue;
    }
    sleeping_ = true;
    int count = 0;
    if (arm_all() && !kicked_ && !stopping_) count = epoll_wait(epoll_, events, 64, -1);
    sleeping_ = false;
    bool other = false;
    for (int i = 0; i < count; ++i) {
      if (events[i].data.ptr == nullptr) {
        other = true;
        continue;
      }
      for (const auto& channel : channels())
        if (channel.get() == events[i].data.ptr) channel->hot_until = now_ns() + spin_ns_;
    }
    if (other) {
      uint64_t value;
      (void)!::read(wake_, &value, sizeof value);
      std::vector<std::pair<int, std::function<void()>>> watched;
      {
        std::lock_guard lock(mutex_);
        watched = watched_;
      }
      for (const auto& [fd, on_ready] : watched) on_ready();
    }
    for (const auto& channel : channels()) {
      std::lock_guard lock(channel->mutex);
      if (!channel->dead) channel->disarm(false);
    }
    spin_until = now_ns() + spin_ns_;
  }
}

}  // namespace sage_kvt
