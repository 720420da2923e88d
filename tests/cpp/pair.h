// SPDX-License-Identifier: Apache-2.0
// Two endpoints of one process that are connected and authorized.
#pragma once

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "local_library.h"
#include "shm/channel.h"
#include "tcp/tcp_endpoint.h"
#ifdef SAGE_KVT_RDMA
#include "rdma/rdma_endpoint.h"
#endif

namespace sage_kvt {

// Two are protected, with the tag alone and encrypted.
enum class Kind {
  kShmDirect,
  kShmArena,
  kTcp,
  kTcpLanes,
  kTcpLinks,
  kTcpAuthenticated,
  kTcpEncrypted,
  kTcpLinksEncrypted,
  kCarried,
  kRdma
};

inline bool is_tcp(Kind kind) { return kind != Kind::kShmDirect && kind != Kind::kShmArena; }
inline bool is_protected(Kind kind) {
  return kind == Kind::kTcpAuthenticated || kind == Kind::kTcpEncrypted || kind == Kind::kTcpLinksEncrypted;
}
inline bool is_encrypted(Kind kind) { return kind == Kind::kTcpEncrypted || kind == Kind::kTcpLinksEncrypted; }
inline bool has_links(Kind kind) { return kind == Kind::kTcpLinks || kind == Kind::kTcpLinksEncrypted; }
// Of sockets; an rdma or a carried connection has one, and a path.
inline int lanes_of(Kind kind) {
  if (kind == Kind::kRdma || kind == Kind::kCarried) return 2;
  return is_tcp(kind) && kind != Kind::kTcp ? 3 : 1;
}

// Those that are not protected alone where this machine has no libcrypto; rdma alone where it has a device.
inline std::vector<Kind> kinds() {
  std::vector<Kind> all{Kind::kShmDirect, Kind::kShmArena, Kind::kTcp,
                        Kind::kTcpLanes,  Kind::kTcpLinks, Kind::kCarried};
  std::string why;
#ifdef SAGE_KVT_RDMA
  if (rdma_lacks().empty()) return {Kind::kRdma};
#endif
  if (libcrypto(&why))
    all.insert(all.end(), {Kind::kTcpAuthenticated, Kind::kTcpEncrypted, Kind::kTcpLinksEncrypted});
  else
    std::fprintf(stderr, "protected kinds are left out: %s\n", why.c_str());
  return all;
}

// One side of a connection.
inline void protect(Kind kind, Endpoint& endpoint, uint64_t connection, bool connects) {
  if (!is_protected(kind)) return;
  const std::string one(kLaneKeysBytes, '\1'), other(kLaneKeysBytes, '\2');
  static_cast<TcpEndpoint&>(endpoint).protect(connection, is_encrypted(kind), connects ? one : other,
                                              connects ? other : one);
}

constexpr double kPatienceS = 30;

// Memory that endpoints forget before it is freed: what lies there later would else be reached by old registrations,
// which a card keeps to the pages that were there.
class Bytes : public std::vector<uint8_t> {
 public:
  using std::vector<uint8_t>::vector;
  Bytes(const Bytes& other) : std::vector<uint8_t>(other) {}
  Bytes(Bytes&&) = default;
  Bytes& operator=(Bytes&& other) {
    CHECK(registered_.empty());
    std::vector<uint8_t>::operator=(std::move(other));
    return *this;
  }
  ~Bytes() {
    for (const auto& [endpoint, region] : registered_)
      if (const auto known = endpoint.lock()) known->deregister_memory(region);
  }
  void register_at(const std::shared_ptr<Endpoint>& endpoint) const {
    registered_.emplace_back(endpoint, endpoint->register_memory(reinterpret_cast<uint64_t>(data()), size()));
  }

 private:
  mutable std::vector<std::pair<std::weak_ptr<Endpoint>, uint64_t>> registered_;
};

inline Bytes random_bytes(size_t size, unsigned seed) {
  std::mt19937_64 random(seed);
  Bytes bytes(size);
  for (size_t i = 0; i < size; i += sizeof(uint64_t)) {
    const uint64_t word = random();
    std::memcpy(bytes.data() + i, &word, std::min(sizeof word, size - i));
  }
  return bytes;
}

inline uint64_t address_of(const Bytes& bytes) { return reinterpret_cast<uint64_t>(bytes.data()); }

inline std::unique_ptr<Endpoint> make_endpoint(Kind kind, uint64_t chunk_bytes) {
  EndpointOptions options;
  options.chunk_bytes = chunk_bytes;
#ifdef SAGE_KVT_RDMA
  if (kind == Kind::kRdma) {
    // siw sends over a socket of the kernel's in the thread that posts, and that may be closed. Python ignores it, too.
    std::signal(SIGPIPE, SIG_IGN);
    return std::make_unique<RdmaEndpoint>(options, TcpOptions{}, RdmaOptions{});
  }
#endif
  if (kind == Kind::kCarried) return std::make_unique<LocallyCarried>(options);
  options.lanes = lanes_of(kind);
  TcpOptions tcp;
  if (has_links(kind)) tcp.links = {"127.0.0.1", "127.0.0.2"};
  if (is_tcp(kind)) return std::make_unique<TcpEndpoint>(options, tcp);
  return std::make_unique<ShmEndpoint>(options, ShmOptions{kind == Kind::kShmDirect, 2u << 20});
}

// Takes events of an endpoint, in order, and remembers them all.
class Inbox {
 public:
  explicit Inbox(Endpoint& endpoint) : endpoint_(endpoint) {}

  void until(const std::function<bool()>& done) {
    const uint64_t deadline = now_ns() + static_cast<uint64_t>(kPatienceS * 1e9);
    while (!done()) {
      if (now_ns() > deadline) tell();
      CHECK(now_ns() < deadline);
      endpoint_.wait(0.05);
      take();
    }
  }
  void take() {
    for (auto& event : endpoint_.poll(256)) events.push_back(std::move(event));
  }
  size_t count(EventKind kind) const {
    size_t found = 0;
    for (const auto& event : events) found += event.kind == kind;
    return found;
  }
  const Event* find(EventKind kind, uint64_t id) const {
    for (const auto& event : events)
      if (event.kind == kind && event.id == id) return &event;
    return nullptr;
  }
  const Event& wait_for(EventKind kind, uint64_t id) {
    until([&] { return find(kind, id) != nullptr; });
    return *find(kind, id);
  }
  std::vector<Event> events;

 private:
  // What went wrong, if it is waited for in vain.
  void tell() const {
    for (const auto& event : events)
      if (event.status != Status::kOk)
        std::fprintf(stderr, "event %d of %llu: status %d at %llu, %s\n", static_cast<int>(event.kind),
                     static_cast<unsigned long long>(event.id), static_cast<int>(event.status),
                     static_cast<unsigned long long>(event.offset), event.detail.c_str());
  }

  Endpoint& endpoint_;
};

class Pair {
 public:
  // Unless they are `trusted`, what is posted waits for `trust`.
  explicit Pair(Kind kind, uint64_t chunk_bytes = 64u << 10, bool trusted = true)
      : receiver(make_endpoint(kind, chunk_bytes)),
        sender(make_endpoint(kind, chunk_bytes)),
        received(*receiver),
        sent(*sender) {
    to_receiver = sender->connect(receiver->listen(is_tcp(kind) ? "127.0.0.1:0" : ""), 5.0);
    sent.until([&] { return sent.count(EventKind::kConnected) == 1; });
    received.until([&] { return received.count(EventKind::kAccepted) == 1; });
    to_sender = received.events.back().connection;
    protect(kind, *sender, to_receiver, true);
    protect(kind, *receiver, to_sender, false);
    if (trusted) trust(kind);
  }

  void trust(Kind kind) {
    receiver->authorize(to_sender);
    sender->authorize(to_receiver);
    const int lanes = lanes_of(kind);
    const auto ready = [&](Endpoint& endpoint, uint64_t connection) {
      const auto info = endpoint.info(connection);
      return info.lanes == lanes && (kind != Kind::kCarried || info.mode == kLocal);
    };
    for (int i = 0; !ready(*sender, to_receiver) || !ready(*receiver, to_sender); ++i) {
      CHECK(i < 10000);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

  uint64_t open(Bytes& target, uint64_t generation = 1, bool notify = false) {
    target.register_at(receiver);
    return receiver->open_window(to_sender, {{address_of(target), target.size()}}, generation, notify);
  }

  uint64_t post(uint64_t window, const Bytes& source, uint64_t generation = 1, int priority = 0) {
    source.register_at(sender);
    return sender->post(to_receiver, receiver->describe(window), {{address_of(source), 0, source.size()}}, generation,
                        priority, true);
  }

  std::shared_ptr<Endpoint> receiver, sender;
  Inbox received, sent;
  uint64_t to_receiver = 0, to_sender = 0;
};

}  // namespace sage_kvt
