// SPDX-License-Identifier: Apache-2.0
// A tcp channel's receiving half: header, payload into its window, trailer.
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "crc32c.h"
#include "tcp/channel.h"
#include "tcp/tcp_endpoint.h"

namespace sage_kvt {
namespace {
// Bytes of one receive call, so that the CRC finds them in the cache.
constexpr uint64_t kReceiveBytes = 256u << 10;
constexpr uint64_t kDiscardBytes = 64u << 10;
// So much may be taken before the peer hears of it, unless nothing more comes.
constexpr uint64_t kUntoldBytes = 1u << 20, kUntoldFrames = 64;
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
        in_.push_back({reinterpret_cast<char*>(&in_start_) + in_have_, start_bytes() - in_have_});
        break;
      case Receive::kMessage:
        in_.push_back({in_message_.data() + in_done_, in_message_.size() - in_done_});
        if (open_) in_.push_back({&in_end_.tag, sizeof in_end_.tag});
        break;
      case Receive::kData:
        pin = std::make_unique<WindowPin>(*in_window_);
        if (!*pin) {
          state_ = Receive::kDiscard;
          in_window_.reset();
          continue;
        }
        wanted = std::min(in_start_.header.length - in_done_, kReceiveBytes);
        wanted = in_window_->space().pieces(in_start_.header.offset + in_done_, wanted, kMaxPieces, &in_);
        if (in_done_ + wanted == in_start_.header.length) in_.push_back({&in_end_, end_bytes()});
        break;
      case Receive::kDiscard:
        discarded_.resize(kDiscardBytes);
        in_.push_back({discarded_.data(), std::min(in_start_.header.length - in_done_, kDiscardBytes)});
        break;
      case Receive::kEnd:
        in_.push_back({reinterpret_cast<char*>(&in_end_) + in_have_, end_bytes() - in_have_});
        break;
    }
    msghdr message{};
    message.msg_iov = in_.data();
    message.msg_iovlen = in_.size();
    const ssize_t n = [&] {
      Stopwatch watch(endpoint_.options().measures && state_ == Receive::kData, endpoint_.counters.place_ns);
      return ::recvmsg(fd_, &message, MSG_DONTWAIT);
    }();
    if (n < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) {
        say_taken();
        return moved;
      }
      broken(Status::kConnectionLost, std::strerror(errno));
      return true;
    }
    if (n == 0) {
      broken(Status::kConnectionLost, "the peer closed the connection");
      return true;
    }
    moved = true;
    connection->liveness.heard();
    if (counts_) heard_ = now_ns();
    turn += static_cast<uint64_t>(n);
    if (!on_payload(static_cast<size_t>(n))) return true;
  }
  return moved;
}

size_t TcpChannel::start_bytes() const {
  if (open_) return sizeof in_start_;
  // A lane that joins has a tag behind its preface, whether that counts or not: who it joins is in the header.
  const auto& h = in_start_.header;
  const bool first = incoming_ && !established_ && in_have_ >= sizeof h;
  const bool joins = first && h.type == static_cast<uint8_t>(FrameType::kPreface) && h.token != Token{};
  return joins ? sizeof in_start_ : sizeof h;
}

// False where the turn ends: the channel is broken or given away, or owes a pong first.
bool TcpChannel::on_payload(size_t n) {
  switch (state_) {
    case Receive::kHeader:
      in_have_ += n;
      return in_have_ < start_bytes() || on_header();
    case Receive::kMessage:
    case Receive::kData: {
      const size_t payload = std::min<uint64_t>(n, in_start_.header.length - in_done_);
      in_done_ += payload;
      if (!open_body(payload)) return forged();
      if (in_done_ < in_start_.header.length) return true;
      // A message has no trailer.
      in_have_ = n - payload + (state_ == Receive::kMessage ? sizeof(FrameTrailer) : 0);
      state_ = Receive::kEnd;
      return in_have_ < end_bytes() || finish_body();
    }
    case Receive::kDiscard:
      in_done_ += n;
      if (in_done_ == in_start_.header.length) {
        in_have_ = 0;
        state_ = Receive::kEnd;
      }
      return true;
    case Receive::kEnd:
      in_have_ += n;
      return in_have_ < end_bytes() || finish_body();
  }
  return true;
}

// `payload` more bytes of the body lie in `in_`: they are decrypted where they are, or summed up.
bool TcpChannel::open_body(size_t payload) {
  const bool sums = !open_ && (in_start_.header.flags & kFlagChecksum);
  if (!open_ && !sums) return true;
  Stopwatch watch(endpoint_.options().measures, endpoint_.counters.verify_ns);
  for (const auto& piece : in_) {
    const size_t part = std::min(payload, piece.iov_len);
    if (sums) in_crc_ = crc32c(in_crc_, piece.iov_base, part);
    if (open_ && !open_->pass(piece.iov_base, piece.iov_base, part)) return false;
    payload -= part;
    if (payload == 0) break;
  }
  return true;
}

bool TcpChannel::forged() {
  ++endpoint_.counters.forged_frames;
  broken(Status::kForged, open_->worn() ? "the keys of this lane are used up"
                                        : "a frame does not hold its tag: its bytes changed on the way, or were never "
                                          "this peer's");
  return false;
}

bool TcpChannel::finish_body() {
  state_ = Receive::kHeader;
  in_have_ = 0;
  const auto& h = in_start_.header;
  const auto type = static_cast<FrameType>(h.type);
  const bool message = type != FrameType::kData;
  auto window = std::move(in_window_);
  if (!message && !window) {  // discarded: nothing of it is believed
    took();
    return true;
  }
  if (open_) {
    auto& trailer = in_end_.trailer;
    if ((!message && !open_->pass(&trailer, &trailer, sizeof trailer)) || !open_->end(&in_end_.tag)) {
      if (window)
        endpoint_.window_failed(window, Status::kForged, h.offset, h.length, "the chunk does not hold its tag");
      return forged();
    }
  }
  if (type == FrameType::kJoin) return on_join_body();
  took();
  if (type == FrameType::kNote) return on_note();
  if (message)
    endpoint_.emit_message(*connection, std::move(in_message_));
  else if (in_end_.trailer.aborted || in_end_.trailer.generation != h.generation)
    endpoint_.window_failed(window, Status::kStaleGeneration, h.offset, h.length, "the sender revoked the chunk");
  else if (!open_ && (h.flags & kFlagChecksum) && in_end_.trailer.crc != in_crc_)
    endpoint_.window_failed(window, Status::kChecksumMismatch, h.offset, h.length,
                            "crc32c " + std::to_string(in_crc_) + " of what arrived, " +
                                std::to_string(in_end_.trailer.crc) + " of what was sent");
  else
    endpoint_.window_landed(*connection, window, h.offset, h.length);
  return true;
}

// A frame that the peer counts is over.
void TcpChannel::took() {
  if (!counts_) return;
  ++taken_;
  if (in_start_.header.type == static_cast<uint8_t>(FrameType::kData)) bytes_untold_ += in_start_.header.length;
  if (bytes_untold_ >= kUntoldBytes || taken_ - taken_told_ >= kUntoldFrames) say_taken();
}

// Of messages alone nobody waits to hear.
void TcpChannel::say_taken() {
  if (bytes_untold_ == 0 && taken_ - taken_told_ < kUntoldFrames) return;
  bytes_untold_ = 0;
  owes_taken_ = true;
}

bool TcpChannel::on_join(const FrameHeader& h) {
  if (h.length == 0) {
    if (incoming_) return on_join_answer(h.offset);
    endpoint_.join(connection, {h.token, h.offset});
    return true;
  }
  if (incoming_ || h.length > kMostAddresses * sizeof(WrittenAddress) || std::exchange(answered_, true)) return false;
  in_message_.assign(h.length, '\0');
  if (open_ && !open_->begin(h)) return forged();
  state_ = Receive::kMessage;
  return true;
}

bool TcpChannel::on_join_body() {
  const auto& h = in_start_.header;
  const auto addresses = read_addresses(in_message_.data(), in_message_.size());
  if (!addresses) {
    broken(Status::kProtocolError, "a join of " + std::to_string(h.length) + " bytes names no addresses");
    return false;
  }
  const uint64_t lanes = endpoint_.join(connection, {h.token, h.offset, *addresses});
  queue_control(FrameType::kJoin, {}, lanes);
  counts_ = lanes > 0;
  return true;
}

// To our own, which told of links. Without lanes of the other side it stays as it was.
bool TcpChannel::on_join_answer(uint64_t lanes) {
  if (!kept_ || std::exchange(answered_, true)) return false;
  counts_ = lanes > 0;
  if (counts_) return true;
  kept_->taken(*connection, kept_->sent() - (out_kept_ ? 1 : 0));
  kept_.reset();
  out_kept_ = false;
  return true;
}

// What has not left can't be there, whatever the peer says.
bool TcpChannel::on_taken(uint64_t count) {
  return linked() && count <= kept_->sent() - (out_kept_ ? 1 : 0) && kept_->taken(*connection, count);
}

bool TcpChannel::on_note() {
  if (endpoint_.on_note(connection, in_message_)) return true;
  broken(Status::kProtocolError, "a note of " + std::to_string(in_message_.size()) + " bytes is not valid");
  return false;
}

// Nothing of a header is believed before its tag.
bool TcpChannel::on_header() {
  const auto& h = in_start_.header;
  in_have_ = 0;
  in_done_ = 0;
  in_crc_ = 0;
  if (open_ && !open_->header(h, &in_start_.tag)) return forged();
  if (h.magic != kFrameMagic || h.header_crc != frame_header_crc(h)) {
    broken(Status::kProtocolError, "a frame header is not valid (magic or header checksum)");
    return false;
  }
  const auto type = static_cast<FrameType>(h.type);
  if (!established_) {
    // The connecting side hears nothing but frames of the acceptor, which has no preface.
    if (incoming_) return on_first_header();
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
      if (h.length == 0) {
        took();
        endpoint_.emit_message(*connection, std::move(in_message_));
        return true;
      }
      if (open_ && !open_->begin(h)) return forged();
      state_ = Receive::kMessage;
      return true;
    }
    case FrameType::kData:
      return on_data_header();
    case FrameType::kNote:
      // Who connected may hear one before it trusts the peer, which did so first.
      if (!connection->authorized && (incoming_ || std::exchange(noted_, true))) break;
      if (h.length == 0 || h.length > kMaxNoteBytes) break;
      in_message_.assign(h.length, '\0');
      if (open_ && !open_->begin(h)) return forged();
      state_ = Receive::kMessage;
      return true;
    case FrameType::kJoin:
      if (on_join(h)) return true;
      if (dead) return false;
      break;
    case FrameType::kPing:
    case FrameType::kPong:
      if (!connection->authorized || h.length != 0) break;
      owes_pong_ |= type == FrameType::kPing;
      return false;
    case FrameType::kGrant:
      if (!connection->authorized || h.length != 0) break;
      connection->granted({h.window, h.offset});
      took();
      return true;
    case FrameType::kTaken:
      if (h.length != 0 || !on_taken(h.offset)) break;
      return true;
    case FrameType::kEnded:
      if (h.length != 0 || !(kept_ || counts_)) break;
      endpoint_.links().peer_ended(connection, LaneId::unpacked(h.window), h.offset);
      return true;
    case FrameType::kPreface:
      break;
  }
  broken(Status::kProtocolError, "frame type " + std::to_string(h.type) + " is not expected here");
  return false;
}

bool TcpChannel::on_first_header() {
  const auto& h = in_start_.header;
  if (static_cast<FrameType>(h.type) != FrameType::kPreface) {
    broken(Status::kProtocolError, "the first frame is not a preface");
    return false;
  }
  established_ = true;
  deadline = 0;
  if (h.token == Token{}) {
    endpoint_.established(*this);
    return true;
  }
  if (!endpoint_.adopt(*this, in_start_)) broken(Status::kRefused, "a joining lane's token or its tag is not known");
  return false;
}

bool TcpChannel::on_data_header() {
  const auto& h = in_start_.header;
  if (!connection->authorized || h.length == 0 || h.length > kMaxChunkBytes) {
    broken(Status::kProtocolError, connection->authorized ? "data frame of " + std::to_string(h.length) + " bytes"
                                                          : "data before the handshake");
    return false;
  }
  if (open_ && !open_->begin(h)) return forged();
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

}  // namespace sage_kvt
