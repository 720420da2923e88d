// SPDX-License-Identifier: Apache-2.0
// Addresses of sockets: from words, to words, and as endpoints tell them to each other.
#pragma once

#include <sys/socket.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace sage_kvt {

struct SocketAddress {
  sockaddr_storage storage;
  socklen_t size;
};

inline const sockaddr* raw(const SocketAddress& address) { return reinterpret_cast<const sockaddr*>(&address.storage); }

// All that "host:port" or "[v6 host]:port" stands for; `passive`: to listen on. Throws std::invalid_argument.
std::vector<SocketAddress> resolve(const std::string& address, bool passive);
std::string show(const sockaddr* address, socklen_t size);
// Of a socket: its own address (::getsockname), or its peer's (::getpeername); "?" if it has none.
std::string name_of(int fd, int (*name)(int, sockaddr*, socklen_t*));
bool same_host(const SocketAddress& a, const SocketAddress& b);

// An address as one endpoint writes it to another.
struct WrittenAddress {
  uint16_t family, port;  // 4 or 6; in network order
  uint32_t zero;
  std::array<uint8_t, 16> host;
};
static_assert(sizeof(WrittenAddress) == 24);

constexpr size_t kMostAddresses = 16;

WrittenAddress written(const SocketAddress& address);
// Nothing if it is none.
std::optional<SocketAddress> read_address(const WrittenAddress& address);
// One behind the other, and back: nothing if these bytes are no 1 to `kMostAddresses` addresses.
std::string written(const std::vector<SocketAddress>& addresses);
std::optional<std::vector<SocketAddress>> read_addresses(const char* bytes, size_t size);

}  // namespace sage_kvt
