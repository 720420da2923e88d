// SPDX-License-Identifier: Apache-2.0
#include "tcp/tcp_endpoint.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
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

// Each link has a lane.
EndpointOptions with_lane_each(EndpointOptions options, size_t links) {
  options.lanes = std::max(options.lanes, static_cast<int>(std::min(links, kMaxLanes)));
  return options;
}

// A slow link is not to take what a fast one would have sent long ago.
void keep_queue_short(int fd) {
  const int bytes = 128 << 10;
  ::setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &bytes, sizeof bytes);
}

}  // namespace

TcpEndpoint::TcpEndpoint(const EndpointOptions& options, const TcpOptions& tcp)
    : Endpoint(with_lane_each(options, tcp.links.size())), tcp_(tcp), links_(*this) {
  set_tender(&links_);
}

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
  const auto bound = listen_at(address);
  for (const auto& link : tcp_.links) {
    const auto at = resolve(listen_at("[" + link + "]:0"), true).front();
    std::lock_guard lock(mutex_);
    if (listening_.size() < kMostAddresses) listening_.push_back(at);
  }
  return bound;
}

std::string TcpEndpoint::listen_at(const std::string& address) {
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
  if (!dialled && options().lanes > 1) let_join(connection);
  Endpoint::authorize(id);
  if (dialled) open_lanes(connection);
}

void TcpEndpoint::let_join(const std::shared_ptr<Connection>& connection) {
  Joinable joinable{{}, static_cast<uint64_t>(options().lanes - 1), other_links(*connection)};
  const auto channels = connection->channels();
  const auto bytes = static_cast<ssize_t>(joinable.token.size());
  if (channels.empty() || ::getrandom(joinable.token.data(), joinable.token.size(), 0) != bytes) return;
  if (joinable.addresses.empty()) {
    std::lock_guard lock(mutex_);
    joinable_.push_back({connection->id, joinable.token, joinable.lanes});
  } else {
    links_.accepted(connection, joinable);
  }
  std::lock_guard lock(channels.front()->mutex);
  static_cast<TcpChannel&>(*channels.front()).queue_join(joinable);
}

// Those of ours that the peer did not dial.
std::vector<SocketAddress> TcpEndpoint::other_links(const Connection& connection) {
  std::vector<SocketAddress> others;
  const auto local = connection.info().local;
  if (tcp_.links.empty() || local == "?") return others;
  const auto here = resolve(local, true).front();
  std::lock_guard lock(mutex_);
  for (const auto& link : listening_)
    if (!same_host(link, here)) others.push_back(link);
  return others;
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
    static_cast<TcpChannel&>(*channels.front()).protect(keys);
  }
  connection->kick();
}

std::shared_ptr<const ConnectionKeys> TcpEndpoint::keys_of(uint64_t connection) {
  std::lock_guard lock(mutex_);
  auto found = keys_.find(connection);
  return found == keys_.end() ? nullptr : found->second;
}

uint64_t TcpEndpoint::join(const std::shared_ptr<Connection>& connection, const Joinable& joinable) {
  // Each link has one, however few lanes (threads) there are here.
  const uint64_t wanted = std::max<uint64_t>(static_cast<uint64_t>(options().lanes - 1), joinable.addresses.size());
  const uint64_t lanes = std::min(joinable.lanes, wanted);
  {
    std::lock_guard lock(mutex_);
    auto found = dialled_.find(connection->id);
    if (found == dialled_.end() || found->second.invited) return 0;
    found->second.invited = true;
    found->second.may = joinable;
    found->second.may.lanes = lanes;
  }
  if (connection->authorized) open_lanes(connection);
  return lanes;
}

void TcpEndpoint::open_lanes(const std::shared_ptr<Connection>& connection) {
  Dialled dialled;
  {
    std::lock_guard lock(mutex_);
    auto found = dialled_.find(connection->id);
    if (found == dialled_.end() || found->second.may.lanes == 0) return;
    dialled = found->second;
    found->second.may.lanes = 0;
  }
  if (!dialled.may.addresses.empty()) {
    dialled.may.addresses.insert(dialled.may.addresses.begin(), dialled.address);
    links_.dialled(connection, dialled.may);
    return;
  }
  try {
    for (size_t number = 1; number <= dialled.may.lanes; ++number)
      open_lane(connection, dialled.address, dialled.may.token, {number});
  } catch (const std::exception&) {
    // the first lane alone carries everything, only slower
  }
}

void TcpEndpoint::open_lane(const std::shared_ptr<Connection>& connection, const SocketAddress& address,
                            const Token& token, const LaneId& id, bool linked, size_t link) {
  bool connecting = false;
  SocketAddress used;
  OwnedFd fd(open_socket({address}, &used, &connecting));
  if (linked) keep_queue_short(fd.get());
  auto channel =
      std::make_shared<TcpChannel>(connection, *this, fd.release(), connecting, false, token, id, linked, link);
  if (const auto keys = keys_of(connection->id)) channel->protect(keys);
  channel->deadline = now_ns() + kSetUpNs;
  attach(channel);
}

void TcpEndpoint::forgotten(uint64_t connection) {
  std::lock_guard lock(mutex_);
  dialled_.erase(connection);
  keys_.erase(connection);
  std::erase_if(joinable_, [&](const Pending& p) { return p.connection == connection; });
  links_.forget(connection);
}

bool TcpEndpoint::adopt(TcpChannel& channel, const FrameStart& preface) {
  const auto id = LaneId::unpacked(preface.header.offset);
  if (id.lane >= kMaxLanes || id.turn > kMostTurns) return false;
  const auto holds = [&](uint64_t target, std::shared_ptr<const ConnectionKeys>* keys,
                         std::unique_ptr<LaneCipher>* open) {
    *keys = keys_of(target);
    if (!*keys) return true;
    *open = std::make_unique<LaneCipher>(*keys, LaneCipher::Direction::kOpen, id);
    Tag tag = preface.tag;
    return (*open)->header(preface.header, &tag);
  };
  const uint64_t plain = joins(preface.header.token, id), linked = plain ? 0 : links_.joins(preface.header.token, id);
  auto connection = find_connection(plain | linked);
  std::shared_ptr<const ConnectionKeys> keys;
  std::unique_ptr<LaneCipher> open;
  if (!connection || !holds(connection->id, &keys, &open)) return false;
  // Whose tag holds is the peer: only then a number is used.
  if (linked ? !links_.admit(linked, id) : !admit(plain, id)) return false;
  forget(channel.connection);
  const int fd = channel.release_fd();
  if (linked) keep_queue_short(fd);
  auto joined = std::make_shared<TcpChannel>(connection, *this, fd, false, true, Token{}, id, linked != 0,
                                             linked ? links_.link_of(linked, id) : 0);
  if (keys) joined->protect(keys, std::move(open));
  joined->welcome();
  attach(joined);
  return true;
}

uint64_t TcpEndpoint::joins(const Token& token, const LaneId& id) {
  std::lock_guard lock(mutex_);
  for (const auto& pending : joinable_)
    if (pending.lanes > 0 && equal_in_constant_time(pending.token, token))
      return id.lane > 0 && id.turn == 0 ? pending.connection : 0;
  return 0;
}

bool TcpEndpoint::admit(uint64_t connection, const LaneId& id) {
  std::lock_guard lock(mutex_);
  const auto found = std::find_if(joinable_.begin(), joinable_.end(),
                                  [&](const Pending& pending) { return pending.connection == connection; });
  if (found == joinable_.end() || found->used >> id.lane & 1) return false;
  found->used |= 1u << id.lane;
  if (--found->lanes == 0) joinable_.erase(found);
  return true;
}

}  // namespace sage_kvt
