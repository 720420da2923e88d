// SPDX-License-Identifier: Apache-2.0
#include "tcp/channel.h"

#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>

#include "tcp/tcp_endpoint.h"

namespace sage_kvt {
TcpChannel::TcpChannel(std::shared_ptr<Connection> connection, TcpEndpoint& endpoint, int fd, bool connecting,
                       bool incoming, const Token& preface, size_t lane)
    : Channel(std::move(connection)),
      endpoint_(endpoint),
      fd_(fd),
      connecting_(connecting),
      incoming_(incoming),
      joins_(!incoming && preface != Token{}),
      announce_(!incoming && !joins_),
      armed_events_(EPOLLIN | EPOLLRDHUP) {
  if (!incoming) queue_control(FrameType::kPreface, preface, lane);
}

TcpChannel::~TcpChannel() {
  if (fd_ >= 0) ::close(fd_);
}

void TcpChannel::queue_control(FrameType type, const Token& token, uint64_t number) {
  control_.push_back(control_frame(type, token, number));
}

void TcpChannel::protect(const std::shared_ptr<const ConnectionKeys>& keys, size_t lane_number,
                         std::unique_ptr<LaneCipher> open) {
  plain_messages_ = connection->queued_messages();
  seal_ = std::make_unique<LaneCipher>(keys, LaneCipher::Direction::kSeal, lane_number);
  open_ = open ? std::move(open) : std::make_unique<LaneCipher>(keys, LaneCipher::Direction::kOpen, lane_number);
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
  in_window_.reset();
  if (out_post_) {
    auto post = std::move(out_post_);
    connection->chunk_failed(post, Status::kConnectionLost, "");
  }
}

void TcpChannel::expire() {
  broken(Status::kIoError, connecting_ ? "the peer did not answer in time" : "the peer sent no preface in time");
}

void TcpChannel::ping() {
  owes_ping_ = true;
  send_some();
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
  const bool sent = send_some();
  return received || sent;
}

bool TcpChannel::arm() {
  if (connecting_) {
    want_write_ = true;
  } else if (announce_) {
    return false;
  } else if (!want_write_ && (out_active_ || owes_control() || (may_send() && connection->has_work_for(*this)))) {
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
