// SPDX-License-Identifier: Apache-2.0
// How two processes of one node meet: an abstract unix socket with an unguessable name passes the
// shared memory and the eventfds, and both try whether they may read the other's memory.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "shm/channel.h"

namespace sage_kvt {
namespace {

// Packets of the rendezvous, in this order: connecting, accepting, connecting.
struct SetUp {
  uint32_t magic, version;
  uint64_t arena_bytes, nonce_address, nonce;
};
struct Answer {
  uint32_t magic, can_read;
  uint64_t nonce_address, nonce;
  char why_not[96];
};
struct Final {
  uint32_t magic, can_read;
  char why_not[96];
};

constexpr size_t kMaxPacketFds = 2;

uint64_t random_number() {
  uint64_t value = 0;
  if (::getrandom(&value, sizeof value, 0) != sizeof value)
    throw std::system_error(errno, std::generic_category(), "getrandom");
  return value | 1;
}

sockaddr_un abstract_address(const std::string& name, socklen_t* size) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (name.empty() || name.size() + 1 > sizeof address.sun_path)
    throw std::invalid_argument("shm address 'shm://" + name + "' must have 1 to " +
                                std::to_string(sizeof address.sun_path - 1) + " characters after shm://");
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  *size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return address;
}

template <size_t N>
void copy_text(char (&to)[N], const std::string& from) {
  std::strncpy(to, from.c_str(), N - 1);
  to[N - 1] = 0;
}

template <size_t N>
std::string text_of(const char (&from)[N]) {
  return std::string(from, strnlen(from, N));
}

}  // namespace

bool ShmChannel::can_read_peer(uint64_t address, uint64_t nonce) {
  if (!endpoint_.shm().allow_direct) {
    why_not_ = "switched off (zero_copy=false)";
    return false;
  }
  uint64_t seen = 0;
  iovec local{&seen, sizeof seen}, remote{reinterpret_cast<void*>(address), sizeof seen};
  if (::process_vm_readv(peer_pid_, &local, 1, &remote, 1, 0) != sizeof seen) {
    why_not_ = std::string("process_vm_readv of the peer: ") + std::strerror(errno);
    return false;
  }
  if (seen != nonce) {
    why_not_ = "the peer's process id means another process here (other pid namespace)";
    return false;
  }
  return true;
}

bool ShmChannel::send_packet(const void* data, size_t size, const std::vector<int>& fds) {
  iovec piece{const_cast<void*>(data), size};
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxPacketFds * sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
    auto* c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    std::memcpy(CMSG_DATA(c), fds.data(), fds.size() * sizeof(int));
  }
  return ::sendmsg(socket_, &message, MSG_NOSIGNAL | MSG_DONTWAIT) == static_cast<ssize_t>(size);
}

bool ShmChannel::map(int memfd, bool create) {
  shared_bytes_ = sizeof(SharedLayout) + 2 * endpoint_.shm().arena_bytes;
  void* memory = ::mmap(nullptr, shared_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
  if (memory == MAP_FAILED) return false;
  shared_ = static_cast<SharedLayout*>(memory);
  if (create) {
    shared_->magic = kShmMagic;
    shared_->version = kShmVersion;
    shared_->arena_bytes = endpoint_.shm().arena_bytes;
  }
  writer_ = std::make_unique<RingWriter>(shared_->index[side_], shared_->ring[side_]);
  reader_ = std::make_unique<RingReader>(shared_->index[1 - side_], shared_->ring[1 - side_]);
  return true;
}

bool ShmChannel::begin() {
  nonce_ = random_number();
  ucred peer{};
  socklen_t size = sizeof peer;
  if (::getsockopt(socket_, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) return false;
  if (peer.uid != ::geteuid()) {
    errno = EACCES;
    return false;
  }
  peer_pid_ = peer.pid;
  if (incoming_) return true;
  const int memfd = static_cast<int>(::memfd_create("sage-kvt", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (memfd < 0) return false;
  const auto bytes = static_cast<off_t>(sizeof(SharedLayout) + 2 * endpoint_.shm().arena_bytes);
  bool sent = false;
  if (::ftruncate(memfd, bytes) == 0 && ::fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0 &&
      map(memfd, true)) {
    const SetUp packet{kShmMagic, kShmVersion, endpoint_.shm().arena_bytes, reinterpret_cast<uint64_t>(&nonce_),
                       nonce_};
    sent = send_packet(&packet, sizeof packet, {memfd, own_wake_});
  }
  const int error = errno;
  ::close(memfd);
  errno = error;
  return sent;
}

bool ShmChannel::handshake() {
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxPacketFds * sizeof(int))];
  uint8_t data[256];
  iovec piece{data, sizeof data};
  msghdr message{};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t n = ::recvmsg(socket_, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return false;
  if (n < 0) {
    broken(Status::kConnectionLost, std::strerror(errno));
    return true;
  }
  std::vector<int> fds;  // an empty packet may bring some, too
  for (auto* c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c))
    if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
      fds.resize((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
      std::memcpy(fds.data(), CMSG_DATA(c), fds.size() * sizeof(int));
    }
  if (n == 0)
    broken(Status::kConnectionLost, "the peer closed the rendezvous");
  else if (!on_packet(data, static_cast<size_t>(n), &fds))
    broken(Status::kProtocolError, "the rendezvous failed");
  for (int fd : fds)
    if (fd >= 0) ::close(fd);
  return true;
}

// Takes descriptors out of `fds` that it keeps.
bool ShmChannel::on_packet(const uint8_t* data, size_t size, std::vector<int>* fds) {
  if (state_ == State::kSetUp) {
    SetUp packet;
    struct stat status{};
    if (size != sizeof packet || fds->size() != 2) return false;
    std::memcpy(&packet, data, sizeof packet);
    const int seals = ::fcntl((*fds)[0], F_GET_SEALS);
    if (packet.magic != kShmMagic || packet.version != kShmVersion ||
        packet.arena_bytes != endpoint_.shm().arena_bytes || ::fstat((*fds)[0], &status) != 0 ||
        static_cast<uint64_t>(status.st_size) < sizeof(SharedLayout) + 2 * packet.arena_bytes || seals < 0 ||
        !(seals & F_SEAL_SHRINK) || !map((*fds)[0], false))
      return false;
    std::swap(peer_wake_, (*fds)[1]);
    we_read_ = can_read_peer(packet.nonce_address, packet.nonce);
    Answer answer{kShmMagic, we_read_, reinterpret_cast<uint64_t>(&nonce_), nonce_, {}};
    copy_text(answer.why_not, why_not_);
    state_ = State::kFinal;
    return send_packet(&answer, sizeof answer, {own_wake_});
  }
  if (state_ == State::kAnswer) {
    Answer answer;
    if (size != sizeof answer || fds->size() != 1) return false;
    std::memcpy(&answer, data, sizeof answer);
    if (answer.magic != kShmMagic) return false;
    std::swap(peer_wake_, (*fds)[0]);
    peer_reads_ = answer.can_read != 0;
    we_read_ = can_read_peer(answer.nonce_address, answer.nonce);
    Final final{kShmMagic, we_read_, {}};
    copy_text(final.why_not, why_not_);
    if (!peer_reads_) why_not_ = "at the peer: " + text_of(answer.why_not);
    if (!send_packet(&final, sizeof final, {})) return false;
    ready();
    return true;
  }
  Final final;
  if (state_ != State::kFinal || size != sizeof final) return false;
  std::memcpy(&final, data, sizeof final);
  if (final.magic != kShmMagic) return false;
  peer_reads_ = final.can_read != 0;
  if (!peer_reads_ && we_read_) why_not_ = "at the peer: " + text_of(final.why_not);
  ready();
  return true;
}

void ShmChannel::ready() {
  state_ = State::kReady;
  deadline = 0;
  const bool direct = we_read_ && peer_reads_;
  connection->set_info(
      {"process " + std::to_string(peer_pid_), direct ? "direct" : "arena", direct ? "" : why_not_, !direct, 1});
  connection->announced = true;
  endpoint_.emit(incoming_ ? EventKind::kAccepted : EventKind::kConnected, connection->id);
}

ShmEndpoint::ShmEndpoint(const EndpointOptions& options, const ShmOptions& shm) : Endpoint(options), shm_(shm) {}

ShmEndpoint::~ShmEndpoint() { close(); }

std::string ShmEndpoint::listen(const std::string& address) {
  throw_if_closed();
  if (!address.empty())
    throw std::invalid_argument("shm address '" + address + "': the name is chosen at random, so it must be empty");
  char name[64];
  std::snprintf(name, sizeof name, "sage-kvt-%016llx%016llx", static_cast<unsigned long long>(random_number()),
                static_cast<unsigned long long>(random_number()));
  socklen_t size;
  const sockaddr_un bound = abstract_address(name, &size);
  const int fd = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0 || ::bind(fd, reinterpret_cast<const sockaddr*>(&bound), size) != 0 || ::listen(fd, 128) != 0) {
    const int error = errno;
    if (fd >= 0) ::close(fd);
    throw std::system_error(error, std::generic_category(), std::string("can't listen on shm://") + name);
  }
  lane(0).watch(std::make_unique<Listener>(fd), [this](int socket) { accepted(socket); });
  return name;
}

void ShmEndpoint::accepted(int fd) {
  auto connection = new_connection(true);
  if (!connection) {
    ::close(fd);
    return;
  }
  auto channel = std::make_shared<ShmChannel>(connection, *this, fd, true);
  channel->deadline = now_ns() + kSetUpNs;
  if (channel->begin())
    attach(channel);
  else
    forget(connection);
}

uint64_t ShmEndpoint::connect(const std::string& name, double timeout_s) {
  throw_if_closed();
  const uint64_t deadline = deadline_after(timeout_s);
  socklen_t size;
  const sockaddr_un target = abstract_address(name, &size);
  const int fd = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0 || ::connect(fd, reinterpret_cast<const sockaddr*>(&target), size) != 0) {
    const int error = errno;
    if (fd >= 0) ::close(fd);
    throw std::system_error(error, std::generic_category(), "can't connect to shm://" + name);
  }
  auto connection = new_connection(false);
  if (!connection) {
    ::close(fd);
    throw std::invalid_argument("the backend is closed");
  }
  connection->set_info({"shm://" + name, "arena", "rendezvous not finished", true, 1});
  auto channel = std::make_shared<ShmChannel>(connection, *this, fd, false);
  channel->deadline = deadline;
  if (!channel->begin()) {
    const int error = errno;
    forget(connection);
    throw std::system_error(error, std::generic_category(), "can't set up shm://" + name);
  }
  attach(channel);
  return connection->id;
}

}  // namespace sage_kvt
