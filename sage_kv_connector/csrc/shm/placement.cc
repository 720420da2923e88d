// SPDX-License-Identifier: Apache-2.0
// The receiver's side of a chunk: from the sender's pages or arena into the window.
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "crc32c.h"
#include "shm/channel.h"

namespace sage_kvt {
namespace {

constexpr size_t kMaxIov = 1024;  // IOV_MAX

}  // namespace

void ShmChannel::place(const Notice& notice, const PeerPiece* pieces) {
  bytes_placed_ += notice.length;
  auto window = endpoint_.find_window(notice.window);
  Status status = Status::kRefused;
  std::string detail;
  if (window && window->connection == connection->id) {
    status = window->reserve(notice.offset, notice.length, notice.generation);
    if (status != Status::kOk) {
      ++endpoint_.counters.refused_chunks;
      detail = "refused chunk";
    } else {
      status = (notice.flags & kInArena) ? copy_from_arena(*window, notice, &detail)
                                         : copy_direct(*window, notice, pieces, &detail);
    }
    if (status == Status::kOk)
      endpoint_.window_landed(*connection, window, notice.offset, notice.length);
    else if (status != Status::kCancelled)
      endpoint_.window_failed(window, status, notice.offset, notice.length, detail);
  }
  ack_wakes_ |= status != Status::kOk || !(notice.flags & kAckLater);
  acks_.push_back({{sizeof(Ack), static_cast<uint32_t>(RecordType::kAck)}, notice.slot, static_cast<uint32_t>(status)});
}

Status ShmChannel::still_valid(const Notice& notice, uint32_t crc, std::string* detail) {
  // Adds nothing, but unlike a load it can't be done before the copy.
  if (shared_->live[1 - side_][notice.slot].fetch_add(0, std::memory_order_seq_cst) != notice.generation) {
    *detail = "the sender revoked the chunk";
    return Status::kStaleGeneration;
  }
  if ((notice.flags & kHasCrc) && crc != notice.crc) {
    *detail = "crc32c " + std::to_string(crc) + " of what arrived, " + std::to_string(notice.crc) + " of what was sent";
    return Status::kChecksumMismatch;
  }
  return Status::kOk;
}

Status ShmChannel::copy_direct(Window& window, const Notice& notice, const PeerPiece* pieces, std::string* detail) {
  std::vector<iovec> remote(notice.pieces), local;
  for (uint32_t i = 0; i < notice.pieces; ++i)
    remote[i] = {reinterpret_cast<void*>(pieces[i].address), pieces[i].length};
  uint32_t crc = 0;
  size_t next = 0;
  for (uint64_t done = 0; done < notice.length;) {
    WindowPin pin(window);
    if (!pin) return Status::kCancelled;
    local.clear();
    window.space().pieces(notice.offset + done, notice.length - done, kMaxIov, &local);
    const ssize_t n = [&] {
      Stopwatch watch(endpoint_.options().measures, endpoint_.counters.place_ns);
      return ::process_vm_readv(peer_pid_, local.data(), local.size(), remote.data() + next, remote.size() - next, 0);
    }();
    if (n < 0 && errno == ESRCH) {
      *detail = "the peer process ended";
      return Status::kConnectionLost;
    }
    if (n <= 0) {
      *detail = std::string("process_vm_readv: ") + (n == 0 ? "nothing read" : std::strerror(errno));
      return Status::kIoError;
    }
    auto left = static_cast<size_t>(n);
    if (notice.flags & kHasCrc) {
      Stopwatch watch(endpoint_.options().measures, endpoint_.counters.verify_ns);
      for (size_t i = 0, more = left; more > 0; ++i) {
        const size_t part = std::min(more, local[i].iov_len);
        crc = crc32c(crc, local[i].iov_base, part);
        more -= part;
      }
    }
    done += left;
    while (left > 0) {
      auto& piece = remote[next];
      const size_t part = std::min(left, piece.iov_len);
      piece.iov_base = static_cast<char*>(piece.iov_base) + part;
      piece.iov_len -= part;
      left -= part;
      if (piece.iov_len == 0) ++next;
    }
  }
  return still_valid(notice, crc, detail);
}

Status ShmChannel::copy_from_arena(Window& window, const Notice& notice, std::string* detail) {
  WindowPin pin(window);
  if (!pin) return Status::kCancelled;
  const uint8_t* from = arena(1 - side_) + notice.arena_offset;
  uint32_t crc = 0;
  std::vector<iovec> local;
  // With its checksum: the two take turns by the piece.
  Stopwatch watch(endpoint_.options().measures, endpoint_.counters.place_ns);
  for (uint64_t done = 0; done < notice.length;) {
    local.clear();
    done += window.space().pieces(notice.offset + done, notice.length - done, kMaxIov, &local);
    for (const auto& piece : local) {
      std::memcpy(piece.iov_base, from, piece.iov_len);
      // Of what was placed, not of what lies in the arena: the peer may still write there.
      if (notice.flags & kHasCrc) crc = crc32c(crc, piece.iov_base, piece.iov_len);
      from += piece.iov_len;
    }
  }
  return still_valid(notice, crc, detail);
}

}  // namespace sage_kvt
