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
// Then the channels get their turn; epoll tells of the connections that still wait.
constexpr int kAcceptsATurn = 8;

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

Lane::Lane(uint64_t spin_ns, std::function<void()> housekeeping, bool stepped)
    : spin_ns_(spin_ns),
      housekeeping_(std::move(housekeeping)),
      epoll_(epoll_create1(EPOLL_CLOEXEC)),
      wake_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  if (epoll_ < 0 || wake_ < 0) {
    const int error = errno;
    close_descriptors();
    throw std::system_error(error, std::generic_category(), "can't make a lane");
  }
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.ptr = nullptr;
  epoll_ctl(epoll_, EPOLL_CTL_ADD, wake_, &event);
  if (!stepped) thread_ = std::thread([this] { run(); });
}

Lane::~Lane() { stop(); }

void Lane::close_descriptors() {
  for (int* fd : {&epoll_, &wake_}) {
    if (*fd >= 0) ::close(*fd);
    *fd = -1;
  }
}

void Lane::wake_up() {
  std::lock_guard lock(mutex_);
  uint64_t one = 1;
  if (wake_ >= 0) (void)!::write(wake_, &one, sizeof one);
}

void Lane::stop() {
  stopping_ = true;
  wake_up();
  if (thread_.joinable()) thread_.join();
  std::vector<std::shared_ptr<Channel>> channels;  // destroyed after the lock
  std::vector<std::shared_ptr<Watched>> watched;
  std::lock_guard lock(mutex_);
  close_descriptors();
  channels.swap(channels_);
  driven_.clear();
  watched.swap(watched_);
}

void Lane::add(const std::shared_ptr<Channel>& channel) {
  {
    std::lock_guard channel_lock(channel->mutex);
    std::lock_guard lock(mutex_);
    if (channel->dead || epoll_ < 0) return;
    for (int fd : channel->fds()) {
      epoll_event event{};
      event.events = EPOLLIN | EPOLLRDHUP;
      event.data.ptr = channel.get();
      epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event);
    }
    // Last, so that nobody changes a descriptor's events before it is known to epoll.
    channels_.push_back(channel);
    changed_ = true;
  }
  kick();
}

void Lane::watch(std::unique_ptr<Listener> listener, std::function<void(int)> on_accepted) {
  std::lock_guard lock(mutex_);
  if (epoll_ < 0) return;
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.ptr = nullptr;
  epoll_ctl(epoll_, EPOLL_CTL_ADD, listener->fd(), &event);
  watched_.push_back(std::make_shared<Watched>(Watched{std::move(listener), std::move(on_accepted)}));
}

void Lane::modify(int fd, uint32_t events, void* owner) {
  epoll_event event{};
  event.events = events;
  event.data.ptr = owner;
  std::lock_guard lock(mutex_);
  epoll_ctl(epoll_, EPOLL_CTL_MOD, fd, &event);
}

void Lane::wake_by(uint64_t due) {
  if (sleeping_ && sleeps_until_ > due) kick();
}

void Lane::forget(int fd) {
  std::lock_guard lock(mutex_);
  epoll_ctl(epoll_, EPOLL_CTL_DEL, fd, nullptr);
}

void Lane::kick() {
  // Whoever kicked first woke it.
  if (!kicked_.exchange(true) && sleeping_) wake_up();
}

std::vector<std::shared_ptr<Channel>> Lane::channels() {
  std::lock_guard lock(mutex_);
  return channels_;
}

const std::vector<std::shared_ptr<Channel>>& Lane::driven() {
  if (changed_.exchange(false)) {
    std::lock_guard lock(mutex_);
    driven_ = channels_;
  }
  return driven_;
}

void Lane::reap() {
  std::vector<std::shared_ptr<Channel>> gone;  // destroyed after the lock
  driven_.clear();
  changed_ = true;
  {
    std::lock_guard lock(mutex_);
    auto first_dead = std::stable_partition(channels_.begin(), channels_.end(), [](const auto& c) { return !c->dead; });
    gone.assign(first_dead, channels_.end());
    channels_.erase(first_dead, channels_.end());
  }
  // Whoever ends a channel holds this until epoll knows it no more, and could give it to us again.
  for (const auto& channel : gone) std::lock_guard ended(channel->mutex);
}

bool Lane::drive() {
  bool moved = false, any_dead = false;
  const uint64_t now = now_ns();
  for (const auto& channel : driven()) {
    const uint64_t due = channel->due();
    const bool late = due != 0 && now >= due;
    const bool has_work = !channel->resting && channel->connection->has_work();
    if (!channel->dead && (now < channel->hot_until || channel->woken || late || has_work)) {
      std::unique_lock lock(channel->mutex, std::try_to_lock);
      if (!lock.owns_lock()) continue;
      channel->woken = false;
      if (channel->resting && !channel->dead) channel->rouse(false);
      if (!channel->dead && channel->progress()) {
        moved = true;
        channel->hot_until = now_ns() + spin_ns_;
      }
      if (late && !channel->dead) channel->on_time(now);
    }
    any_dead |= channel->dead;
  }
  if (any_dead) reap();
  housekeeping_();
  return moved;
}

bool Lane::arm_all(int* timeout_ms) {
  bool idle = true;
  uint64_t nearest = kForEver;
  for (const auto& channel : driven()) {
    if (!channel->resting || channel->woken) {  // woken, and somebody else had its lock
      std::lock_guard lock(channel->mutex);
      if (channel->dead) continue;
      if (!channel->rest()) {
        channel->hot_until = now_ns() + spin_ns_;
        idle = false;
      }
    }
    if (const uint64_t due = channel->due(); due != 0) nearest = std::min(nearest, due);
  }
  sleeps_until_ = nearest;
  *timeout_ms = -1;
  if (const uint64_t now = now_ns(); nearest != kForEver)
    *timeout_ms = nearest <= now ? 0 : static_cast<int>(std::min<uint64_t>((nearest - now) / 1000000 + 1, 60000));
  return idle;
}

void Lane::accept_all() {
  std::vector<std::shared_ptr<Watched>> watched;
  {
    std::lock_guard lock(mutex_);
    watched = watched_;
  }
  for (const auto& w : watched)
    for (int i = 0; i < kAcceptsATurn; ++i) {
      const int fd = w->listener->accept();
      if (fd < 0) break;
      w->on_accepted(fd);
    }
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
    sleeps_until_ = kForEver;  // whoever wants it earlier meanwhile must kick
    sleeping_ = true;
    int count = 0, timeout_ms = -1;
    if (arm_all(&timeout_ms) && !kicked_ && !stopping_) count = epoll_wait(epoll_, events, 64, timeout_ms);
    sleeping_ = false;
    bool other = false;
    for (int i = 0; i < count; ++i) {
      // One that died meanwhile is out of epoll, and still there: only this thread lets go of it.
      if (auto* channel = static_cast<Channel*>(events[i].data.ptr))
        channel->woken = true;
      else
        other = true;
    }
    if (other) {
      uint64_t value;
      (void)!::read(wake_, &value, sizeof value);
      accept_all();
    }
    spin_until = now_ns() + spin_ns_;
  }
}

}  // namespace sage_kvt
