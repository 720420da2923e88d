// SPDX-License-Identifier: Apache-2.0
// A shm channel's receiving half: records from the ring, checked before anything is believed.
#include <cstring>

#include "shm/channel.h"

namespace sage_kvt {
namespace {

constexpr size_t kRecordsATurn = 64;
// The sender is woken once for so many acks, or for the last that is due.
constexpr size_t kAcksAWake = 2;
// Placed in one turn, before others get at the channel.
constexpr uint64_t kTurnBytes = 4u << 20;

}  // namespace

bool ShmChannel::receive_some() {
  bool moved = false;
  size_t silent_acks = 0;
  bytes_placed_ = 0;
  for (size_t i = 0; i < kRecordsATurn && bytes_placed_ < kTurnBytes && !connection->inbox_full(); ++i) {
    const auto result = reader_->read(&record_);
    if (result == RingReader::Result::kEmpty) break;
    moved = true;
    connection->liveness.heard();
    if (result == RingReader::Result::kBroken || !on_record()) {
      broken(Status::kProtocolError, "a record in the shared ring is not valid");
      return true;
    }
    // The sender sees acks before this turn is over, but is not woken for each: a wake-up costs us, too.
    while (!acks_.empty() && put({{&acks_.front(), sizeof(Ack)}}, sizeof(Ack))) {
      acks_.pop_front();
      ++silent_acks;
    }
    if (silent_acks >= kAcksAWake || reader_->empty()) {
      after_records();
      silent_acks = 0;
    }
  }
  if (moved && !dead) after_records();
  return moved;
}

bool ShmChannel::on_record() {
  RecordHeader header;
  std::memcpy(&header, record_.data(), sizeof header);
  switch (static_cast<RecordType>(header.type)) {
    case RecordType::kMessage: {
      MessageRecord message;
      if (header.size < sizeof message) return false;
      std::memcpy(&message, record_.data(), sizeof message);
      const uint64_t most = connection->authorized ? kMaxMessageBytes : kMaxUnauthorizedMessageBytes;
      if (message.length > most || sizeof message + message.length > header.size) return false;
      endpoint_.emit_message(
          *connection, std::string(reinterpret_cast<const char*>(record_.data()) + sizeof message, message.length));
      return true;
    }
    case RecordType::kNotice:
      return on_notice();
    case RecordType::kAck: {
      Ack ack;
      if (header.size != sizeof ack) return false;
      std::memcpy(&ack, record_.data(), sizeof ack);
      return on_ack(ack);
    }
    case RecordType::kGrant: {
      GrantRecord grant;
      if (header.size != sizeof grant || !connection->authorized) return false;
      std::memcpy(&grant, record_.data(), sizeof grant);
      connection->granted({grant.window, grant.parts});
      return true;
    }
  }
  return false;
}

bool ShmChannel::on_notice() {
  Notice notice;
  // A peer that takes no acknowledgements has more in flight than it may.
  if (!connection->authorized || record_.size() < sizeof notice || acks_.size() >= kSlots) return false;
  std::memcpy(&notice, record_.data(), sizeof notice);
  const auto* pieces = reinterpret_cast<const PeerPiece*>(record_.data() + sizeof notice);
  if (notice.slot >= kSlots || notice.pieces > kMaxPieces || notice.length > kMaxChunkBytes) return false;
  if (sizeof notice + notice.pieces * sizeof(PeerPiece) > record_.size()) return false;
  if (notice.flags & kInArena) {
    const uint64_t size = endpoint_.shm().arena_bytes;
    if (notice.arena_offset > size || notice.length > size - notice.arena_offset) return false;
  } else {
    uint64_t total = 0;
    for (uint32_t i = 0; i < notice.pieces; ++i) {
      if (pieces[i].length > notice.length) return false;
      total += pieces[i].length;
    }
    if (total != notice.length) return false;
  }
  place(notice, pieces);
  return true;
}

bool ShmChannel::on_ack(const Ack& ack) {
  if (ack.slot >= kSlots || !flight_[ack.slot].busy || ack.status > static_cast<uint32_t>(Status::kIoError))
    return false;
  auto& flight = flight_[ack.slot];
  flight.busy = false;
  waiting_for_ack_ = false;
  --in_flight_;
  bytes_in_flight_ -= flight.length;
  arena_.free(ack.slot);
  auto post = std::move(flight.post);
  flight.post.reset();
  if (post) {
    const auto status = static_cast<Status>(ack.status);
    if (status == Status::kOk)
      connection->chunk_sent(post, flight.offset, flight.length);
    else
      connection->chunk_failed(post, status, "the receiver did not take a chunk");
  }
  return true;
}

}  // namespace sage_kvt
