// SPDX-License-Identifier: Apache-2.0
// What a shm peer passes before memory is shared: packets of any bytes and descriptors, of memory that may be too
// small.
#include <fcntl.h>

#include "../cpp/check.h"
#include "shm_peer.h"

namespace sage_kvt::fuzz {
namespace {

// Bits of an input's first byte.
constexpr uint8_t kIncoming = 1, kHonest = 2, kOtherSize = 4, kOtherSeals = 8, kHangsUp = 16;
constexpr size_t kMaxFds = 4;

}  // namespace

int attack(const uint8_t* data, size_t size) {
  Input input(data, size);
  reset_shm_machine();
  const uint8_t flags = input.byte();
  if (flags & kOtherSize) machine().shared_size_told = input.number<uint64_t>();
  if (flags & kOtherSeals) machine().seals = input.number<int>();
  {
    const bool incoming = flags & kIncoming;
    AttackedConnection attacked(shm_endpoint(), incoming);
    ShmPeer peer(attacked, incoming);
    if (flags & kHonest) peer.shake_hands(true);
    bool ready = false;
    while (!input.empty() && !peer.channel()->dead) {
      const size_t fds = input.byte() % kMaxFds;
      const auto packet = input.bytes(input.byte());
      peer.send(packet.data(), packet.size(), fds);
      attacked.turn();
      ready |= incoming && attacked.connection()->announced;
    }
    if (flags & kHangsUp) peer.hang_up();
    while (attacked.turn()) {
    }
    ready |= incoming && attacked.connection()->announced;
    // Memory that the peer can take away under us is never used.
    const bool sound =
        machine().shared_size_told >= kSharedBytes && machine().seals >= 0 && (machine().seals & F_SEAL_SHRINK) != 0;
    CHECK(!ready || sound);
    attacked.end();
    for (auto& [fd, socket] : machine().sockets)  // what was never taken
      for (const auto& packet : socket.packets)
        for (const int passed : packet.fds) machine().open.erase(passed);
  }
  CHECK(machine().open.empty() && !machine().mapped);
  return 0;
}

}  // namespace sage_kvt::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) { return sage_kvt::fuzz::attack(data, size); }
