// SPDX-License-Identifier: Apache-2.0
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "tcp_channel.h"

namespace sage_kvt {
namespace {

// A peer whose machine is gone is noticed after this long even in the middle of a send.
constexpr unsigned kUserTimeoutMs = 15000;

struct AddressList {
  addrinfo* first = nullptr;
  ~AddressList() {
    if (first) ::freeaddrinfo(first);
  }
};

void resolve(const std::string& address, bool passive, AddressList* found) {
  const auto colon = address.rfind(':');
  if (colon == std::string::npos)
    throw std::invalid_argument("address '" + address + "' must be host:port or [v6 host]:port");
  std::string host = address.substr(0, colon), port = address.substr(colon + 1);
  if (host.size() >= 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV | (passive ? AI_PASSIVE : 0);
  if (int error = ::getaddrinfo(host.c_str(), port.c_str(), &hints, &found->first); error != 0)
    throw std::invalid_argument("address '" + address + "': " + ::gai_strerror(error));
}

std::string show(const sockaddr* address, socklen_t size) {
  char host[NI_MAXHOST], port[NI_MAXSERV];
  if (::getnameinfo(address, size, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV) != 0)
    return "?";
  return address->sa_family == AF_INET6 ? std::string("[") + host + "]:" + port : std::string(host) + ":" + port;
}

bool equal_in_constant_time(const Token& a, const Token& b) {
  unsigned difference = 0;
  for (size_t i = 0; i < a.size(); ++i) difference |= static_cast<unsigned>(a[i] ^ b[i]);
  return difference == 0;
}

}  // namespace

TcpEndpoint::TcpEndpoint(const EndpointOptions& options, const TcpOptions& tcp) : Endpoint(options), tcp_(tcp) {}

TcpEndpoint::~TcpEndpoint() {
  close();
  for (int fd : listeners_) ::close(fd);
}

void TcpEndpoint::set_options(int fd) {
  const int on = 1;
  ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  ::setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
  ::setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &kUserTimeoutMs, sizeof kUserTimeoutMs);
  if (tcp_.socket_buffer > 0) {
    ::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &tcp_.socket_buffer, sizeof tcp_.socket_buffer);
    ::setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &tcp_.socket_buffer, sizeof tcp_.socket_buffer);
  }
}

std::string TcpEndpoint::listen(const std::string& address) {
  AddressList found;
  resolve(address, true, &found);
  int error = EADDRNOTAVAIL;
  for (auto* a = found.first; a; a = a->ai_next) {
    const int fd = ::socket(a->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) {
      error = errno;
      continue;
    }
    const int on = 1;
    ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (::bind(fd, a->ai_addr, a->ai_addrlen) != 0 || ::listen(fd, 128) != 0) {
      error = errno;
      ::close(fd);
      continue;
    }
    sockaddr_storage bound{};
    socklen_t size = sizeof bound;
    ::getsockname(fd, reinterpret_cast<sockaddr*>(&bound), &size);
    {
      std::lock_guard lock(mutex_);
      listeners_.push_back(fd);
    }
    lane(0).watch(fd, [this, fd] { accept_all(fd); });
    return show(reinterpret_cast<sockaddr*>(&bound), size);
  }
  throw std::system_error(error, std::generic_category(), "can't listen on " + address);
}

void TcpEndpoint::accept_all(int listener) {
  for (;;) {
    sockaddr_storage peer{};
    socklen_t size = sizeof peer;
    const int fd = ::accept4(listener, reinterpret_cast<sockaddr*>(&peer), &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) {
      if (errno == EINTR || errno == ECONNABORTED) continue;
      return;
    }
    auto connection = new_connection(true);
    if (!connection) {
      ::close(fd);
      continue;
    }
    set_options(fd);
    connection->set_info({show(reinterpret_cast<sockaddr*>(&peer), size), "stream", "", true, 1});
    attach(std::make_shared<TcpChannel>(connection, *this, fd, false, true, Token{}));
  }
}

int TcpEndpoint::open_socket(const std::string& address, bool* connecting) {
  AddressList found;
  resolve(address, false, &found);
  int error = EADDRNOTAVAIL;
  for (auto* a = found.first; a; a = a->ai_next) {
    const int fd = ::socket(a->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) {
      error = errno;
      continue;
    }
    set_options(fd);
    if (!tcp_.local_address.empty()) {
      AddressList local;
      resolve(tcp_.local_address + ":0", true, &local);
      if (::bind(fd, local.first->ai_addr, local.first->ai_addrlen) != 0) {
        error = errno;
        ::close(fd);
        throw std::system_error(error, std::generic_category(), "can't use local address " + tcp_.local_address);
      }
    }
    *connecting = false;
    if (::connect(fd, a->ai_addr, a->ai_addrlen) == 0) return fd;
    if (errno == EINPROGRESS) {
      *connecting = true;
      return fd;
    }
    error = errno;
    ::close(fd);
  }
  throw std::system_error(error, std::generic_category(), "can't connect to " + address);
}

uint64_t TcpEndpoint::connect(const std::string& address, double) {
  bool connecting = false;
  const int fd = open_socket(address, &connecting);
  auto connection = new_connection(false);
  if (!connection) {
    ::close(fd);
    throw std::invalid_argument("the backend is closed");
  }
  connection->set_info({address, "stream", "", true, 1});
  {
    std::lock_guard lock(mutex_);
    dialled_[connection->id] = address;
  }
  attach(std::make_shared<TcpChannel>(connection, *this, fd, connecting, false, Token{}));
  return connection->id;
}

void TcpEndpoint::established(TcpChannel& channel) {
  channel.connection->announced = true;
  emit(EventKind::kAccepted, channel.connection->id);
}

void TcpEndpoint::authorize(uint64_t id) {
  auto connection = find_connection(id);
  if (!connection) return;
  bool dialled;
  {
    std::lock_guard lock(mutex_);
    dialled = dialled_.count(id) > 0;
  }
  if (!dialled && options().lanes > 1) {
    Pending pending{id, Token{}, static_cast<uint64_t>(options().lanes - 1)};
    if (::getrandom(pending.token.data(), pending.token.size(), 0) == static_cast<ssize_t>(pending.token.size())) {
      {
        std::lock_guard lock(mutex_);
        joinable_.push_back(pending);
      }
      auto channels = connection->channels();
      if (!channels.empty()) {
        std::lock_guard lock(channels.front()->mutex);
        static_cast<TcpChannel&>(*channels.front()).queue_control(FrameType::kJoin, pending.token, pending.lanes);
      }
    }
  }
  Endpoint::authorize(id);
}

void TcpEndpoint::join(const std::shared_ptr<Connection>& connection, const Token& token, uint64_t lanes) {
  std::string address;
  {
    std::lock_guard lock(mutex_);
    auto found = dialled_.find(connection->id);
    if (found == dialled_.end()) return;
    address = found->second;
  }
  const auto have = static_cast<uint64_t>(connection->channels().size());
  const auto most = static_cast<uint64_t>(options().lanes);
  lanes = std::min(lanes, most > have ? most - have : 0);
  for (uint64_t i = 0; i < lanes; ++i) {
    try {
      bool connecting = false;
      const int fd = open_socket(address, &connecting);
      attach(std::make_shared<TcpChannel>(connection, *this, fd, connecting, false, token));
    } catch (const std::exception&) {
      return;  // the first lane alone carries everything, only slower
    }
  }
}

void TcpEndpoint::forgotten(uint64_t connection) {
  std::lock_guard lock(mutex_);
  dialled_.erase(connection);
  std::erase_if(joinable_, [&](const Pending& p) { return p.connection == connection; });
}

bool TcpEndpoint::adopt(TcpChannel& channel, const Token& token) {
  uint64_t target = 0;
  {
    std::lock_guard lock(mutex_);
    for (auto& pending : joinable_)
      if (pending.lanes > 0 && equal_in_constant_time(pending.token, token)) {
        --pending.lanes;
        target = pending.connection;
      }
    std::erase_if(joinable_, [](const Pending& p) { return p.lanes == 0; });
  }
  auto connection = target ? find_connection(target) : nullptr;
  if (!connection) return false;
  forget(channel.connection);
  auto joined = std::make_shared<TcpChannel>(connection, *this, channel.release_fd(), false, true, Token{});
  joined->mark_established();
  attach(joined);
  return true;
}

}  // namespace sage_kvt
