// SPDX-License-Identifier: Apache-2.0
// Two endpoints of one process, connected: `from` posts, `to` opens windows.
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "shm_channel.h"
#include "tcp_channel.h"

namespace sage_kvt {

enum class Kind { kShmDirect, kShmArena, kTcp, kTcpLanes };
constexpr Kind kKinds[] = {Kind::kShmDirect, Kind::kShmArena, Kind::kTcp, Kind::kTcpLanes};

inline const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::kShmDirect:
      return "shm direct";
    case Kind::kShmArena:
      return "shm arena";
    case Kind::kTcp:
      return "tcp";
    default:
      return "tcp, 3 lanes";
  }
}

inline std::unique_ptr<Endpoint> make_endpoint(Kind kind) {
  EndpointOptions options;
  options.chunk_bytes = 64 << 10;
  options.lanes = kind == Kind::kTcpLanes ? 3 : 1;
  if (kind == Kind::kTcp || kind == Kind::kTcpLanes) return std::make_unique<TcpEndpoint>(options, TcpOptions{});
  ShmOptions shm;
  shm.allow_direct = kind == Kind::kShmDirect;
  shm.arena_bytes = 1 << 20;
  return std::make_unique<ShmEndpoint>(options, shm);
}

// Events of one endpoint, found by kind and id however they are ordered.
class Inbox {
 public:
  explicit Inbox(Endpoint& endpoint) : endpoint_(endpoint) {}

  // Waits for the first event that `wanted` accepts and takes it out.
  template <typename Predicate>
  Event take(Predicate wanted, double timeout_s = 20) {
    const uint64_t until = now_ns() + static_cast<uint64_t>(timeout_s * 1e9);
    for (;;) {
      for (auto i = seen_.begin(); i != seen_.end(); ++i)
        if (wanted(*i)) {
          Event found = *i;
          seen_.erase(i);
          return found;
        }
      if (now_ns() > until)
        for (const auto& e : seen_)
          std::cerr << "seen: kind " << static_cast<int>(e.kind) << ", status " << static_cast<int>(e.status) << ", "
                    << e.detail << "\n";
      CHECK(now_ns() < until);
      endpoint_.wait(0.05);
      for (auto& event : endpoint_.completions().take(256)) seen_.push_back(std::move(event));
    }
  }
  Event take(EventKind kind) {
    return take([kind](const Event& e) { return e.kind == kind; });
  }
  Event take(EventKind kind, uint64_t id) {
    return take([=](const Event& e) { return e.kind == kind && e.id == id; });
  }
  void drain() {
    for (auto& event : endpoint_.completions().take(4096)) seen_.push_back(std::move(event));
  }
  size_t count(EventKind kind) {
    drain();
    return static_cast<size_t>(
        std::count_if(seen_.begin(), seen_.end(), [kind](const Event& e) { return e.kind == kind; }));
  }

 private:
  Endpoint& endpoint_;
  std::deque<Event> seen_;
};

struct Pair {
  explicit Pair(Kind kind) : from(make_endpoint(kind)), to(make_endpoint(kind)), from_inbox(*from), to_inbox(*to) {
    const bool tcp = kind == Kind::kTcp || kind == Kind::kTcpLanes;
    const std::string address = from->listen(tcp ? "127.0.0.1:0" : "");
    receiving = to->connect(address, 5);
    sending = from_inbox.take(EventKind::kAccepted).connection;
    to_inbox.take(EventKind::kConnected);
    from->authorize(sending);
    to->authorize(receiving);
    if (kind == Kind::kTcpLanes)
      while (from->info(sending).lanes < 3) to->wait(0.01);
  }

  std::unique_ptr<Endpoint> from, to;
  Inbox from_inbox, to_inbox;
  uint64_t sending = 0, receiving = 0;
};

// Memory in pages, registered, with a shuffled order.
struct Pages {
  Pages(Endpoint& endpoint, size_t count, size_t page, uint32_t seed) : page(page), bytes(count * page), order(count) {
    std::iota(order.begin(), order.end(), size_t{0});
    std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    endpoint.register_memory(address(), bytes.size());
  }
  void fill(uint32_t seed) {
    std::mt19937 random(seed);
    for (auto& b : bytes) b = static_cast<uint8_t>(random());
  }
  uint64_t address() const { return reinterpret_cast<uint64_t>(bytes.data()); }
  uint64_t at(size_t i) const { return address() + order[i] * page; }
  std::vector<Segment> segments() const {
    std::vector<Segment> out;
    for (size_t i = 0; i < order.size(); ++i) out.push_back({at(i), page});
    return out;
  }
  std::vector<Descriptor> descriptors() const {
    std::vector<Descriptor> out;
    for (size_t i = 0; i < order.size(); ++i) out.push_back({at(i), i * page, page});
    return out;
  }
  bool equals(const Pages& other) const {
    for (size_t i = 0; i < order.size(); ++i)
      if (std::memcmp(reinterpret_cast<void*>(at(i)), reinterpret_cast<void*>(other.at(i)), page) != 0) return false;
    return true;
  }

  const size_t page;
  std::vector<uint8_t> bytes;
  std::vector<size_t> order;
};

}  // namespace sage_kvt
