// SPDX-License-Identifier: Apache-2.0
#include "tcp/socket_address.h"

#include <netdb.h>
#include <netinet/in.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace sage_kvt {

std::vector<SocketAddress> resolve(const std::string& address, bool passive) {
  const auto colon = address.rfind(':');
  if (colon == std::string::npos)
    throw std::invalid_argument("address '" + address + "' must be host:port or [v6 host]:port");
  std::string host = address.substr(0, colon), port = address.substr(colon + 1);
  if (host.size() >= 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  const bool digits = !port.empty() && port.size() <= 5 && port.find_first_not_of("0123456789") == std::string::npos;
  if (!digits || std::stoi(port) > 65535)
    throw std::invalid_argument("address '" + address + "': port '" + port + "' must be a number from 0 to 65535");
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV | (passive ? AI_PASSIVE : 0);
  addrinfo* first = nullptr;
  if (int error = ::getaddrinfo(host.c_str(), port.c_str(), &hints, &first); error != 0)
    throw std::invalid_argument("address '" + address + "': " + ::gai_strerror(error));
  std::vector<SocketAddress> found;
  for (auto* a = first; a; a = a->ai_next) {
    auto& copy = found.emplace_back(SocketAddress{{}, a->ai_addrlen});
    std::memcpy(&copy.storage, a->ai_addr, a->ai_addrlen);
  }
  ::freeaddrinfo(first);
  return found;
}

std::string show(const sockaddr* address, socklen_t size) {
  char host[NI_MAXHOST], port[NI_MAXSERV];
  if (::getnameinfo(address, size, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV) != 0)
    return "?";
  return address->sa_family == AF_INET6 ? std::string("[") + host + "]:" + port : std::string(host) + ":" + port;
}

std::string name_of(int fd, int (*name)(int, sockaddr*, socklen_t*)) {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  if (name(fd, reinterpret_cast<sockaddr*>(&address), &size) != 0) return "?";
  return show(reinterpret_cast<sockaddr*>(&address), size);
}

bool same_host(const SocketAddress& a, const SocketAddress& b) {
  return written(a).family == written(b).family && written(a).host == written(b).host;
}

WrittenAddress written(const SocketAddress& from) {
  WrittenAddress to{};
  if (from.storage.ss_family == AF_INET) {
    const auto& v4 = reinterpret_cast<const sockaddr_in&>(from.storage);
    to.family = 4;
    to.port = v4.sin_port;
    std::memcpy(to.host.data(), &v4.sin_addr, sizeof v4.sin_addr);
  } else {
    const auto& v6 = reinterpret_cast<const sockaddr_in6&>(from.storage);
    to.family = 6;
    to.port = v6.sin6_port;
    std::memcpy(to.host.data(), &v6.sin6_addr, sizeof v6.sin6_addr);
  }
  return to;
}

std::optional<SocketAddress> read_address(const WrittenAddress& from) {
  SocketAddress to{};
  if (from.family == 4) {
    auto& v4 = reinterpret_cast<sockaddr_in&>(to.storage);
    v4.sin_family = AF_INET;
    v4.sin_port = from.port;
    std::memcpy(&v4.sin_addr, from.host.data(), sizeof v4.sin_addr);
    to.size = sizeof v4;
  } else if (from.family == 6) {
    auto& v6 = reinterpret_cast<sockaddr_in6&>(to.storage);
    v6.sin6_family = AF_INET6;
    v6.sin6_port = from.port;
    std::memcpy(&v6.sin6_addr, from.host.data(), sizeof v6.sin6_addr);
    to.size = sizeof v6;
  } else {
    return std::nullopt;
  }
  return to;
}

std::string written(const std::vector<SocketAddress>& addresses) {
  std::string bytes;
  for (const auto& address : addresses) {
    const auto one = written(address);
    bytes.append(reinterpret_cast<const char*>(&one), sizeof one);
  }
  return bytes;
}

std::optional<std::vector<SocketAddress>> read_addresses(const char* bytes, size_t size) {
  const size_t count = size / sizeof(WrittenAddress);
  if (size % sizeof(WrittenAddress) != 0 || count == 0 || count > kMostAddresses) return std::nullopt;
  std::vector<SocketAddress> found;
  for (size_t i = 0; i < count; ++i) {
    WrittenAddress one;
    std::memcpy(&one, bytes + i * sizeof one, sizeof one);
    const auto address = read_address(one);
    if (!address) return std::nullopt;
    found.push_back(*address);
  }
  return found;
}

}  // namespace sage_kvt
