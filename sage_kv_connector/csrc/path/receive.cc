// SPDX-License-Identifier: Apache-2.0
// A path's receiving half: notices, checked before anything is believed, and reads from the sender's pages.
#include <algorithm>
#include <cstring>

#include "crc32c.h"
#include "endpoint.h"
#include "path/channel.h"

namespace sage_kvt {

bool PathChannel::receive_some() {
  bool moved = false;
  while (!told_.empty() && !connection->inbox_full()) {
    const uint32_t cell = told_.front();
    told_.pop_front();
    moved = true;
    take(cell);
    if (dead) return true;
  }
  for (auto& arrival : arrivals_) {
    const uint64_t before = arrival.ordered;
    if (before == arrival.notice.length) continue;
    const bool all = order_reads(arrival);
    moved |= arrival.ordered != before;
    if (!all) break;
  }
  return moved;
}

bool PathChannel::valid(const CellNotice& notice, const std::vector<RemotePiece>& pieces) const {
  if (notice.length == 0 || notice.length > kMaxChunkBytes) return false;
  if (notice.flags & kNoticeHoldsBytes) return notice.pieces == 0 && notice.length <= kMostInCell;
  uint64_t total = 0;
  for (const auto& piece : pieces) {
    if (piece.length == 0) return false;
    total += piece.length;
  }
  return total == notice.length;
}

// The peer could write the cell again meanwhile: all that is believed is copied first.
void PathChannel::take(uint32_t cell) {
  Arrival arrival;
  auto& notice = arrival.notice;
  arrival.cell = cell;
  std::memcpy(&notice, wire_->cell(cell), sizeof notice);
  if (notice.pieces > kMaxPieces || notice.number <= results_[cell].number) return end("a notice is not valid");
  arrival.from.resize(notice.pieces);
  if (notice.pieces > 0)
    std::memcpy(arrival.from.data(), wire_->cell(cell) + sizeof notice, notice.pieces * sizeof(RemotePiece));
  if (!valid(notice, arrival.from)) return end("a notice is not valid");
  arrival.window = endpoint_.find_window(notice.window);
  if (!arrival.window || arrival.window->connection != connection->id)
    return tell_end(arrival, static_cast<uint32_t>(Status::kRefused));
  const Status status = arrival.window->reserve(notice.offset, notice.length, notice.generation);
  if (status != Status::kOk) {
    ++endpoint_.counters.refused_chunks;
    return finish(arrival, status, "refused chunk");
  }
  if ((wire_->in_place() || notice.flags & kNoticeHoldsBytes) && !pin(arrival)) return;
  arrival.window->space().pieces(notice.offset, notice.length, notice.length, &arrival.into);
  if (notice.flags & kNoticeHoldsBytes) {
    std::string detail;
    const Status placed = place_from_cell(arrival, &detail);
    return finish(arrival, placed, detail);
  }
  const auto keys = wire_->writable();
  const bool registered = std::all_of(arrival.into.begin(), arrival.into.end(), [&](const iovec& piece) {
    return find_keys(*keys, reinterpret_cast<uint64_t>(piece.iov_base), piece.iov_len) != nullptr;
  });
  if (!registered) {
    arrival.window->release(notice.offset, notice.length);
    return tell_end(arrival, kElsewhere);
  }
  arrivals_.push_back(std::move(arrival));
}

// Its window stays as long as something is written there. False if it is closed: the peer is told.
bool PathChannel::pin(Arrival& arrival) {
  arrival.pin = std::make_unique<WindowPin>(*arrival.window);
  if (*arrival.pin) return true;
  tell_end(arrival, static_cast<uint32_t>(Status::kRefused));
  return false;
}

// The first arrival's bytes came: reads end in the order in which they were ordered.
void PathChannel::take_read() {
  auto first = std::move(arrivals_.front());
  arrivals_.pop_front();
  if (!first.pin && !pin(first)) return;
  wire_->place();
  std::string detail;
  const Status status = held(first, &detail);
  finish(first, status, detail);
}

Status PathChannel::place_from_cell(const Arrival& arrival, std::string* detail) {
  {
    Stopwatch watch(endpoint_.options().measures, endpoint_.counters.place_ns);
    const uint8_t* from = wire_->cell(arrival.cell) + sizeof(CellNotice);
    for (const auto& piece : arrival.into) {
      std::memcpy(piece.iov_base, from, piece.iov_len);
      from += piece.iov_len;
    }
  }
  return held(arrival, detail);
}

// Whether what lies in the window is what was sent.
Status PathChannel::held(const Arrival& arrival, std::string* detail) {
  if (!(arrival.notice.flags & kNoticeHasCrc)) return Status::kOk;
  Stopwatch watch(endpoint_.options().measures, endpoint_.counters.verify_ns);
  uint32_t crc = 0;
  for (const auto& piece : arrival.into) crc = crc32c(crc, piece.iov_base, piece.iov_len);
  if (crc == arrival.notice.crc) return Status::kOk;
  *detail =
      "crc32c " + std::to_string(crc) + " of what arrived, " + std::to_string(arrival.notice.crc) + " of what was sent";
  return Status::kChecksumMismatch;
}

// One order for each run of the sender's memory that few pieces of ours take. False if there is no room for more.
bool PathChannel::order_reads(Arrival& a) {
  const auto keys = wire_->writable();
  const MemoryKeys* known = nullptr;
  std::vector<LocalPiece> into;
  while (a.ordered < a.notice.length) {
    if (!wire_->room_for_read(a.notice.length)) return false;
    const auto& from = a.from[a.next_from];
    const uint64_t address = from.address + a.within_from;
    const uint64_t most = from.length - a.within_from;
    into.clear();
    uint64_t taken = 0;
    while (taken < most && into.size() < wire_->most_pieces()) {
      const auto& piece = a.into[a.next_into];
      const auto begin = reinterpret_cast<uint64_t>(piece.iov_base);
      if (!known || !known->hold(begin, piece.iov_len)) known = find_keys(*keys, begin, piece.iov_len);
      if (!known) {
        end("memory of an open window is registered no more");
        return false;
      }
      const uint64_t n = std::min(most - taken, piece.iov_len - a.within_into);
      into.push_back({begin + a.within_into, static_cast<uint32_t>(n), known->local});
      taken += n;
      a.within_into += n;
      if (a.within_into == piece.iov_len) {
        ++a.next_into;
        a.within_into = 0;
      }
    }
    a.ordered += taken;
    a.within_from += taken;
    if (a.within_from == from.length) {
      ++a.next_from;
      a.within_from = 0;
    }
    if (!wire_->read(address, from.key, into, a.ordered == a.notice.length, a.cell)) {
      end("it takes no orders any more");
      return false;
    }
  }
  return true;
}

void PathChannel::finish(Arrival& arrival, Status status, const std::string& detail) {
  const auto& notice = arrival.notice;
  if (status == Status::kOk)
    endpoint_.window_landed(*connection, arrival.window, notice.offset, notice.length);
  else
    endpoint_.window_failed(arrival.window, status, notice.offset, notice.length, detail);
  tell_end(arrival, static_cast<uint32_t>(status));
}

void PathChannel::tell_end(const Arrival& arrival, uint32_t status) {
  results_[arrival.cell] = {arrival.notice.number, status};
  acks_.push_back({Told::kEnded, arrival.cell, status});
}

}  // namespace sage_kvt
