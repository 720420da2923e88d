// SPDX-License-Identifier: Apache-2.0
#include "stepped.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "crc32c.h"
#include "window.h"

namespace sage_kvt::simulation {
namespace {
constexpr int kPacketsATurn = 4;
}

SteppedChannel::SteppedChannel(std::shared_ptr<Connection> connection, SteppedEndpoint& endpoint,
                               std::shared_ptr<Link> link, bool connecting, bool joins)
    : Channel(std::move(connection)),
      endpoint_(endpoint),
      link_(std::move(link)),
      connecting_(connecting),
      joins_(joins),
      established_(!connecting) {}

void SteppedChannel::say(Packet::Kind kind) {
  Packet packet;
  packet.kind = kind;
  packet.number = connection->id;
  endpoint_.wire().send(*link_, out(), std::move(packet));
}

uint64_t SteppedChannel::next_due() const { return in().packets.empty() ? UINT64_MAX : in().packets.front().due; }

bool SteppedChannel::can_send() const {
  return established_ && out().packets.size() < endpoint_.wire().manners.packets_in_flight &&
         connection->has_work_for(*this);
}

void SteppedChannel::expire() { broken(Status::kConnectionLost, "nobody answered in time"); }

void SteppedChannel::shut() {
  in().gone = true;
  in().packets.clear();
  // Bytes that left are the peer's; what it was to read here is gone.
  if (endpoint_.wire().manners.pulls)
    for (auto& packet : out().packets) packet.revoked = true;
  say(Packet::Kind::kClosed);
  if (auto post = std::move(sending_.post)) connection->chunk_failed(post, Status::kConnectionLost, "");
  for (auto& [number, flight] : flights_)
    if (flight.post) connection->chunk_failed(flight.post, Status::kConnectionLost, "");
  flights_.clear();
}

void SteppedChannel::revoke(const Post& post) {
  if (sending_.post && sending_.post->id == post.id) {
    auto ended = std::move(sending_.post);
    sending_.packet.revoked = true;
    sending_.packet.bytes.assign(sending_.packet.length, '\0');
    endpoint_.wire().send(*link_, out(), std::move(sending_.packet));
    connection->chunk_failed(ended, Status::kCancelled, "");
  }
  for (auto& [number, flight] : flights_) {
    if (!flight.post || flight.post->id != post.id) continue;
    for (auto& packet : out().packets)
      if (packet.kind == Packet::Kind::kChunk && packet.number == number) packet.revoked = true;
    auto ended = std::move(flight.post);
    flight.post.reset();
    connection->chunk_failed(ended, Status::kCancelled, "");
  }
}

bool SteppedChannel::progress() {
  const bool received = receive_some();
  return (!dead && send_some()) || received;
}

bool SteppedChannel::send_some() {
  if (sending_.post) {
    send_chunk();
    return true;
  }
  if (!established_ || out().packets.size() >= endpoint_.wire().manners.packets_in_flight) return false;
  Packet packet;
  Grant grant;
  if (connection->take_grant(*this, &grant)) {
    packet.kind = Packet::Kind::kGrant;
    packet.window = grant.window;
    packet.number = grant.parts;
  } else if (connection->take_message(*this, &packet.bytes)) {
    packet.kind = Packet::Kind::kMessage;
    ++endpoint_.counters.messages_sent;
  } else {
    Chunk chunk;
    std::shared_ptr<Post> post;
    if (!connection->take_chunk(is_path(), endpoint_.options().chunk_bytes, kMaxPieces, &post, &chunk)) return false;
    packet.kind = Packet::Kind::kChunk;
    packet.window = post->window;
    packet.offset = chunk.offset;
    packet.length = chunk.length;
    packet.generation = post->generation;
    packet.checksum = post->checksum;
    sending_.post = std::move(post);
    sending_.chunk = std::move(chunk);
    sending_.packet = std::move(packet);
    return true;
  }
  endpoint_.wire().send(*link_, out(), std::move(packet));
  return true;
}

void SteppedChannel::send_chunk() {
  auto& wire = endpoint_.wire();
  auto& packet = sending_.packet;
  const auto post = std::move(sending_.post);
  if (wire.manners.pulls) {
    packet.number = next_flight_++;
    packet.pieces = sending_.chunk.pieces;
    flights_[packet.number] = {post, packet.offset, packet.length};
    wire.send(*link_, out(), std::move(packet));
    return;
  }
  for (const auto& piece : sending_.chunk.pieces)
    packet.bytes.append(static_cast<const char*>(piece.iov_base), piece.iov_len);
  packet.corrupt = packet.checksum && wire.chance(wire.manners.corrupt);
  const uint64_t offset = packet.offset, length = packet.length;
  if (wire.chance(wire.manners.duplicate)) wire.send(*link_, out(), packet);
  wire.send(*link_, out(), std::move(packet));
  endpoint_.counters.bytes_sent += length;
  ++endpoint_.counters.chunks_sent;
  connection->chunk_sent(post, offset, length);
}

bool SteppedChannel::receive_some() {
  bool moved = false;
  for (int i = 0; i < kPacketsATurn && !dead; ++i) {
    auto& packets = in().packets;
    if (packets.empty() || packets.front().due > now_ns() || connection->inbox_full()) return moved;
    // It stays there until it is taken: a chunk may be revoked in the meantime.
    Packet packet = std::move(packets.front());
    packets.pop_front();
    connection->liveness.heard();
    moved = true;
    if (!on_packet(packet)) return true;
  }
  return moved;
}

bool SteppedChannel::on_packet(Packet& packet) {
  switch (packet.kind) {
    case Packet::Kind::kEstablished:
      established_ = true;
      deadline = 0;
      if (!joins_) {
        endpoint_.accepted_as(connection->id, packet.number);
        endpoint_.emit(EventKind::kConnected, connection->id);
      }
      return true;
    case Packet::Kind::kRefused:
      broken(Status::kRefused, "nobody listens there");
      return false;
    case Packet::Kind::kClosed:
      broken(Status::kConnectionLost, "the peer closed the connection");
      return false;
    case Packet::Kind::kMessage:
      if (packet.bytes.size() > (connection->authorized ? kMaxMessageBytes : kMaxUnauthorizedMessageBytes)) {
        broken(Status::kProtocolError, "message of " + std::to_string(packet.bytes.size()) + " bytes");
        return false;
      }
      endpoint_.emit_message(*connection, std::move(packet.bytes));
      return true;
    case Packet::Kind::kChunk:
      if (!connection->authorized) {
        broken(Status::kProtocolError, "data before the handshake");
        return false;
      }
      place(packet);
      return true;
    case Packet::Kind::kAck: {
      const auto found = flights_.find(packet.number);
      if (found == flights_.end()) return true;
      const auto flight = std::move(found->second);
      flights_.erase(found);
      if (!flight.post) return true;
      if (packet.status == Status::kOk) {
        endpoint_.counters.bytes_sent += flight.length;
        ++endpoint_.counters.chunks_sent;
        connection->chunk_sent(flight.post, flight.offset, flight.length);
      } else {
        connection->chunk_failed(flight.post, packet.status, "the receiver did not take a chunk");
      }
      return true;
    }
    case Packet::Kind::kGrant:
      connection->granted({packet.window, packet.number});
      return true;
    case Packet::Kind::kPing:
      say(Packet::Kind::kPong);
      return true;
    case Packet::Kind::kPong:
      return true;
  }
  return true;
}

void SteppedChannel::place(Packet& packet) {
  auto window = endpoint_.find_window(packet.window);
  if (window && window->connection != connection->id) window.reset();
  Status status = window ? window->reserve(packet.offset, packet.length, packet.generation) : Status::kRefused;
  if (window && status != Status::kOk) {
    ++endpoint_.counters.refused_chunks;
    endpoint_.window_failed(window, status, packet.offset, packet.length, "refused chunk");
  } else if (window) {
    WindowPin pin(*window);
    if (!pin) {
      status = Status::kCancelled;
    } else {
      uint64_t done = 0;
      size_t piece = 0, within = 0;
      std::vector<iovec> to;
      while (done < packet.length) {
        to.clear();
        window->space().pieces(packet.offset + done, packet.length - done, kMaxPieces, &to);
        for (const auto& part : to) {
          for (size_t filled = 0; filled < part.iov_len;) {
            auto* at = static_cast<char*>(part.iov_base) + filled;
            if (!packet.pieces.empty()) {
              const size_t n = std::min(packet.pieces[piece].iov_len - within, part.iov_len - filled);
              std::memcpy(at, static_cast<char*>(packet.pieces[piece].iov_base) + within, n);
              within += n;
              if (within == packet.pieces[piece].iov_len) ++piece, within = 0;
              filled += n;
              done += n;
            } else {
              const size_t n = part.iov_len - filled;
              std::memcpy(at, packet.bytes.data() + done, n);
              filled += n;
              done += n;
            }
          }
        }
      }
      if (packet.revoked) {
        status = Status::kStaleGeneration;
        endpoint_.window_failed(window, status, packet.offset, packet.length, "the sender revoked the chunk");
      } else if (packet.corrupt) {
        status = Status::kChecksumMismatch;
        endpoint_.window_failed(window, status, packet.offset, packet.length, "a byte changed on the way");
      } else {
        endpoint_.window_landed(*connection, window, packet.offset, packet.length);
      }
    }
  }
  if (packet.number == 0) return;
  Packet ack;
  ack.kind = Packet::Kind::kAck;
  ack.number = packet.number;
  ack.status = status;
  endpoint_.wire().send(*link_, out(), std::move(ack));
}

SteppedEndpoint::SteppedEndpoint(std::shared_ptr<Wire> wire, const EndpointOptions& options, std::string host)
    : Endpoint(options), wire_(std::move(wire)), host_(std::move(host)) {}

std::string SteppedEndpoint::listen(const std::string&) {
  listens_ = true;
  wire_->listening(host_, true);
  return host_;
}

uint64_t SteppedEndpoint::connect(const std::string& address, double timeout_s) {
  throw_if_closed();
  const uint64_t until = deadline_after(timeout_s);
  auto connection = new_connection(false);
  auto link = std::make_shared<Link>(Link{host_, address, {}, {}});
  connection->set_info({address, wire_->manners.pulls ? "direct" : "stream", "", !wire_->manners.pulls, 1});
  auto channel = std::make_shared<SteppedChannel>(connection, *this, link, true, false);
  channel->deadline = until;
  theirs_[connection->id] = {0, address};
  attach(channel);
  wire_->call(std::move(link), 0);
  return connection->id;
}

void SteppedEndpoint::authorize(uint64_t id) {
  Endpoint::authorize(id);
  const auto found = theirs_.find(id);
  const auto connection = find_connection(id);
  if (found == theirs_.end() || !connection) return;
  for (int i = 1; i < options().lanes; ++i) {
    auto link = std::make_shared<Link>(Link{host_, found->second.to, {}, {}});
    auto channel = std::make_shared<SteppedChannel>(connection, *this, link, true, true);
    channel->deadline = now_ns() + kSetUpNs;
    attach(channel);
    wire_->call(std::move(link), found->second.number);
  }
}

void SteppedEndpoint::take_calls() {
  Call call;
  while (wire_->take_call(host_, &call)) {
    auto connection = call.joins ? find_connection(call.joins) : new_connection(true);
    Packet answer;
    answer.kind = Packet::Kind::kRefused;
    if (connection && (!call.joins || connection->authorized)) {
      answer.kind = Packet::Kind::kEstablished;
      answer.number = connection->id;
      if (!call.joins) {
        connection->set_info({"a peer", wire_->manners.pulls ? "direct" : "stream", "", !wire_->manners.pulls, 1});
        connection->announced = true;
        emit(EventKind::kAccepted, connection->id);
      }
      attach(std::make_shared<SteppedChannel>(connection, *this, call.link, false, call.joins != 0));
    }
    wire_->send(*call.link, call.link->to_connector, std::move(answer));
  }
}

bool SteppedEndpoint::step() {
  take_calls();
  bool moved = false;
  for (const auto& lane : lanes()) {
    for (const auto& channel : lane->channels())
      if (!channel->dead) channel->woken = true;
    moved |= lane->step();
  }
  return moved;
}

bool SteppedEndpoint::busy() { return next_due() <= now_ns(); }

uint64_t SteppedEndpoint::next_due() {
  uint64_t next = wire_->next_call(host_);
  if (has_doomed()) return 0;
  for (const auto& lane : lanes())
    for (const auto& known : lane->channels()) {
      const auto& channel = static_cast<SteppedChannel&>(*known);
      if (channel.dead) return 0;
      next = std::min(next, channel.next_due());
      if (const uint64_t due = channel.due(); due != 0) next = std::min(next, due);
      if (channel.stuck() || channel.can_send()) return 0;
    }
  return next;
}

void SteppedEndpoint::die() {
  wire_->listening(host_, false);
  close();
}

}  // namespace sage_kvt::simulation
