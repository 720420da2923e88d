// SPDX-License-Identifier: Apache-2.0
// A connection between two processes of one node: its life (channel.cc), what it sends (send.cc), receives (receive.cc)
// and copies (placement.cc). docs/protocol.md, "shm", is the format.
//
// The sender writes a notice; the receiver copies from the sender's pages straight into its
// window (process_vm_readv), checks that the chunk was not revoked meanwhile, and acknowledges.
// Where that system call is forbidden, the bytes go through an arena in the shared memory.
#pragma once

#include <sys/types.h>

#include <deque>

#include "endpoint.h"
#include "shm/arena.h"
#include "shm/ring.h"

namespace sage_kvt {

struct ShmOptions {
  bool allow_direct = true;
  uint64_t arena_bytes = 32u << 20;
};

class ShmEndpoint;

class ShmChannel : public Channel {
 public:
  ShmChannel(std::shared_ptr<Connection> connection, ShmEndpoint& endpoint, int socket, bool incoming);
  ~ShmChannel() override;

  bool progress() override;
  bool push() override;
  bool arm() override;
  void disarm(bool lane_sleeps) override;
  void revoke(const Post& post) override;
  void shut() override;
  bool stuck() const override { return has_message_ || next_.post || !acks_.empty(); }
  void expire() override;
  void ping() override;
  std::vector<int> fds() const override;

  // The connecting side begins; false with errno when the peer can't be told.
  bool begin();

 private:
  struct InFlight {
    std::shared_ptr<Post> post;  // empty once revoked; the slot stays taken until the ack
    uint64_t offset = 0, length = 0;
    bool busy = false;
  };

  bool handshake();
  bool on_packet(const uint8_t* data, size_t size, std::vector<int>* fds);
  bool map(int memfd, bool create);
  void ready();
  bool can_read_peer(uint64_t address, uint64_t nonce);
  bool send_packet(const void* data, size_t size, const std::vector<int>& fds);
  bool peer_gone();

  bool send_some();
  bool send_chunk();
  bool has_credit() const;
  Status still_valid(const Notice& notice, uint32_t crc, std::string* detail);
  bool receive_some();
  bool on_record();
  bool on_notice();
  void place(const Notice& notice, const PeerPiece* pieces);
  Status copy_direct(Window& window, const Notice& notice, const PeerPiece* pieces, std::string* detail);
  Status copy_from_arena(Window& window, const Notice& notice, std::string* detail);
  bool on_ack(const Ack& ack);
  void wake_peer();
  // Wakes it if it waits for the acknowledgements of this turn, or for the room of what was read.
  void after_records();
  void write_peer_wake();

  uint8_t* arena(int side) const;
  bool put(const std::vector<RingWriter::Part>& parts, uint64_t total);

  ShmEndpoint& endpoint_;
  int socket_, own_wake_ = -1, peer_wake_ = -1;
  const bool incoming_;
  const int side_;  // 0 connecting, 1 accepting
  enum class State { kSetUp, kAnswer, kFinal, kReady } state_;
  pid_t peer_pid_ = 0;
  SharedLayout* shared_ = nullptr;
  size_t shared_bytes_ = 0;
  uint64_t nonce_ = 0;
  bool we_read_ = false;     // we may read the peer's memory
  bool peer_reads_ = false;  // the peer may read ours: our chunks go direct
  std::string why_not_;
  std::unique_ptr<RingWriter> writer_;
  std::unique_ptr<RingReader> reader_;
  std::vector<uint8_t> record_;
  std::string message_;  // taken from the connection, not yet in the ring
  bool has_message_ = false;
  std::deque<Ack> acks_;  // not yet in the ring
  struct {
    std::shared_ptr<Post> post;
    Chunk chunk;
  } next_;  // cut, not yet in the ring
  uint64_t waiting_bytes_ = 0;
  bool waiting_for_room_ = false, waiting_for_ack_ = false;
  bool ack_wakes_ = false;  // the peer waits for an acknowledgement that it has not been woken for
  InFlight flight_[kSlots];
  size_t in_flight_ = 0, next_slot_ = 0;
  uint64_t bytes_in_flight_ = 0, bytes_placed_ = 0;
  ShmArena arena_;  // our half, as the sender
  uint64_t socket_checked_ = 0;
};

class ShmEndpoint : public Endpoint {
 public:
  ShmEndpoint(const EndpointOptions& options, const ShmOptions& shm);
  ~ShmEndpoint() override;

  // Makes an unguessable name of its own; `address` must be empty.
  std::string listen(const std::string& address) override;
  uint64_t connect(const std::string& name, double timeout_s) override;

  const ShmOptions& shm() const { return shm_; }

 private:
  void accepted(int fd);
  const ShmOptions shm_;
};

}  // namespace sage_kvt
