// SPDX-License-Identifier: Apache-2.0
#include "tcp_channel.h"

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "crc32c.h"

namespace sage_kvt {
namespace {

// One turn moves about this much before the other direction gets its turn.
constexpr uint64_t kTurnBytes = 4u << 20;
// Bytes of one receive call, so that the CRC finds them in the cache.
constexpr uint64_t kReceiveBytes = 256u << 10;

constexpr uint64_t kDiscardBytes = 64u << 10;
const char zeros[64u << 10] = {};  // payload of a revoked chunk

uint32_t header_crc(const FrameHeader& header) { return crc32c(0, &header, offsetof(FrameHeader, header_crc)); }

std::string errno_text(int error) { return std::strerror(error); }

}  // namespace

TcpChannel::TcpChannel(std::shared_ptr<Connection> connection, TcpEndpoint& endpoint, int fd, bool connecting,
                       bool incoming, const Token& preface)
    : Channel(std::move(connection)),
      endpoint_(endpoint),
      fd_(fd),
      connecting_(connecting),
      incoming_(incoming),
      announce_(!incoming && preface == Token{}),
      armed_events_(EPOLLIN | EPOLLRDHUP) {
  if (!incoming) queue_control(FrameType::kPreface, preface, 0);
}

TcpChannel::~TcpChannel() {
  if (fd_ >= 0) ::close(fd_);
}

void TcpChannel::queue_control(FrameType type, const Token& token, uint64_t number) {
  FrameHeader header{};
  header.magic = kFrameMagic;
  header.type = static_cast<uint8_t>(type);
  header.token = token;
  header.offset = number;
  header.header_crc = header_crc(header);
  control_.push_back(header);
}

int TcpChannel::release_fd() {
  const int fd = fd_;
  lane->forget(fd);
  fd_ = -1;
  dead = true;
  return fd;
}

void TcpChannel::broken(Status status, const std::string& detail) {
  if (dead.exchange(true)) return;
  shut();
  endpoint_.doom(connection, status, detail);
}

void TcpChannel::shut() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
  in_window_.reset();
  if (out_post_) {
    auto post = std::move(out_post_);
    connection->chunk_done(post, Status::kConnectionLost, "");
  }
}

void TcpChannel::revoke(const Post& post) {
  if (!out_post_ || out_post_->id != post.id) return;
  // The frame must keep its length: what has not left becomes zeros, and the trailer says so.
  uint64_t left = 0;
  for (size_t i = out_next_; i + 1 < out_.size(); ++i)
    if (!(i == 0 && out_[i].iov_base >= static_cast<void*>(&out_header_) &&
          out_[i].iov_base < static_cast<void*>(&out_header_ + 1)))
      left += out_[i].iov_len;
  std::vector<iovec> rest;
  if (out_next_ == 0) rest.push_back(out_[0]);
  for (; left > 0;) {
    const uint64_t n = std::min<uint64_t>(left, sizeof zeros);
    rest.push_back({const_cast<char*>(zeros), n});
    left -= n;
  }
  out_trailer_.aborted = 1;
  rest.push_back(out_.back());
  out_ = std::move(rest);
  out_next_ = 0;
  auto ended = std::move(out_post_);
  connection->chunk_done(ended, Status::kCancelled, "");
}

void TcpChannel::expire() {
  broken(Status::kIoError, connecting_ ? "the peer did not answer in time" : "the peer sent no preface in time");
}

bool TcpChannel::progress() {
  if (connecting_) {
    int error = 0;
    socklen_t size = sizeof error;
    sockaddr_storage peer;
    socklen_t peer_size = sizeof peer;
    ::getsockopt(fd_, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != 0) {
      broken(Status::kIoError, errno_text(error));
      return true;
    }
    if (::getpeername(fd_, reinterpret_cast<sockaddr*>(&peer), &peer_size) != 0) return false;
    connecting_ = false;
  }
  if (!incoming_ && deadline != 0) deadline = 0;
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
  } else if (!want_write_ &&
             (out_active_ || !control_.empty() || ((established_ || !incoming_) && connection->has_work_for(*this)))) {
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

// -- sending

bool TcpChannel::begin_frame() {
  out_.clear();
  out_next_ = 0;
  if (!control_.empty()) {
    out_header_ = control_.front();
    control_.erase(control_.begin());
    out_.push_back({&out_header_, sizeof out_header_});
    return out_active_ = true;
  }
  if (incoming_ && !established_) return false;
  out_header_ = FrameHeader{};
  out_header_.magic = kFrameMagic;
  if (connection->take_message(*this, &out_message_)) {
    out_header_.type = static_cast<uint8_t>(FrameType::kMessage);
    out_header_.length = out_message_.size();
    out_header_.header_crc = header_crc(out_header_);
    out_.push_back({&out_header_, sizeof out_header_});
    if (!out_message_.empty()) out_.push_back({out_message_.data(), out_message_.size()});
    ++endpoint_.counters.messages_sent;
    return out_active_ = true;
  }
  Chunk chunk;
  if (!connection->take_chunk(endpoint_.options().chunk_bytes, kMaxPieces, &out_post_, &chunk)) return false;
  out_header_.type = static_cast<uint8_t>(FrameType::kData);
  out_header_.flags = out_post_->checksum ? kFlagChecksum : 0;
  out_header_.length = out_length_ = chunk.length;
  out_header_.window = out_post_->window;
  out_header_.offset = chunk.offset;
  out_header_.generation = out_post_->generation;
  out_header_.header_crc = header_crc(out_header_);
  out_trailer_ = FrameTrailer{0, 0, out_post_->generation};
  if (out_post_->checksum)
    for (const auto& piece : chunk.pieces) out_trailer_.crc = crc32c(out_trailer_.crc, piece.iov_base, piece.iov_len);
  out_.reserve(chunk.pieces.size() + 2);
  out_.push_back({&out_header_, sizeof out_header_});
  out_.insert(out_.end(), chunk.pieces.begin(), chunk.pieces.end());
  out_.push_back({&out_trailer_, sizeof out_trailer_});
  return out_active_ = true;
}

void TcpChannel::end_frame() {
  out_active_ = false;
  out_message_.clear();
  if (!out_post_) return;
  endpoint_.counters.bytes_sent += out_length_;
  ++endpoint_.counters.chunks_sent;
  auto post = std::move(out_post_);
  connection->chunk_done(post, Status::kOk, "");
}

bool TcpChannel::send_some() {
  bool moved = false;
  for (uint64_t turn = 0; turn < kTurnBytes;) {
    if (!out_active_ && !begin_frame()) return moved;
    msghdr message{};
    message.msg_iov = out_.data() + out_next_;
    message.msg_iovlen = out_.size() - out_next_;
    ssize_t n = ::sendmsg(fd_, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) {
        if (!want_write_) ++endpoint_.counters.stalls;
        want_write_ = true;
        return moved;
      }
      broken(Status::kConnectionLost, errno_text(errno));
      return true;
    }
    want_write_ = false;
    moved = true;
    turn += static_cast<uint64_t>(n);
    for (auto left = static_cast<size_t>(n); left > 0;) {
      auto& piece = out_[out_next_];
      if (left >= piece.iov_len) {
        left -= piece.iov_len;
        ++out_next_;
      } else {
        piece.iov_base = static_cast<char*>(piece.iov_base) + left;
        piece.iov_len -= left;
        left = 0;
      }
    }
    if (out_next_ == out_.size()) end_frame();
  }
  return moved;
}

// -- receiving

bool TcpChannel::receive_some() {
  bool moved = false;
  for (uint64_t turn = 0; turn < kTurnBytes;) {
    in_.clear();
    std::unique_ptr<WindowPin> pin;
    uint64_t wanted = 0;
    switch (state_) {
      case Receive::kHeader:
        if (in_have_ == 0 && connection->inbox_full()) return moved;
        in_.push_back({reinterpret_cast<char*>(&in_header_) + in_have_, sizeof in_header_ - in_have_});
        break;
      case Receive::kMessage:
        in_.push_back({in_message_.data() + in_done_, in_message_.size() - in_done_});
        break;
      case Receive::kData:
        pin = std::make_unique<WindowPin>(*in_window_);
        if (!*pin) {
          state_ = Receive::kDiscard;
          in_window_.reset();
          continue;
        }
        wanted = std::min(in_header_.length - in_done_, kReceiveBytes);
        wanted = in_window_->pieces(in_header_.offset + in_done_, wanted, kMaxPieces, &in_);
        if (in_done_ + wanted == in_header_.length) in_.push_back({&in_trailer_, sizeof in_trailer_});
        break;
      case Receive::kDiscard:
        discarded_.resize(kDiscardBytes);
        in_.push_back({discarded_.data(), std::min(in_header_.length - in_done_, kDiscardBytes)});
        break;
      case Receive::kTrailer:
        in_.push_back({reinterpret_cast<char*>(&in_trailer_) + in_have_, sizeof in_trailer_ - in_have_});
        break;
    }
    msghdr message{};
    message.msg_iov = in_.data();
    message.msg_iovlen = in_.size();
    ssize_t n = ::recvmsg(fd_, &message, MSG_DONTWAIT);
    if (n < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return moved;
      broken(Status::kConnectionLost, errno_text(errno));
      return true;
    }
    if (n == 0) {
      broken(Status::kConnectionLost, "the peer closed the connection");
      return true;
    }
    moved = true;
    turn += static_cast<uint64_t>(n);
    if (!on_payload(static_cast<size_t>(n))) return true;
  }
  return moved;
}

// False once the channel is broken or given away.
bool TcpChannel::on_payload(size_t n) {
  switch (state_) {
    case Receive::kHeader:
      in_have_ += n;
      return in_have_ < sizeof in_header_ || on_header();
    case Receive::kMessage:
      in_done_ += n;
      if (in_done_ < in_message_.size()) return true;
      state_ = Receive::kHeader;
      in_have_ = 0;
      endpoint_.emit_message(*connection, std::move(in_message_));
      return true;
    case Receive::kData: {
      size_t payload = std::min<uint64_t>(n, in_header_.length - in_done_);
      const size_t trailer = n - payload;
      in_done_ += payload;
      if (in_header_.flags & kFlagChecksum)
        for (const auto& piece : in_) {
          const size_t part = std::min(payload, piece.iov_len);
          in_crc_ = crc32c(in_crc_, piece.iov_base, part);
          payload -= part;
          if (payload == 0) break;
        }
      if (in_done_ < in_header_.length) return true;
      in_have_ = trailer;
      state_ = Receive::kTrailer;
      return in_have_ < sizeof in_trailer_ || finish_data();
    }
    case Receive::kDiscard:
      in_done_ += n;
      if (in_done_ == in_header_.length) {
        in_have_ = 0;
        state_ = Receive::kTrailer;
      }
      return true;
    case Receive::kTrailer:
      in_have_ += n;
      return in_have_ < sizeof in_trailer_ || finish_data();
  }
  return true;
}

bool TcpChannel::finish_data() {
  state_ = Receive::kHeader;
  in_have_ = 0;
  auto window = std::move(in_window_);
  if (!window) return true;
  const auto& h = in_header_;
  if (in_trailer_.aborted || in_trailer_.generation != h.generation)
    endpoint_.window_failed(window, Status::kStaleGeneration, h.offset, h.length, "the sender revoked the chunk");
  else if ((h.flags & kFlagChecksum) && in_trailer_.crc != in_crc_)
    endpoint_.window_failed(window, Status::kChecksumMismatch, h.offset, h.length,
                            "crc32c " + std::to_string(in_crc_) + " of what arrived, " +
                                std::to_string(in_trailer_.crc) + " of what was sent");
  else
    endpoint_.window_landed(window, h.offset, h.length);
  return true;
}

bool TcpChannel::on_header() {
  const auto& h = in_header_;
  in_have_ = 0;
  in_done_ = 0;
  in_crc_ = 0;
  if (h.magic != kFrameMagic || h.header_crc != header_crc(h)) {
    broken(Status::kProtocolError, "a frame header is not valid (magic or header checksum)");
    return false;
  }
  const auto type = static_cast<FrameType>(h.type);
  if (!established_) {
    // The connecting side hears nothing but frames of the acceptor, which has no preface.
    if (incoming_) {
      if (type != FrameType::kPreface) {
        broken(Status::kProtocolError, "the first frame is not a preface");
        return false;
      }
      established_ = true;
      deadline = 0;
      if (h.token != Token{}) {
        if (!endpoint_.adopt(*this, h.token)) broken(Status::kRefused, "a joining lane's token is not known");
        return false;
      }
      endpoint_.established(*this);
      return true;
    }
    established_ = true;
  }
  switch (type) {
    case FrameType::kMessage: {
      const uint64_t most = connection->authorized ? kMaxMessageBytes : kMaxUnauthorizedMessageBytes;
      if (h.length > most) {
        broken(Status::kProtocolError,
               "message of " + std::to_string(h.length) + " bytes, at most " + std::to_string(most) + " are allowed");
        return false;
      }
      in_message_.assign(h.length, '\0');
      state_ = Receive::kMessage;
      return h.length > 0 || on_payload(0);
    }
    case FrameType::kData: {
      if (!connection->authorized || h.length == 0 || h.length > kMaxChunkBytes) {
        broken(Status::kProtocolError, connection->authorized ? "data frame of " + std::to_string(h.length) + " bytes"
                                                              : "data before the handshake");
        return false;
      }
      in_window_ = endpoint_.find_window(h.window);
      if (in_window_ && in_window_->connection != connection->id) in_window_.reset();
      if (in_window_) {
        const Status status = in_window_->reserve(h.offset, h.length, h.generation);
        if (status != Status::kOk) {
          ++endpoint_.counters.refused_chunks;
          endpoint_.window_failed(in_window_, status, h.offset, h.length, "refused chunk");
          in_window_.reset();
        }
      }
      state_ = in_window_ ? Receive::kData : Receive::kDiscard;
      return true;
    }
    case FrameType::kJoin:
      if (incoming_) break;
      endpoint_.join(connection, h.token, h.offset);
      return true;
    case FrameType::kPreface:
      break;
  }
  broken(Status::kProtocolError, "frame type " + std::to_string(h.type) + " is not expected here");
  return false;
}

}  // namespace sage_kvt
