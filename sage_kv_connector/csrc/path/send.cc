// SPDX-License-Identifier: Apache-2.0
// A path's sending half: notices of chunks, and the ends of those that came.
#include <algorithm>
#include <cstring>

#include "crc32c.h"
#include "endpoint.h"
#include "path/channel.h"

namespace sage_kvt {

bool PathChannel::send_some() {
  bool moved = false;
  for (; !acks_.empty() && wire_->room(2); moved = true) {
    if (!wire_->tell(acks_.front())) {
      end("it takes no orders any more");
      return true;
    }
    acks_.pop_front();
  }
  while (!dead && can_send() && send_chunk()) moved = true;
  return moved;
}

bool PathChannel::send_chunk() {
  Flight flight;
  const uint64_t most = std::min(endpoint_.options().chunk_bytes, wire_->most_in_chunk());
  if (!connection->take_chunk(true, most, kMaxPieces, &flight.post, &flight.chunk)) return false;
  size_t cell = next_cell_;
  while (flights_[cell].post) cell = (cell + 1) % kCells;
  flight.number = next_number_++;
  if (!write_notice(cell, flight)) {
    connection->give_back(flight.post, std::move(flight.chunk), true);
    connection->kick();
    return true;
  }
  next_cell_ = (cell + 1) % kCells;
  --free_;
  bytes_in_flight_ += flight.chunk.length;
  const bool held = flight.chunk.length <= kMostInCell;
  const uint64_t bytes =
      sizeof(CellNotice) + (held ? flight.chunk.length : flight.chunk.pieces.size() * sizeof(RemotePiece));
  flights_[cell] = std::move(flight);
  if (!wire_->send_cell(cell, bytes, {Told::kChunk, static_cast<uint32_t>(cell)})) {
    end("it takes no orders any more");
    return true;
  }
  endpoint_.counters.bytes_sent += flights_[cell].chunk.length;
  ++endpoint_.counters.chunks_sent;
  return true;
}

// False if the peer could not read it: some of its memory has no key.
bool PathChannel::write_notice(size_t cell, const Flight& flight) {
  const auto& [post, chunk, number] = flight;
  uint8_t* to = wire_->outgoing(cell);
  uint8_t* body = to + sizeof(CellNotice);
  CellNotice notice{};
  notice.number = number;
  notice.window = post->window;
  notice.offset = chunk.offset;
  notice.length = chunk.length;
  notice.generation = post->generation;
  if (chunk.length <= kMostInCell) {
    Stopwatch watch(endpoint_.options().measures, endpoint_.counters.send_ns);
    notice.flags |= kNoticeHoldsBytes;
    for (const auto& piece : chunk.pieces) {
      std::memcpy(body, piece.iov_base, piece.iov_len);
      body += piece.iov_len;
    }
  } else {
    const auto keys = wire_->readable();
    notice.pieces = static_cast<uint16_t>(chunk.pieces.size());
    const MemoryKeys* known = nullptr;
    for (const auto& piece : chunk.pieces) {
      const auto address = reinterpret_cast<uint64_t>(piece.iov_base);
      if (!known || !known->hold(address, piece.iov_len)) known = find_keys(*keys, address, piece.iov_len);
      if (!known) return false;
      const RemotePiece told{address, static_cast<uint32_t>(piece.iov_len), known->remote};
      std::memcpy(body, &told, sizeof told);
      body += sizeof told;
    }
  }
  if (post->checksum) {
    Stopwatch watch(endpoint_.options().measures, endpoint_.counters.verify_ns);
    notice.flags |= kNoticeHasCrc;
    for (const auto& piece : chunk.pieces) notice.crc = crc32c(notice.crc, piece.iov_base, piece.iov_len);
  }
  std::memcpy(to, &notice, sizeof notice);
  return true;
}

void PathChannel::on_ended(const PathWord& word) {
  Flight flight = std::move(flights_[word.cell]);
  flights_[word.cell] = {};
  ++free_;
  bytes_in_flight_ -= flight.chunk.length;
  end_flight(*connection, std::move(flight), word.status);
}

void end_flight(Connection& connection, Flight flight, uint64_t status) {
  if (status == static_cast<uint64_t>(Status::kOk)) {
    connection.chunk_sent(flight.post, flight.chunk.offset, flight.chunk.length);
  } else if (status == kElsewhere) {
    connection.give_back(flight.post, std::move(flight.chunk), true);
    connection.kick();
  } else {
    const bool known = status <= static_cast<uint64_t>(Status::kForged);
    connection.chunk_failed(flight.post, known ? static_cast<Status>(status) : Status::kProtocolError,
                            "the receiver did not take a chunk");
  }
}

}  // namespace sage_kvt
