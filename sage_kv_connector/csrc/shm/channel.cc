// SPDX-License-Identifier: Apache-2.0
#include "shm/channel.h"

#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "crc32c.h"

namespace sage_kvt {
namespace {

constexpr size_t kRecordsATurn = 64;
// The sender is woken once for so many acks, or for the last that is due.
constexpr size_t kAcksAWake = 2;
constexpr uint64_t kSocketCheckNs = 100000;
// Placed in one turn, before others get at the channel.
constexpr uint64_t kTurnBytes = 4u << 20;
// Told to the peer and not acknowledged: enough to keep it busy, little for an urgent chunk to wait for.
constexpr uint64_t kMaxBytesInFlight = 16u << 20;

}  // namespace

ShmChannel::ShmChannel(std::shared_ptr<Connection> connection, ShmEndpoint& endpoint, int socket, bool incoming)
    : Channel(std::move(connection)),
      endpoint_(endpoint),
      socket_(socket),
      own_wake_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      incoming_(incoming),
      side_(incoming ? 1 : 0),
      state_(incoming ? State::kSetUp : State::kAnswer),
      arena_(endpoint.shm().arena_bytes) {}

ShmChannel::~ShmChannel() {
  for (int fd : {socket_, own_wake_, peer_wake_})
    if (fd >= 0) ::close(fd);
  if (shared_) ::munmap(shared_, shared_bytes_);
}

std::vector<int> ShmChannel::fds() const { return {socket_, own_wake_}; }

uint8_t* ShmChannel::arena(int side) const {
  return reinterpret_cast<uint8_t*>(shared_) + sizeof(SharedLayout) +
         static_cast<uint64_t>(side) * endpoint_.shm().arena_bytes;
}

void ShmChannel::shut() {
  // First make void what the peer may be reading, then forget it.
  if (shared_)
    for (auto& live : shared_->live[side_]) live.exchange(0, std::memory_order_seq_cst);
  for (auto& flight : flight_) {
    if (flight.post) {
      auto post = std::move(flight.post);
      connection->chunk_done(post, Status::kConnectionLost, "");
    }
    flight.busy = false;
  }
  if (next_.post) {
    auto post = std::move(next_.post);
    connection->chunk_done(post, Status::kConnectionLost, "");
  }
  for (int fd : fds()) lane->forget(fd);
  if (socket_ >= 0) ::shutdown(socket_, SHUT_RDWR);
  for (int* fd : {&socket_, &own_wake_, &peer_wake_}) {
    if (*fd >= 0) ::close(*fd);
    *fd = -1;
  }
}

void ShmChannel::revoke(const Post& post) {
  for (size_t slot = 0; slot < kSlots; ++slot) {
    auto& flight = flight_[slot];
    if (!flight.post || flight.post->id != post.id) continue;
    shared_->live[side_][slot].exchange(0, std::memory_order_seq_cst);  // before the memory is written again
    auto ended = std::move(flight.post);
    connection->chunk_done(ended, Status::kCancelled, "");
  }
  if (next_.post && next_.post->id == post.id) {
    auto ended = std::move(next_.post);
    connection->chunk_done(ended, Status::kCancelled, "");
  }
}

bool ShmChannel::progress() {
  if (state_ != State::kReady) {
    const bool moved = handshake();
    if (dead || state_ != State::kReady) return moved;
  }
  if (reader_->pinged()) reader_->answer_ping();
  if (writer_->answered()) connection->liveness.heard();
  const bool received = receive_some();
  if (dead) return true;
  const bool sent = send_some();
  if (dead) return true;
  if (received || sent) return true;
  return peer_gone();
}

bool ShmChannel::push() {
  const bool direct = peer_reads_ && we_read_;
  if (state_ != State::kReady || !direct || stuck()) return false;
  if (send_chunk()) wake_peer();
  return !stuck() && !next_.post && !connection->has_work();
}

bool ShmChannel::peer_gone() {
  const uint64_t now = now_ns();
  if (now - socket_checked_ < kSocketCheckNs) return false;
  socket_checked_ = now;
  char byte;
  const ssize_t n = ::recv(socket_, &byte, 1, MSG_DONTWAIT | MSG_PEEK);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return false;
  broken(n == 0 ? Status::kConnectionLost : Status::kProtocolError,
         n == 0 ? "the peer process closed the connection or ended" : "unexpected data on the rendezvous socket");
  return true;
}

void ShmChannel::expire() { broken(Status::kIoError, "the rendezvous took too long"); }

void ShmChannel::ping() {
  writer_->ping();
  wake_peer();
}

bool ShmChannel::has_credit() const { return in_flight_ < kSlots && bytes_in_flight_ < kMaxBytesInFlight; }

bool ShmChannel::arm() {
  uint64_t value;
  (void)!::read(own_wake_, &value, sizeof value);
  if (state_ != State::kReady) return true;
  reader_->set_sleeping(true);
  // The wake-up for room may have come while another thread held the channel, and gone.
  if (waiting_for_room_) waiting_for_room_ = writer_->wait_for_room(waiting_bytes_);
  const bool can_send =
      !waiting_for_room_ && !waiting_for_ack_ &&
      (!acks_.empty() || has_message_ || next_.post || (has_credit() && connection->has_work_for(*this)));
  if ((reader_->empty() || connection->inbox_full()) && !can_send && !reader_->pinged()) return true;
  reader_->set_sleeping(false);
  return false;
}

void ShmChannel::disarm(bool) {
  if (state_ == State::kReady) reader_->set_sleeping(false);
}

void ShmChannel::wake_peer() {
  ack_wakes_ = false;
  if (writer_->reader_sleeps() || reader_->writer_blocked()) write_peer_wake();
}

void ShmChannel::after_records() {
  if (ack_wakes_)
    wake_peer();
  else if (reader_->writer_blocked())
    write_peer_wake();
}

void ShmChannel::write_peer_wake() {
  uint64_t one = 1;
  (void)!::write(peer_wake_, &one, sizeof one);
}

// -- sending

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
  while (acks_.empty() && (has_message_ || connection->take_message(*this, &message_))) {
    has_message_ = true;
    const uint64_t size = sizeof(MessageRecord) + message_.size();
    MessageRecord header{{static_cast<uint32_t>(padded(size)), static_cast<uint32_t>(RecordType::kMessage)},
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
    if (!connection->take_chunk(most, kMaxPieces, &next_.post, &next_.chunk)) return false;
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
  std::vector<Piece> pieces;
  if (direct) {
    notice.pieces = static_cast<uint32_t>(chunk.pieces.size());
    pieces.reserve(chunk.pieces.size());
    for (const auto& p : chunk.pieces) pieces.push_back({reinterpret_cast<uint64_t>(p.iov_base), p.iov_len});
    if (post.checksum)
      for (const auto& p : chunk.pieces) notice.crc = crc32c(notice.crc, p.iov_base, p.iov_len);
  } else {
    const auto offset = arena_.take(chunk.length, slot);
    if (!offset) {
      waiting_for_ack_ = true;
      return false;
    }
    notice.arena_offset = *offset;
    notice.flags |= kInArena;
    uint8_t* to = arena(side_) + notice.arena_offset;
    for (const auto& p : chunk.pieces) {
      std::memcpy(to, p.iov_base, p.iov_len);
      if (post.checksum) notice.crc = crc32c(notice.crc, to, p.iov_len);
      to += p.iov_len;
    }
  }
  if (post.checksum) notice.flags |= kHasCrc;
  const bool much_in_flight = in_flight_ >= kSlots / 2 || bytes_in_flight_ + chunk.length >= kMaxBytesInFlight / 2;
  if (direct && chunk.post_waits && !much_in_flight) notice.flags |= kAckLater;
  const uint64_t size = sizeof notice + pieces.size() * sizeof(Piece);
  notice.header.size = static_cast<uint32_t>(padded(size));
  shared_->live[side_][slot].store(post.generation, std::memory_order_seq_cst);
  if (!put({{&notice, sizeof notice}, {pieces.data(), pieces.size() * sizeof(Piece)}}, size)) {
    if (!direct) arena_.undo_take();
    return false;
  }
  endpoint_.counters.bytes_sent += chunk.length;
  ++endpoint_.counters.chunks_sent;
  bytes_in_flight_ += chunk.length;
  flight_[slot] = {std::move(next_.post), chunk.length, true};
  next_.post.reset();
  ++in_flight_;
  next_slot_ = (slot + 1) % kSlots;
  return true;
}

// -- receiving

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
  }
  return false;
}

bool ShmChannel::on_notice() {
  Notice notice;
  // A peer that takes no acknowledgements has more in flight than it may.
  if (!connection->authorized || record_.size() < sizeof notice || acks_.size() >= kSlots) return false;
  std::memcpy(&notice, record_.data(), sizeof notice);
  const auto* pieces = reinterpret_cast<const Piece*>(record_.data() + sizeof notice);
  if (notice.slot >= kSlots || notice.pieces > kMaxPieces || notice.length > kMaxChunkBytes) return false;
  if (sizeof notice + notice.pieces * sizeof(Piece) > record_.size()) return false;
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
    connection->chunk_done(post, status, status == Status::kOk ? "" : "the receiver did not take a chunk");
  }
  return true;
}

}  // namespace sage_kvt
