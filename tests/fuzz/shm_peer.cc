// SPDX-License-Identifier: Apache-2.0
#include "shm_peer.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../cpp/check.h"

namespace sage_kvt::fuzz {
namespace {

constexpr size_t kPeerMemory = 16u << 10;
// Of a ring: what was written, to be zeroed after the run.
struct Written {
  size_t at, size;
};
std::vector<Written> written;

// One for all runs, since 8 MiB take long to map and to zero; a page that nobody may touch lies behind it.
uint8_t* make_shared_memory() {
  const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  const size_t whole = (kSharedBytes + page - 1) / page * page;
  void* memory = ::mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(memory != MAP_FAILED && ::mprotect(static_cast<uint8_t*>(memory) + whole, page, PROT_NONE) == 0);
  return static_cast<uint8_t*>(memory) + whole - kSharedBytes;
}

}  // namespace

SteppedEndpoint<ShmEndpoint>& shm_endpoint() {
  static auto* made = new SteppedEndpoint<ShmEndpoint>(stepped_options(1), ShmOptions{true, kArenaBytes});
  return *made;
}

void reset_shm_machine() {
  shm_endpoint();  // whose own descriptors are not the run's
  auto& here = machine();
  here.reset();
  if (here.shared == nullptr) {
    here.shared = make_shared_memory();
    here.shared_bytes = kSharedBytes;
    here.peer_memory.resize(kPeerMemory, 0x5A);
  }
  here.shared_size_told = kSharedBytes;
  here.seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
  auto& layout = *reinterpret_cast<SharedLayout*>(here.shared);
  for (int side = 0; side < 2; ++side) {
    // Ours writes from its beginning on.
    std::memset(layout.ring[side], 0, std::min<uint64_t>(layout.index[side].head, kRingBytes));
    for (const auto& range : written) {
      const size_t first = std::min(range.size, kRingBytes - range.at);
      std::memset(layout.ring[side] + range.at, 0, first);
      std::memset(layout.ring[side], 0, range.size - first);
    }
  }
  written.clear();
  std::memset(here.shared, 0, offsetof(SharedLayout, ring));
  std::memset(here.shared + sizeof(SharedLayout), 0, 2 * kArenaBytes);
}

ShmPeer::ShmPeer(AttackedConnection& attacked, bool incoming) : side_(incoming ? 1 : 0) {
  socket_ = machine().new_fd();
  machine().sockets[socket_].packets_only = true;
  channel_ = std::make_shared<ShmChannel>(attacked.connection(), shm_endpoint(), socket_, incoming);
  channel_->deadline = now_ns() + kSetUpNs;
  CHECK(channel_->begin());
  shm_endpoint().attach(channel_);
}

void ShmPeer::send(const void* packet, size_t size, size_t fds) {
  const auto* bytes = static_cast<const uint8_t*>(packet);
  Packet sent{{bytes, bytes + size}, {}};
  for (size_t i = 0; i < fds; ++i) sent.fds.push_back(machine().new_fd());
  machine().sockets[socket_].packets.push_back(std::move(sent));
}

void ShmPeer::shake_hands(bool can_read) {
  auto& memory = machine().peer_memory;
  const auto address = reinterpret_cast<uint64_t>(memory.data());
  uint64_t nonce = 0;
  std::memcpy(&nonce, memory.data(), sizeof nonce);
  if (side_ == 1) {
    const SetUpPacket packet{kShmMagic, kShmVersion, kArenaBytes, address, nonce};
    send(&packet, sizeof packet, 2);
    const FinalPacket last{kShmMagic, can_read, {}};
    send(&last, sizeof last, 0);
  } else {
    const AnswerPacket packet{kShmMagic, can_read, address, nonce, {}};
    send(&packet, sizeof packet, 1);
  }
}

void ShmPeer::write_raw(size_t at, const std::vector<uint8_t>& bytes) {
  at %= kRingBytes;
  uint8_t* ring = layout().ring[1 - side_];
  const size_t first = std::min(bytes.size(), kRingBytes - at);
  std::copy_n(bytes.data(), first, ring + at);
  std::copy(bytes.begin() + static_cast<std::ptrdiff_t>(first), bytes.end(), ring);
  written.push_back({at, bytes.size()});
}

void ShmPeer::write_record(const std::vector<uint8_t>& record, uint64_t size) {
  auto& head = their_ring().head;
  write_raw(head % kRingBytes, record);
  head += std::max(padded_to_8(record.size()), size);
}

}  // namespace sage_kvt::fuzz
