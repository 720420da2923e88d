// SPDX-License-Identifier: Apache-2.0
// The other process of a shm connection: it passes what it likes at the rendezvous, and writes what it likes into the
// memory that both share.
#pragma once

#include <memory>
#include <vector>

#include "attacked_connection.h"
#include "shm/channel.h"
#include "system_calls.h"

namespace sage_kvt::fuzz {

constexpr uint64_t kArenaBytes = 8u << 10;
constexpr size_t kSharedBytes = sizeof(SharedLayout) + 2 * kArenaBytes;

// Packets of the rendezvous (docs/protocol.md), as the peer sends them.
struct SetUpPacket {
  uint32_t magic, version;
  uint64_t arena_bytes, nonce_address, nonce;
};
struct AnswerPacket {
  uint32_t magic, can_read;
  uint64_t nonce_address, nonce;
  char why_not[96];
};
struct FinalPacket {
  uint32_t magic, can_read;
  char why_not[96];
};

SteppedEndpoint<ShmEndpoint>& shm_endpoint();

// The run's memory and descriptors are new.
void reset_shm_machine();

class ShmPeer {
 public:
  // Of a connection that we accepted (`incoming`) or dialled.
  ShmPeer(AttackedConnection& attacked, bool incoming);

  const std::shared_ptr<ShmChannel>& channel() const { return channel_; }
  // A packet with so many descriptors.
  void send(const void* packet, size_t size, size_t fds);
  // What an honest peer sends until chunks can go. `can_read`: our memory, from there.
  void shake_hands(bool can_read);
  void hang_up() { machine().sockets[socket_].closed = true; }

  // -- the shared memory

  RingIndex& their_ring() const { return layout().index[1 - side_]; }
  RingIndex& our_ring() const { return layout().index[side_]; }
  std::atomic<uint64_t>& live(size_t slot) const { return layout().live[1 - side_][slot % kSlots]; }
  // At the head of their ring, which moves by a multiple of 8 that covers it, or by `size` if that is more.
  void write_record(const std::vector<uint8_t>& record, uint64_t size = 0);
  // Anywhere in their ring.
  void write_raw(size_t at, const std::vector<uint8_t>& bytes);

 private:
  SharedLayout& layout() const { return *reinterpret_cast<SharedLayout*>(machine().shared); }

  const int side_;  // ours
  int socket_ = -1;
  std::shared_ptr<ShmChannel> channel_;
};

}  // namespace sage_kvt::fuzz
