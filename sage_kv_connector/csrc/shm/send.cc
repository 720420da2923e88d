// SPDX-License-Identifier: Apache-2.0
// A shm channel's sending half: acknowledgements, grants, messages, and notices of chunks.
#include <algorithm>
#include <cstring>

#include "crc32c.h"
#include "shm/channel.h"

namespace sage_kvt {
namespace {
// Told to the peer and not acknowledged: enough to keep it busy, little for an urgent chunk to wait for.
constexpr uint64_t kMaxBytesInFlight = 16u << 20;
}  // namespace

bool ShmChannel::has_credit() const { return in_flight_ < kSlots && bytes_in_flight_ < kMaxBytesInFlight; }

bool ShmChannel::put(const std::vector<RingWriter::Part>& parts, uint64_t total) {
  if (writer_->write(parts)) {
    waiting_for_room_ = false;
    return true;
  }
  ++endpoint_.counters.stalls;
  waiting_bytes_ = total;
  waiting_for_room_ = writer_->wait_for_room(total);
  return false;
}

bool ShmChannel::send_some() {
  bool moved = false;
  while (!acks_.empty()) {
    if (!put({{&acks_.front(), sizeof(Ack)}}, sizeof(Ack))) break;
    acks_.pop_front();
    moved = true;
  }
  Grant grant;
  while (acks_.empty() && connection->take_grant(*this, &grant)) {
    const GrantRecord record{{sizeof record, static_cast<uint32_t>(RecordType::kGrant)}, grant.window, grant.parts};
    if (!put({{&record, sizeof record}}, sizeof record)) {
      connection->queue_grant(grant);
      break;
    }
    moved = true;
  }
  while (acks_.empty() && (has_message_ || connection->take_message(*this, &message_))) {
    has_message_ = true;
    const uint64_t size = sizeof(MessageRecord) + message_.size();
    MessageRecord header{{static_cast<uint32_t>(padded_to_8(size)), static_cast<uint32_t>(RecordType::kMessage)},
                         message_.size()};
    if (!put({{&header, sizeof header}, {message_.data(), message_.size()}}, size)) break;
    has_message_ = false;
    ++endpoint_.counters.messages_sent;
    moved = true;
  }
  while (acks_.empty() && !has_message_ && send_chunk()) moved = true;
  if (moved) wake_peer();
  return moved;
}

bool ShmChannel::send_chunk() {
  const bool direct = peer_reads_ && we_read_;
  if (!next_.post) {
    if (!has_credit()) return false;
    uint64_t most = endpoint_.options().chunk_bytes;
    if (!direct) most = std::min(most, endpoint_.shm().arena_bytes / 4);
    if (!connection->take_chunk(is_path(), most, kMaxPieces, &next_.post, &next_.chunk)) return false;
  }
  size_t slot = next_slot_;
  while (flight_[slot].busy) slot = (slot + 1) % kSlots;
  const auto& chunk = next_.chunk;
  const auto& post = *next_.post;
  Notice notice{};
  notice.header.type = static_cast<uint32_t>(RecordType::kNotice);
  notice.window = post.window;
  notice.offset = chunk.offset;
  notice.length = chunk.length;
  notice.generation = post.generation;
  notice.slot = static_cast<uint32_t>(slot);
  std::vector<PeerPiece> pieces;
  if (direct) {
    notice.pieces = static_cast<uint32_t>(chunk.pieces.size());
    pieces.reserve(chunk.pieces.size());
    for (const auto& p : chunk.pieces) pieces.push_back({reinterpret_cast<uint64_t>(p.iov_base), p.iov_len});
    if (post.checksum) {
      Stopwatch watch(endpoint_.options().measures, endpoint_.counters.verify_ns);
      for (const auto& p : chunk.pieces) notice.crc = crc32c(notice.crc, p.iov_base, p.iov_len);
    }
  } else {
    const auto offset = arena_.take(chunk.length, slot);
    if (!offset) {
      waiting_for_ack_ = true;
      return false;
    }
    notice.arena_offset = *offset;
    notice.flags |= kInArena;
    Stopwatch watch(endpoint_.options().measures, endpoint_.counters.send_ns);
    uint8_t* to = arena(side_) + notice.arena_offset;
    for (const auto& p : chunk.pieces) {
      std::memcpy(to, p.iov_base, p.iov_len);
      if (post.checksum) notice.crc = crc32c(notice.crc, to, p.iov_len);
      to += p.iov_len;
    }
  }
  if (post.checksum) notice.flags |= kHasCrc;
  const bool much_in_flight = in_flight_ >= kSlots / 2 || bytes_in_flight_ + chunk.length >= kMaxBytesInFlight / 2;
  if (direct && chunk.ack_later && !much_in_flight) notice.flags |= kAckLater;
  const uint64_t size = sizeof notice + pieces.size() * sizeof(PeerPiece);
  notice.header.size = static_cast<uint32_t>(padded_to_8(size));
  shared_->live[side_][slot].store(post.generation, std::memory_order_seq_cst);
  if (!put({{&notice, sizeof notice}, {pieces.data(), pieces.size() * sizeof(PeerPiece)}}, size)) {
    if (!direct) arena_.undo_take();
    return false;
  }
  endpoint_.counters.bytes_sent += chunk.length;
  ++endpoint_.counters.chunks_sent;
  bytes_in_flight_ += chunk.length;
  flight_[slot] = {std::move(next_.post), chunk.offset, chunk.length, true};
  next_.post.reset();
  ++in_flight_;
  next_slot_ = (slot + 1) % kSlots;
  return true;
}

}  // namespace sage_kvt
