// SPDX-License-Identifier: Apache-2.0
#include "listener.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>

namespace sage_kvt {
namespace {
constexpr useconds_t kBreathUs = 10000;
}  // namespace

Listener::Listener(int fd) : fd_(fd), reserve_(::open("/dev/null", O_RDONLY | O_CLOEXEC)) {}

Listener::~Listener() {
  ::close(fd_);
  if (reserve_ >= 0) ::close(reserve_);
}

int Listener::accept() {
  for (;;) {
    const int fd = ::accept4(fd_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd >= 0) return fd;
    if (errno == EINTR || errno == ECONNABORTED) continue;
    if (errno != EMFILE && errno != ENFILE) return -1;
    // The waiting connection would wake the lane again and again: turn it away.
    if (reserve_ < 0) ::usleep(kBreathUs);
    if (reserve_ >= 0) ::close(reserve_);
    const int unwanted = ::accept4(fd_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (unwanted >= 0) ::close(unwanted);
    reserve_ = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (unwanted < 0) return -1;
  }
}

}  // namespace sage_kvt
