// SPDX-License-Identifier: Apache-2.0
// The system calls that channels make, answered by a peer that lies in this process.
//
// The linker sends what the data plane calls here (--wrap, CMakeLists.txt). Descriptors from `kFirstFake` on are the
// peer's doing, all others the system's. No thread, no kernel: what an input does depends on the input alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <set>
#include <vector>

namespace sage_kvt::fuzz {

constexpr int kFirstFake = 1 << 20;

struct Packet {
  std::vector<uint8_t> bytes;
  std::vector<int> fds;  // passed with it
};

// What a fake socket gives and takes.
struct Socket {
  // A stream gives `allowed` of these and then waits; behind the last one the peer has closed.
  std::vector<uint8_t> stream;
  size_t given = 0, allowed = 0;
  bool reset = false;  // the peer does not close but breaks the connection
  bool packets_only = false;
  std::deque<Packet> packets;
  bool closed = false;  // by a peer that sends packets
  // What was sent to it, as far as it is kept; so many bytes more are taken for now.
  std::vector<uint8_t> sent;
  size_t room = SIZE_MAX;
};

struct Machine {
  std::map<int, Socket> sockets;
  std::set<int> open;  // fake descriptors that are not closed
  int next = kFirstFake;
  // Of the one shared memory that there is.
  uint8_t* shared = nullptr;
  size_t shared_bytes = 0;
  bool mapped = false;
  uint64_t shared_size_told = 0;  // fstat's
  int seals = 0;
  // What of the peer's memory process_vm_readv may read.
  std::vector<uint8_t> peer_memory;

  int new_fd() {
    open.insert(next);
    return next++;
  }
  // A new run: descriptors are as before the first, sockets and memory are empty.
  void reset();
};

Machine& machine();

}  // namespace sage_kvt::fuzz
