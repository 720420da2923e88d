// SPDX-License-Identifier: Apache-2.0
#include "tcp/channel.h"

#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "tcp/tcp_endpoint.h"

namespace sage_kvt {
TcpChannel::TcpChannel(std::shared_ptr<Connection> connection, TcpEndpoint& endpoint, int fd, bool connecting,
                       bool incoming, const Token& preface, const LaneId& id, bool linked, size_t link)
    : Channel(std::move(connection)),
      endpoint_(endpoint),
      fd_(fd),
      connecting_(connecting),
      incoming_(incoming),
      joins_(!incoming && preface != Token{}),
      id_(id),
      link_(link),
      announce_(!incoming && !joins_),
      armed_events_(EPOLLIN | EPOLLRDHUP),
      counts_(linked) {
  if (linked) kept_ = std::make_unique<Kept>();
  if (!incoming) queue_control(FrameType::kPreface, preface, id.packed());
}

TcpChannel::~TcpChannel() {
  if (fd_ >= 0) ::close(fd_);
}

void TcpChannel::queue_control(FrameType type, const Token& token, uint64_t number, uint64_t window) {
  control_.push_back(control_frame(type, token, number, window));
}

void TcpChannel::queue_join(const Joinable& joinable) { joins_told_.push_back(joinable); }

void TcpChannel::protect(const std::shared_ptr<const ConnectionKeys>& keys, std::unique_ptr<LaneCipher> open) {
  plain_messages_ = connection->queued_messages();
  seal_ = std::make_unique<LaneCipher>(keys, LaneCipher::Direction::kSeal, id_);
  open_ = open ? std::move(open) : std::make_unique<LaneCipher>(keys, LaneCipher::Direction::kOpen, id_);
}

int TcpChannel::release_fd() {
  const int fd = fd_;
  lane->forget(fd);
  fd_ = -1;
  dead = true;
  return fd;
}

void TcpChannel::shut() {
  if (fd_ >= 0) {
    lane->forget(fd_);
    ::close(fd_);
  }
  fd_ = -1;
  const auto window = std::move(in_window_);
  const auto post = std::move(out_post_);
  if (post && !kept_) connection->chunk_failed(post, Status::kConnectionLost, "");
  // What the peer did wrong ends the connection, as its silence does.
  const bool may = broke_with_ == Status::kConnectionLost || (broke_with_ != Status::kOk && joins_ && !established_);
  ends_alone_ = may && linked() && connection->survives_without(*this);
  if (!ends_alone_) return;
  // Nothing of it is written any more: the chunk may come another way.
  if (window) window->release(in_start_.header.offset, in_start_.header.length);
  endpoint_.links().ended({connection, id_, first, stalled_ ? progress_.slow_since() : 0, std::move(*kept_), taken_});
}

void TcpChannel::show_life() {
  asked_for_life_ = true;
  woken = true;
  lane->kick();
}

void TcpChannel::expire() {
  broken(Status::kIoError, connecting_ ? "the peer did not answer in time" : "the peer sent no preface in time");
}

void TcpChannel::ping() {
  owes_ping_ = true;
  send_some();
}

void TcpChannel::alarmed(uint64_t now) {
  uint64_t next = endpoint_.links().next_due();
  if (linked() && connection->survives_without(*this)) {
    const auto verdict = progress_.look(fd_, now);
    // This machine, or the peer's, may be slow: another network is to be better.
    if (verdict == SocketProgress::Verdict::kStalled && Links::another_lives(*this, progress_.slow_since())) {
      stalled_ = true;
      return end("its network acknowledges nothing");
    }
    if (verdict == SocketProgress::Verdict::kSlow || verdict == SocketProgress::Verdict::kStalled)
      Links::ask_others(*this);
    if (verdict != SocketProgress::Verdict::kIdle || out_active_) next = std::min(next, now + SocketProgress::kLookNs);
  }
  if (next != Links::kNever) alarm = next;
}

bool TcpChannel::progress() {
  if (connecting_) {
    int error = 0;
    socklen_t size = sizeof error;
    sockaddr_storage peer;
    socklen_t peer_size = sizeof peer;
    ::getsockopt(fd_, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != 0) {
      broken(Status::kIoError, std::strerror(error));
      return true;
    }
    if (::getpeername(fd_, reinterpret_cast<sockaddr*>(&peer), &peer_size) != 0) return false;
    connecting_ = false;
  }
  if (!incoming_ && !joins_ && deadline != 0) deadline = 0;
  if (announce_) {
    announce_ = false;
    endpoint_.emit(EventKind::kConnected, connection->id);
  }
  const bool received = receive_some();
  if (dead) return true;
  if (asked_for_life_.exchange(false) && linked()) owes_ping_ = true;
  const bool sent = send_some();
  return received || sent;
}

bool TcpChannel::arm() {
  if (connecting_) {
    want_write_ = true;
  } else if (announce_) {
    return false;
  } else if (!want_write_ &&
             (out_active_ || owes_control() || (carries_messages() && connection->has_work_for(*this)))) {
    return false;
  }
  // Edge-triggered while nothing is read, so that a hang-up wakes once.
  const bool paused = state_ == Receive::kHeader && in_have_ == 0 && connection->inbox_full();
  const uint32_t events = (paused ? uint32_t{EPOLLET} : EPOLLIN | EPOLLRDHUP) | (want_write_ ? uint32_t{EPOLLOUT} : 0u);
  if (events != armed_events_) lane->modify(fd_, armed_events_ = events, this);
  return true;
}

void TcpChannel::disarm(bool lane_sleeps) {
  if (lane_sleeps && armed_events_ != 0) lane->modify(fd_, armed_events_ = 0, this);
}

}  // namespace sage_kvt
