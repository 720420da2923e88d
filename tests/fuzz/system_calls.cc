// SPDX-License-Identifier: Apache-2.0
#include "system_calls.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace sage_kvt::fuzz {
namespace {

constexpr size_t kKeptOfSent = 16u << 10;

bool fake(int fd) { return fd >= kFirstFake; }

Socket* socket_of(int fd) {
  const auto found = machine().sockets.find(fd);
  return found == machine().sockets.end() ? nullptr : &found->second;
}

ssize_t failed(int error) {
  errno = error;
  return -1;
}

}  // namespace

Machine& machine() {
  static Machine made;
  return made;
}

void Machine::reset() {
  sockets.clear();
  open.clear();
  next = kFirstFake;
  mapped = false;
}

extern "C" {

ssize_t __real_recvmsg(int, msghdr*, int);
ssize_t __real_sendmsg(int, const msghdr*, int);
ssize_t __real_recv(int, void*, size_t, int);
ssize_t __real_read(int, void*, size_t);
ssize_t __real_write(int, const void*, size_t);
int __real_close(int);
int __real_shutdown(int, int);
int __real_epoll_ctl(int, int, int, epoll_event*);
int __real_getsockopt(int, int, int, void*, socklen_t*);
void* __real_mmap(void*, size_t, int, int, int, off_t);
int __real_munmap(void*, size_t);
int __real_fstat(int, struct stat*);

ssize_t __wrap_recvmsg(int fd, msghdr* message, int flags) {
  if (!fake(fd)) return __real_recvmsg(fd, message, flags);
  auto* socket = socket_of(fd);
  if (socket == nullptr) return failed(EBADF);
  if (socket->packets_only) {
    if (socket->packets.empty()) return socket->closed ? 0 : failed(EAGAIN);
    const Packet packet = std::move(socket->packets.front());
    socket->packets.pop_front();
    const size_t size = std::min(packet.bytes.size(), message->msg_iov[0].iov_len);
    std::copy_n(packet.bytes.data(), size, static_cast<uint8_t*>(message->msg_iov[0].iov_base));
    // As many descriptors as there is room for; the others are closed.
    const size_t room =
        message->msg_controllen < CMSG_LEN(0) ? 0 : (message->msg_controllen - CMSG_LEN(0)) / sizeof(int);
    const size_t count = std::min(packet.fds.size(), room);
    for (size_t i = count; i < packet.fds.size(); ++i) machine().open.erase(packet.fds[i]);
    if (count > 0) {
      auto* control = static_cast<cmsghdr*>(message->msg_control);
      control->cmsg_level = SOL_SOCKET;
      control->cmsg_type = SCM_RIGHTS;
      control->cmsg_len = CMSG_LEN(count * sizeof(int));
      std::memcpy(CMSG_DATA(control), packet.fds.data(), count * sizeof(int));
      message->msg_controllen = std::min(message->msg_controllen, CMSG_SPACE(count * sizeof(int)));
    } else {
      message->msg_controllen = 0;
    }
    return static_cast<ssize_t>(size);
  }
  if (socket->given == socket->stream.size()) return socket->reset ? failed(ECONNRESET) : 0;
  size_t allowed = std::min(socket->allowed, socket->stream.size() - socket->given);
  if (allowed == 0) return failed(EAGAIN);
  size_t given = 0;
  for (size_t i = 0; i < message->msg_iovlen && allowed > 0; ++i) {
    const size_t part = std::min(allowed, message->msg_iov[i].iov_len);
    std::memcpy(message->msg_iov[i].iov_base, socket->stream.data() + socket->given, part);
    socket->given += part;
    socket->allowed -= part;
    allowed -= part;
    given += part;
  }
  return static_cast<ssize_t>(given);
}

ssize_t __wrap_sendmsg(int fd, const msghdr* message, int flags) {
  if (!fake(fd)) return __real_sendmsg(fd, message, flags);
  auto* socket = socket_of(fd);
  if (socket == nullptr) return failed(EBADF);
  size_t room = socket->room;
  if (room == 0) return failed(EAGAIN);
  size_t taken = 0;
  for (size_t i = 0; i < message->msg_iovlen && room > 0; ++i) {
    const auto* from = static_cast<const uint8_t*>(message->msg_iov[i].iov_base);
    const size_t part = std::min(room, message->msg_iov[i].iov_len);
    // Read in any case, so that memory that may not be read is found.
    std::vector<uint8_t> bytes(from, from + part);
    if (socket->sent.size() < kKeptOfSent) socket->sent.insert(socket->sent.end(), bytes.begin(), bytes.end());
    room -= part;
    taken += part;
  }
  if (socket->room != SIZE_MAX) socket->room = room;
  return static_cast<ssize_t>(taken);
}

ssize_t __wrap_recv(int fd, void* to, size_t size, int flags) {
  if (!fake(fd)) return __real_recv(fd, to, size, flags);
  auto* socket = socket_of(fd);
  if (socket == nullptr) return failed(EBADF);
  if (!socket->packets.empty() && size > 0) return 1;  // only ever peeked at
  return socket->closed ? 0 : failed(EAGAIN);
}

ssize_t __wrap_read(int fd, void* to, size_t size) { return fake(fd) ? failed(EAGAIN) : __real_read(fd, to, size); }

ssize_t __wrap_write(int fd, const void* from, size_t size) {
  return fake(fd) ? static_cast<ssize_t>(size) : __real_write(fd, from, size);
}

int __wrap_close(int fd) {
  if (!fake(fd)) return __real_close(fd);
  if (machine().open.erase(fd) == 0) __builtin_trap();  // closed twice, or never opened
  return 0;
}

int __wrap_shutdown(int fd, int how) { return fake(fd) ? 0 : __real_shutdown(fd, how); }

int __wrap_epoll_ctl(int epoll, int operation, int fd, epoll_event* event) {
  return fake(fd) ? 0 : __real_epoll_ctl(epoll, operation, fd, event);
}

int __wrap_getsockopt(int fd, int level, int name, void* value, socklen_t* size) {
  if (!fake(fd)) return __real_getsockopt(fd, level, name, value, size);
  std::memset(value, 0, *size);
  if (level == SOL_SOCKET && name == SO_PEERCRED && *size == sizeof(ucred)) {
    const ucred us{::getpid(), ::geteuid(), ::getegid()};
    std::memcpy(value, &us, sizeof us);
  }
  return 0;
}

int __wrap_eventfd(unsigned, int) { return machine().new_fd(); }

int __wrap_memfd_create(const char*, unsigned) { return machine().new_fd(); }

int __wrap_ftruncate(int, off_t) { return 0; }

int __wrap_fcntl(int, int command, ...) { return command == F_GET_SEALS ? machine().seals : 0; }

int __wrap_fstat(int fd, struct stat* status) {
  if (!fake(fd)) return __real_fstat(fd, status);
  status->st_size = static_cast<off_t>(machine().shared_size_told);
  return 0;
}

void* __wrap_mmap(void* where, size_t size, int protection, int flags, int fd, off_t offset) {
  if (!fake(fd)) return __real_mmap(where, size, protection, flags, fd, offset);
  auto& here = machine();
  if (here.mapped || size != here.shared_bytes) return MAP_FAILED;
  here.mapped = true;
  return here.shared;
}

int __wrap_munmap(void* memory, size_t size) {
  if (memory != machine().shared) return __real_munmap(memory, size);
  machine().mapped = false;
  return 0;
}

// As Linux: what can't be read ends the copy, and is an error if nothing was copied before.
ssize_t __wrap_process_vm_readv(pid_t, const iovec* local, unsigned long locals, const iovec* remote,
                                unsigned long remotes, unsigned long) {
  const auto& memory = machine().peer_memory;
  const auto begin = reinterpret_cast<uint64_t>(memory.data());
  size_t copied = 0, at = 0;
  unsigned long to = 0;
  for (unsigned long i = 0; i < remotes; ++i) {
    const auto address = reinterpret_cast<uint64_t>(remote[i].iov_base);
    const size_t length = remote[i].iov_len;
    if (address < begin || length > memory.size() || address - begin > memory.size() - length)
      return copied > 0 ? static_cast<ssize_t>(copied) : failed(EFAULT);
    for (size_t done = 0; done < length;) {
      while (to < locals && at == local[to].iov_len) {
        ++to;
        at = 0;
      }
      if (to == locals) return static_cast<ssize_t>(copied);
      const size_t part = std::min(length - done, local[to].iov_len - at);
      std::memcpy(static_cast<uint8_t*>(local[to].iov_base) + at, memory.data() + (address - begin) + done, part);
      at += part;
      done += part;
      copied += part;
    }
  }
  return static_cast<ssize_t>(copied);
}

}  // extern "C"

}  // namespace sage_kvt::fuzz
