// SPDX-License-Identifier: Apache-2.0
#include "shm/channel.h"

#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>

namespace sage_kvt {
namespace {

constexpr uint64_t kSocketCheckNs = 100000;

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
      connection->chunk_failed(post, Status::kConnectionLost, "");
    }
    flight.busy = false;
  }
  if (next_.post) {
    auto post = std::move(next_.post);
    connection->chunk_failed(post, Status::kConnectionLost, "");
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
    connection->chunk_failed(ended, Status::kCancelled, "");
  }
  if (next_.post && next_.post->id == post.id) {
    auto ended = std::move(next_.post);
    connection->chunk_failed(ended, Status::kCancelled, "");
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

}  // namespace sage_kvt
