// SPDX-License-Identifier: Apache-2.0
// A tcp channel's receiving half: header, payload into its window, trailer.
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "crc32c.h"
#include "tcp/channel.h"
#include "tcp/tcp_endpoint.h"

namespace sage_kvt {
namespace {
// Bytes of one receive call, so that the CRC finds them in the cache.
constexpr uint64_t kReceiveBytes = 256u << 10;
constexpr uint64_t kDiscardBytes = 64u << 10;
}  // namespace

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
        wanted = in_window_->space().pieces(in_header_.offset + in_done_, wanted, kMaxPieces, &in_);
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
      broken(Status::kConnectionLost, std::strerror(errno));
      return true;
    }
    if (n == 0) {
      broken(Status::kConnectionLost, "the peer closed the connection");
      return true;
    }
    moved = true;
    connection->liveness.heard();
    turn += static_cast<uint64_t>(n);
    if (!on_payload(static_cast<size_t>(n))) return true;
  }
  return moved;
}

// False where the turn ends: the channel is broken or given away, or owes a pong first.
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
  if (h.magic != kFrameMagic || h.header_crc != frame_header_crc(h)) {
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
    if (joins_) deadline = 0;
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
    case FrameType::kPing:
    case FrameType::kPong:
      if (!connection->authorized || h.length != 0) break;
      owes_pong_ |= type == FrameType::kPing;
      return false;
    case FrameType::kGrant:
      if (!connection->authorized || h.length != 0) break;
      connection->granted({h.window, h.offset});
      return true;
    case FrameType::kPreface:
      break;
  }
  broken(Status::kProtocolError, "frame type " + std::to_string(h.type) + " is not expected here");
  return false;
}

}  // namespace sage_kvt
