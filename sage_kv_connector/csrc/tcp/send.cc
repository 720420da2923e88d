// SPDX-License-Identifier: Apache-2.0
// A tcp channel's sending half: one frame after the other, gathered from the pages.
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
const char zeros[64u << 10] = {};  // payload of a revoked chunk
}  // namespace

void TcpChannel::revoke(const Post& post) {
  if (kept_) kept_->revoke(*connection, post);
  if (!out_post_ || out_post_->id != post.id) return;
  if (seal_) {
    revoke_sealed();
    return;
  }
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
  void_chunk();
}

// The chunk that leaves counts no more.
void TcpChannel::void_chunk() {
  const auto ended = std::move(out_post_);
  if (!kept_) connection->chunk_failed(ended, Status::kCancelled, "");
}

void TcpChannel::begin_control() {
  if (!control_.empty()) {
    out_header_ = control_.front();
    control_.erase(control_.begin());
  } else if (std::exchange(owes_pong_, false)) {
    out_header_ = control_frame(FrameType::kPong, {}, 0);
  } else if (std::exchange(owes_taken_, false)) {
    taken_told_ = taken_;
    out_header_ = control_frame(FrameType::kTaken, {}, taken_);
  } else {
    owes_ping_ = false;
    out_header_ = control_frame(FrameType::kPing, {}, 0);
  }
  start_frame({}, seals());
  const auto type = static_cast<FrameType>(out_header_.type);
  static Tag nothing{};
  if (!seals() && type == FrameType::kPreface && out_header_.token != Token{})
    out_.push_back({&nothing, sizeof nothing});
  // An answer: what comes behind it is counted.
  if (type == FrameType::kJoin && out_header_.offset > 0) kept_ = std::make_unique<Kept>();
}

void TcpChannel::begin_join() {
  const auto joinable = std::move(joins_told_.front());
  joins_told_.erase(joins_told_.begin());
  out_message_ = written(joinable.addresses);
  out_header_ = control_frame(FrameType::kJoin, joinable.token, joinable.lanes);
  out_header_.length = out_message_.size();
  out_header_.header_crc = frame_header_crc(out_header_);
  std::vector<iovec> body;
  if (!out_message_.empty()) body.push_back({out_message_.data(), out_message_.size()});
  start_frame(body, seals());
  if (!joinable.addresses.empty()) kept_ = std::make_unique<Kept>();
}

// The frame that leaves, until the peer took it.
void TcpChannel::keep(Kept::Frame frame) {
  if (!kept_) return;
  kept_->add(std::move(frame));
  out_kept_ = true;
  const uint64_t look = now_ns() + SocketProgress::kLookNs;
  if (const uint64_t next = alarm; next == 0 || next > look) alarm = look;
}

bool TcpChannel::begin_frame() {
  out_.clear();
  out_next_ = 0;
  if (!joins_told_.empty() && control_.empty()) {
    begin_join();
    return true;
  }
  if (owes_control()) {
    begin_control();
    return true;
  }
  if (!carries_messages()) return false;
  Grant grant;
  if (connection->take_grant(*this, &grant)) {
    out_header_ = control_frame(FrameType::kGrant, {}, grant.parts, grant.window);
    start_frame({}, seals());
    keep(grant);
    return true;
  }
  out_header_ = FrameHeader{};
  out_header_.magic = kFrameMagic;
  // Notes first: what a chunk's end brings about here is not told there before that end is.
  const bool note = connection->take_note(*this, &out_message_);
  if (note || connection->take_message(*this, &out_message_)) {
    out_header_.type = static_cast<uint8_t>(note ? FrameType::kNote : FrameType::kMessage);
    out_header_.length = out_message_.size();
    out_header_.header_crc = frame_header_crc(out_header_);
    const bool sealed = seals();
    if (!note && plain_messages_ > 0) --plain_messages_;
    std::vector<iovec> body;
    if (!out_message_.empty()) body.push_back({out_message_.data(), out_message_.size()});
    start_frame(body, sealed);
    if (!note) ++endpoint_.counters.messages_sent;
    if (kept_) keep(note ? Kept::Frame(Kept::Note{out_message_}) : Kept::Frame(out_message_));
    return true;
  }
  Chunk chunk;
  if (!connection->take_chunk(is_path(), endpoint_.options().chunk_bytes, kMaxPieces, &out_post_, &chunk)) return false;
  out_header_.type = static_cast<uint8_t>(FrameType::kData);
  const bool sums = out_post_->checksum && !seals();  // a tag stands for it
  out_header_.flags = sums ? kFlagChecksum : 0;
  out_header_.length = out_length_ = chunk.length;
  out_header_.window = out_post_->window;
  out_header_.offset = chunk.offset;
  out_header_.generation = out_post_->generation;
  out_header_.header_crc = frame_header_crc(out_header_);
  out_trailer_ = FrameTrailer{0, 0, out_post_->generation};
  if (sums) {
    Stopwatch watch(endpoint_.options().measures, endpoint_.counters.verify_ns);
    for (const auto& piece : chunk.pieces) out_trailer_.crc = crc32c(out_trailer_.crc, piece.iov_base, piece.iov_len);
  }
  if (kept_) keep(Kept::Flight{out_post_, chunk});
  chunk.pieces.push_back({&out_trailer_, sizeof out_trailer_});
  start_frame(chunk.pieces, seals());
  return true;
}

void TcpChannel::start_frame(const std::vector<iovec>& body, bool sealed) {
  out_active_ = true;
  out_.reserve(body.size() + 2);
  out_.push_back({&out_header_, sizeof out_header_});
  if (!sealed) {
    out_.insert(out_.end(), body.begin(), body.end());
    return;
  }
  if (!seal_->header(out_header_, &out_tag_)) return seal_failed();
  out_.push_back({&out_tag_, sizeof out_tag_});
  if (out_header_.length == 0) return;
  if (!seal_->begin(out_header_)) return seal_failed();
  body_ = body;
  body_next_ = 0;
  sealing_ = true;
  seal_more();
}

void TcpChannel::end_frame() {
  out_active_ = out_kept_ = false;
  out_message_.clear();
  if (!out_post_) return;
  endpoint_.counters.bytes_sent += out_length_;
  ++endpoint_.counters.chunks_sent;
  const auto post = std::move(out_post_);
  if (!kept_) connection->chunk_sent(post, out_header_.offset, out_length_);
}

bool TcpChannel::send_some() {
  bool moved = false;
  for (uint64_t turn = 0; turn < kTurnBytes;) {
    if (!out_active_ && !begin_frame()) return moved;
    if (dead) return true;
    msghdr message{};
    message.msg_iov = out_.data() + out_next_;
    message.msg_iovlen = out_.size() - out_next_;
    const ssize_t n = [&] {
      Stopwatch watch(endpoint_.options().measures && out_post_ != nullptr, endpoint_.counters.send_ns);
      return ::sendmsg(fd_, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    }();
    if (n < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) {
        if (!want_write_) ++endpoint_.counters.stalls;
        want_write_ = true;
        return moved;
      }
      broken(Status::kConnectionLost, std::strerror(errno));
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
    if (out_next_ < out_.size()) continue;
    if (sealing_) {
      out_.clear();
      out_next_ = 0;
      seal_more();
    } else {
      end_frame();
    }
    if (dead) return true;
  }
  return moved;
}

}  // namespace sage_kvt
