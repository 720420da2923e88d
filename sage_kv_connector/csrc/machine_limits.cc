// SPDX-License-Identifier: Apache-2.0
#include "machine_limits.h"

#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

namespace sage_kvt {
namespace {

constexpr size_t kIovecsACall = 512;

double seconds_since(uint64_t begun) { return static_cast<double>(now_ns() - begun) / 1e9; }

void send_all(int fd, const char* data, uint64_t size, uint64_t block) {
  while (size > 0) {
    const ssize_t n = ::send(fd, data, std::min(size, block), MSG_NOSIGNAL);
    if (n <= 0) {
      if (n < 0 && errno == EINTR) continue;
      throw std::system_error(errno, std::generic_category(), "send");
    }
    data += n;
    size -= static_cast<uint64_t>(n);
  }
}

void receive_all(int fd, char* data, uint64_t size, uint64_t block) {
  while (size > 0) {
    const ssize_t n = ::recv(fd, data, std::min(size, block), 0);
    if (n <= 0) {
      if (n < 0 && errno == EINTR) continue;
      throw std::system_error(n == 0 ? ECONNRESET : errno, std::generic_category(), "recv");
    }
    data += n;
    size -= static_cast<uint64_t>(n);
  }
}

}  // namespace

double measure_process_vm_readv(int pid, const std::vector<Segment>& local, const std::vector<Segment>& remote) {
  if (local.size() != remote.size()) throw std::invalid_argument("local and remote must have equal lengths");
  iovec to[kIovecsACall], from[kIovecsACall];
  const uint64_t begun = now_ns();
  for (size_t i = 0; i < local.size(); i += kIovecsACall) {
    const size_t n = std::min(kIovecsACall, local.size() - i);
    uint64_t total = 0;
    for (size_t k = 0; k < n; ++k) {
      to[k] = {reinterpret_cast<void*>(local[i + k].address), local[i + k].length};
      from[k] = {reinterpret_cast<void*>(remote[i + k].address), remote[i + k].length};
      total += local[i + k].length;
    }
    if (::process_vm_readv(pid, to, n, from, n, 0) != static_cast<ssize_t>(total))
      throw std::system_error(errno, std::generic_category(), "process_vm_readv");
  }
  return seconds_since(begun);
}

double measure_memcpy(const std::vector<Segment>& to, const std::vector<Segment>& from) {
  if (to.size() != from.size()) throw std::invalid_argument("to and from must have equal lengths");
  const uint64_t begun = now_ns();
  for (size_t i = 0; i < to.size(); ++i)
    std::memcpy(reinterpret_cast<void*>(to[i].address), reinterpret_cast<const void*>(from[i].address), to[i].length);
  return seconds_since(begun);
}

double measure_socket_send(int fd, const void* data, uint64_t size, uint64_t block) {
  const uint64_t begun = now_ns();
  send_all(fd, static_cast<const char*>(data), size, block);
  return seconds_since(begun);
}

double measure_socket_receive(int fd, void* data, uint64_t size, uint64_t block) {
  const uint64_t begun = now_ns();
  receive_all(fd, static_cast<char*>(data), size, block);
  return seconds_since(begun);
}

std::vector<double> measure_socket_ping(int fd, uint64_t block, int count) {
  std::vector<char> buffer(block);
  std::vector<double> halves;
  for (int i = 0; i < count; ++i) {
    const uint64_t begun = now_ns();
    send_all(fd, buffer.data(), block, block);
    receive_all(fd, buffer.data(), block, block);
    halves.push_back(seconds_since(begun) / 2);
  }
  return halves;
}

void socket_echo(int fd, uint64_t block, int count) {
  std::vector<char> buffer(block);
  for (int i = 0; i < count; ++i) {
    receive_all(fd, buffer.data(), block, block);
    send_all(fd, buffer.data(), block, block);
  }
}

}  // namespace sage_kvt
