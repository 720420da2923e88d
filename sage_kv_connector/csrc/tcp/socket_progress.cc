// SPDX-License-Identifier: Apache-2.0
#include "tcp/socket_progress.h"

#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>

namespace sage_kvt {
namespace {
// Longer than any switch's queue at 100 Mb/s, and than delayed acknowledgements; a lost packet is sent again sooner
// where others follow it.
constexpr uint64_t kPatienceNs = 125000000;
constexpr uint64_t kRoundTrips = 4;
}  // namespace

SocketProgress::Verdict SocketProgress::look(int fd, uint64_t now) {
  tcp_info info{};
  socklen_t size = sizeof info;
  if (::getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) != 0) return Verdict::kIdle;
  const bool moved = info.tcpi_bytes_acked != acknowledged_ || since_ == 0;
  acknowledged_ = info.tcpi_bytes_acked;
  // A receiver that takes nothing (no window) acknowledged all that was sent.
  if (info.tcpi_unacked == 0) {
    since_ = 0;
    return info.tcpi_notsent_bytes > 0 ? Verdict::kMoves : Verdict::kIdle;
  }
  if (moved) since_ = now;
  patience_ = std::max(kPatienceNs, kRoundTrips * uint64_t{1000} * info.tcpi_rtt);
  if (now - since_ > patience_) return Verdict::kStalled;
  return now > slow_since() ? Verdict::kSlow : Verdict::kMoves;
}

}  // namespace sage_kvt
