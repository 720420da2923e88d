// SPDX-License-Identifier: Apache-2.0
#include "tcp/tcp_endpoint.h"

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
#include <utility>

namespace sage_kvt {
namespace {

// A peer whose machine is gone is noticed after this long even in the middle of a send.
constexpr unsigned kUserTimeoutMs = 15000;

// A descriptor that is closed unless it was released.
class OwnedFd {
 public:
  explicit OwnedFd(int fd) : fd_(fd) {}
  ~OwnedFd() {
    if (fd_ >= 0) ::close(fd_);
  }
  OwnedFd(const OwnedFd&) = delete;
  OwnedFd& operator=(const OwnedFd&) = delete;
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

const sockaddr* raw(const SocketAddress& address) { return reinterpret_cast<const sockaddr*>(&address.storage); }

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

std::string show(const sockaddr* address, socklen_t size);

// Of a socket: its own address, or its peer's.
std::string name_of(int fd, int (*name)(int, sockaddr*, socklen_t*)) {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  if (name(fd, reinterpret_cast<sockaddr*>(&address), &size) != 0) return "?";
  return show(reinterpret_cast<sockaddr*>(&address), size);
}

std::string show(const sockaddr* address, socklen_t size) {
  char host[NI_MAXHOST], port[NI_MAXSERV];
  if (::getnameinfo(address, size, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV) != 0)
    return "?";
  return address->sa_family == AF_INET6 ? std::string("[") + host + "]:" + port : std::string(host) + ":" + port;
}

}  // namespace

TcpEndpoint::TcpEndpoint(const EndpointOptions& options, const TcpOptions& tcp) : Endpoint(options), tcp_(tcp) {}

TcpEndpoint::~TcpEndpoint() { Endpoint::close(); }

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
  throw_if_closed();
  int error = EADDRNOTAVAIL;
  for (const auto& candidate : resolve(address, true)) {
    OwnedFd fd(::socket(candidate.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    const int on = 1;
    if (fd.get() >= 0) ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (fd.get() < 0 || ::bind(fd.get(), raw(candidate), candidate.size) != 0 || ::listen(fd.get(), 128) != 0) {
      error = errno;
      continue;
    }
    const std::string bound = name_of(fd.get(), ::getsockname);
    lane(0).watch(std::make_unique<Listener>(fd.release()), [this](int socket) { accepted(socket); });
    return bound;
  }
  throw std::system_error(error, std::generic_category(), "can't listen on " + address);
}

void TcpEndpoint::accepted(int fd) {
  auto connection = new_connection(true);
  if (!connection) {
    turned_away(name_of(fd, ::getpeername), Status::kRefused, "too many connections wait for their handshake");
    ::close(fd);
    return;
  }
  set_options(fd);
  connection->set_info({name_of(fd, ::getpeername), "stream", "", true, 1, name_of(fd, ::getsockname)});
  auto channel = std::make_shared<TcpChannel>(connection, *this, fd, false, true, Token{});
  channel->deadline = now_ns() + kSetUpNs;
  attach(channel);
}

int TcpEndpoint::open_socket(const std::vector<SocketAddress>& addresses, SocketAddress* used, bool* connecting) {
  std::vector<SocketAddress> local;
  if (!tcp_.local_address.empty()) local = resolve("[" + tcp_.local_address + "]:0", true);
  std::string what = "can't connect";
  int error = EADDRNOTAVAIL;
  for (const auto& candidate : addresses) {
    OwnedFd fd(::socket(candidate.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (fd.get() < 0) {
      error = errno;
      continue;
    }
    set_options(fd.get());
    if (!local.empty() && ::bind(fd.get(), raw(local.front()), local.front().size) != 0) {
      error = errno;
      what = "can't connect from local address " + tcp_.local_address;
      continue;
    }
    *connecting = ::connect(fd.get(), raw(candidate), candidate.size) != 0;
    if (!*connecting || errno == EINPROGRESS) {
      *used = candidate;
      return fd.release();
    }
    error = errno;
  }
  throw std::system_error(error, std::generic_category(), what);
}

uint64_t TcpEndpoint::connect(const std::string& address, double timeout_s) {
  throw_if_closed();
  const uint64_t deadline = deadline_after(timeout_s);
  bool connecting = false;
  Dialled dialled{};
  OwnedFd fd(open_socket(resolve(address, false), &dialled.address, &connecting));
  auto connection = new_connection(false);
  if (!connection) throw std::invalid_argument("the backend is closed");
  connection->set_info({address, "stream", "", true, 1, name_of(fd.get(), ::getsockname)});
  {
    std::lock_guard lock(mutex_);
    dialled_[connection->id] = dialled;
  }
  auto channel = std::make_shared<TcpChannel>(connection, *this, fd.release(), connecting, false, Token{});
  channel->deadline = deadline;
  attach(channel);
  return connection->id;
}

void TcpEndpoint::established(TcpChannel& channel) {
  channel.connection->announced = true;
  emit(EventKind::kAccepted, channel.connection->id, channel.connection->info().peer);
}

bool TcpEndpoint::dialled(uint64_t connection) {
  std::lock_guard lock(mutex_);
  return dialled_.count(connection) > 0;
}

void TcpEndpoint::set_way(Connection& connection, const std::string& mode, const std::string& reason) {
  auto info = connection.info();
  info.mode = mode;
  info.reason = reason;
  connection.set_info(info);
}

void TcpEndpoint::authorize(uint64_t id) {
  auto connection = find_connection(id);
  if (!connection || connection->authorized) return;
  const bool dialled = this->dialled(id);
  if (!dialled && options().lanes > 1) {
    Pending pending{id, Token{}, static_cast<uint64_t>(options().lanes - 1)};
    auto channels = connection->channels();
    if (!channels.empty() &&
        ::getrandom(pending.token.data(), pending.token.size(), 0) == static_cast<ssize_t>(pending.token.size())) {
      {
        std::lock_guard lock(mutex_);
        joinable_.push_back(pending);
      }
      std::lock_guard lock(channels.front()->mutex);
      static_cast<TcpChannel&>(*channels.front()).queue_control(FrameType::kJoin, pending.token, pending.lanes);
    }
  }
  Endpoint::authorize(id);
  if (dialled) open_lanes(connection);
}

void TcpEndpoint::protect(uint64_t id, bool encrypts, const std::string& send_keys, const std::string& receive_keys,
                          std::string last_plain) {
  auto keys = std::make_shared<const ConnectionKeys>(encrypts, send_keys, receive_keys);
  auto connection = find_connection(id);
  if (!connection) return;
  const auto channels = connection->channels();
  if (channels.empty()) return;
  {
    std::lock_guard channel_lock(channels.front()->mutex);
    if (channels.front()->dead) return;
    {
      std::lock_guard lock(mutex_);
      if (connection->authorized || keys_.count(id) > 0)
        throw std::invalid_argument("connection " + std::to_string(id) + " is authorized or protected already");
      keys_[id] = keys;
    }
    // With the lock: no lane sends it, and hears a sealed answer, before the keys are there.
    if (!last_plain.empty()) connection->queue_message(std::move(last_plain));
    static_cast<TcpChannel&>(*channels.front()).protect(keys, 0);
  }
  connection->kick();
}

std::shared_ptr<const ConnectionKeys> TcpEndpoint::keys_of(uint64_t connection) {
  std::lock_guard lock(mutex_);
  auto found = keys_.find(connection);
  return found == keys_.end() ? nullptr : found->second;
}

void TcpEndpoint::join(const std::shared_ptr<Connection>& connection, const Token& token, uint64_t lanes) {
  {
    std::lock_guard lock(mutex_);
    auto found = dialled_.find(connection->id);
    if (found == dialled_.end() || found->second.invited) return;
    found->second.invited = true;
    found->second.token = token;
    found->second.lanes = std::min<uint64_t>(lanes, static_cast<uint64_t>(options().lanes - 1));
  }
  if (connection->authorized) open_lanes(connection);
}

void TcpEndpoint::open_lanes(const std::shared_ptr<Connection>& connection) {
  Dialled dialled;
  {
    std::lock_guard lock(mutex_);
    auto found = dialled_.find(connection->id);
    if (found == dialled_.end()) return;
    dialled = found->second;
    found->second.lanes = 0;
  }
  const auto keys = keys_of(connection->id);
  for (uint64_t number = 1; number <= dialled.lanes; ++number) {
    try {
      bool connecting = false;
      SocketAddress used;
      const int fd = open_socket({dialled.address}, &used, &connecting);
      auto channel = std::make_shared<TcpChannel>(connection, *this, fd, connecting, false, dialled.token, number);
      if (keys) channel->protect(keys, number);
      channel->deadline = now_ns() + kSetUpNs;
      attach(channel);
    } catch (const std::exception&) {
      return;  // the first lane alone carries everything, only slower
    }
  }
}

void TcpEndpoint::forgotten(uint64_t connection) {
  std::lock_guard lock(mutex_);
  dialled_.erase(connection);
  keys_.erase(connection);
  std::erase_if(joinable_, [&](const Pending& p) { return p.connection == connection; });
}

bool TcpEndpoint::adopt(TcpChannel& channel, const FrameStart& preface) {
  uint64_t target = 0;
  const uint64_t number = preface.header.offset;
  if (number == 0 || number >= kMaxLanes) return false;
  std::shared_ptr<const ConnectionKeys> keys;
  std::unique_ptr<LaneCipher> open;
  {
    std::lock_guard lock(mutex_);
    for (auto& pending : joinable_) {
      if (pending.lanes == 0 || !equal_in_constant_time(pending.token, preface.header.token)) continue;
      if (pending.used >> number & 1) return false;
      if (auto found = keys_.find(pending.connection); found != keys_.end()) {
        keys = found->second;
        open = std::make_unique<LaneCipher>(keys, LaneCipher::Direction::kOpen, number);
        Tag tag = preface.tag;
        if (!open->header(preface.header, &tag)) return false;
      }
      pending.used |= 1u << number;
      --pending.lanes;
      target = pending.connection;
    }
    std::erase_if(joinable_, [](const Pending& p) { return p.lanes == 0; });
  }
  auto connection = target ? find_connection(target) : nullptr;
  if (!connection) return false;
  forget(channel.connection);
  auto joined = std::make_shared<TcpChannel>(connection, *this, channel.release_fd(), false, true, Token{});
  if (keys) joined->protect(keys, number, std::move(open));
  joined->welcome();
  attach(joined);
  return true;
}

}  // namespace sage_kvt
