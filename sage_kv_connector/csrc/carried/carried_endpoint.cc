// SPDX-License-Identifier: Apache-2.0
#include "carried/carried_endpoint.h"

#include <chrono>
#include <stdexcept>
#include <utility>

namespace sage_kvt {
namespace {

using Kind = CarriedNote::Kind;
constexpr uint32_t kOnlyPath = 1;

}  // namespace

CarriedEndpoint::CarriedEndpoint(const EndpointOptions& options, const TcpOptions& tcp, const CarriedOptions& carried)
    : TcpEndpoint(options, tcp), name_(carried.name), slots_(carried.slots, options.chunk_bytes) {}

CarriedEndpoint::~CarriedEndpoint() { CarriedEndpoint::close(); }

void CarriedEndpoint::close() {
  TcpEndpoint::close();
  std::lock_guard lock(mutex_);
  ended_ = true;
  // What the library was not asked for yet: nobody will.
  for (const auto& job : jobs_)
    if (job.what == CarriedJob::What::kRead) reading_.erase(job.read->number);
  jobs_.clear();
  wanting_.clear();
  peers_.clear();
  changed_.notify_all();
}

void CarriedEndpoint::deregister_memory(uint64_t region) {
  TcpEndpoint::deregister_memory(region);
  std::lock_guard lock(mutex_);
  if (regions_.erase(region) > 0) publish();
}

void CarriedEndpoint::carry(uint64_t region, uint64_t address, uint64_t length) {
  std::lock_guard lock(mutex_);
  regions_[region] = {address, length};
  publish();
}

void CarriedEndpoint::publish() {
  KeyTable table;
  for (const auto& [id, region] : regions_) table.push_back({region.address, region.address + region.length, 0, 0});
  readable_ = by_address(std::move(table));
}

std::shared_ptr<const KeyTable> CarriedEndpoint::readable() const {
  std::lock_guard lock(mutex_);
  return readable_;
}

void CarriedEndpoint::describe_library(std::string description) {
  if (description.empty() || description.size() > kMaxDescriptionBytes)
    throw std::invalid_argument("description has " + std::to_string(description.size()) + " bytes, allowed: 1 to " +
                                std::to_string(kMaxDescriptionBytes));
  std::lock_guard lock(mutex_);
  if (description == description_) return;
  description_ = std::move(description);
  for (const auto& [id, peer] : peers_)
    if (peer.end) describe_to(peer);
}

CarriedEndpoint::Peer& CarriedEndpoint::peer_of(const std::shared_ptr<Connection>& connection) {
  auto [found, fresh] = peers_.try_emplace(connection->id);
  if (fresh) {
    auto& peer = found->second;
    peer.connection = connection;
    peer.dialled = dialled(connection->id);
    peer.not_from_here = peer.not_from_there = "there is no path by " + name_ + " yet";
  }
  return found->second;
}

void CarriedEndpoint::authorize(uint64_t id) {
  const auto connection = find_connection(id);
  if (!connection || connection->authorized) return;
  // What is sealed can't be read from pages.
  const bool sealed = is_protected(id);
  if (sealed) set_way(*connection, "stream", "what is protected goes over sockets");
  TcpEndpoint::authorize(id);
  if (sealed) return;
  std::lock_guard lock(mutex_);
  auto& peer = peer_of(connection);
  if (connection->closed()) {  // it was forgotten before
    peers_.erase(id);
    return;
  }
  show_way(peer);
  if (!peer.dialled)
    connection->queue_note(note_of({Kind::kInvitation}));
  else if (peer.invited)
    want_path(peer);
}

void CarriedEndpoint::want_path(const Peer& peer) {
  if (peer.end || ended_) return;
  wanting_.push_back(peer.connection->id);
  changed_.notify_all();
}

bool CarriedEndpoint::on_note(const std::shared_ptr<Connection>& connection, const std::string& bytes) {
  if (is_protected(connection->id)) return false;
  auto note = carried_note_of(bytes);
  if (!note) return false;
  std::shared_ptr<WireEnd> end;
  {
    std::lock_guard lock(mutex_);
    auto& peer = peer_of(connection);
    switch (note->kind) {
      case Kind::kInvitation:
        if (!peer.dialled || std::exchange(peer.invited, true)) return false;
        if (connection->authorized) want_path(peer);
        return true;
      case Kind::kDescription:
        return described(peer, *note);
      case Kind::kAble:
      case Kind::kUnable:
        peer.not_from_here = note->kind == Kind::kAble ? "" : "the peer can't read here: " + note->body;
        show_way(peer);
        break;
      case Kind::kWord:
        break;
    }
    end = peer.end;
  }
  return end && end->heard(std::move(*note));
}

bool CarriedEndpoint::described(Peer& peer, const CarriedNote& note) {
  if (note.offset != peer.arriving.size() || !peer.connection->authorized) return false;
  peer.arriving += note.body;
  if (peer.arriving.size() < note.total) return true;
  const uint64_t id = peer.connection->id;
  auto description = std::exchange(peer.arriving, {});
  want_path(peer);
  for (auto& job : jobs_)  // one that nobody looked at yet is out of date
    if (job.what == CarriedJob::What::kMeet && job.connection == id) {
      job.description = std::move(description);
      return true;
    }
  jobs_.push_back({CarriedJob::What::kMeet, id, std::move(description), nullptr});
  changed_.notify_all();
  return true;
}

void CarriedEndpoint::describe_to(const Peer& peer) {
  const uint64_t total = description_.size();
  for (uint64_t at = 0; at < total; at += kMostInPiece)
    peer.connection->queue_note(note_of({Kind::kDescription, total, at, description_.substr(at, kMostInPiece)}));
}

void CarriedEndpoint::show_way(const Peer& peer) {
  const auto& why = peer.not_from_there.empty() ? peer.not_from_here : peer.not_from_there;
  set_way(*peer.connection, why.empty() ? name_ : "stream", why);
}

// A path of this connection; `mutex_` is let go meanwhile.
void CarriedEndpoint::begin(uint64_t id, std::unique_lock<std::mutex>& lock) {
  const auto found = peers_.find(id);
  if (found == peers_.end() || found->second.end || description_.empty()) return;
  auto& peer = found->second;
  const auto connection = peer.connection;
  peer.end = std::make_shared<WireEnd>(slots_);
  auto wire = std::make_unique<CarriedWire>(*connection, *this, slots_, peer.end);
  describe_to(peer);
  lock.unlock();
  attach(std::make_shared<PathChannel>(connection, *this, std::move(wire), kOnlyPath));
  lock.lock();
}

std::optional<CarriedJob> CarriedEndpoint::next_job(double timeout_s) {
  if (!(timeout_s >= 0) || timeout_s > kMaxTimeoutS)
    throw std::invalid_argument("timeout_s is " + std::to_string(timeout_s) + ", allowed: 0 to a week");
  const auto until = std::chrono::steady_clock::now() + std::chrono::nanoseconds(static_cast<int64_t>(timeout_s * 1e9));
  std::unique_lock lock(mutex_);
  while (true) {
    while (!wanting_.empty() && !ended_) {
      const uint64_t id = wanting_.front();
      wanting_.pop_front();
      begin(id, lock);
    }
    if (!jobs_.empty()) {
      auto job = std::move(jobs_.front());
      jobs_.pop_front();
      return job;
    }
    if (ended_ || changed_.wait_until(lock, until) == std::cv_status::timeout) return std::nullopt;
  }
}

void CarriedEndpoint::met(uint64_t id, const std::string& why) {
  std::lock_guard lock(mutex_);
  const auto found = peers_.find(id);
  if (found == peers_.end()) return;
  auto& peer = found->second;
  peer.not_from_there = why;
  show_way(peer);
  if (why.empty())
    peer.connection->queue_note(note_of({Kind::kAble, slots_.bytes()}));
  else
    peer.connection->queue_note(note_of({Kind::kUnable, 0, 0, why.substr(0, kMostWhy)}));
}

void CarriedEndpoint::submit(const std::shared_ptr<CarriedRead>& read, const std::shared_ptr<WireEnd>& from) {
  std::lock_guard lock(mutex_);
  read->number = next_number_++;
  reading_[read->number] = {read, from};
  jobs_.push_back({CarriedJob::What::kRead, read->connection, {}, read});
  changed_.notify_all();
}

void CarriedEndpoint::read_ended(uint64_t number, bool failed) {
  Reading reading;
  {
    std::lock_guard lock(mutex_);
    const auto found = reading_.find(number);
    if (found == reading_.end())
      throw std::invalid_argument("number is " + std::to_string(number) + ", and no such read is under way");
    reading = std::move(found->second);
    reading_.erase(found);
  }
  reading.from->ended(*reading.read, failed);
}

void CarriedEndpoint::forgotten(uint64_t connection) {
  TcpEndpoint::forgotten(connection);
  std::lock_guard lock(mutex_);
  if (peers_.erase(connection) == 0 || ended_) return;
  jobs_.push_back({CarriedJob::What::kForget, connection, {}, nullptr});
  changed_.notify_all();
}

void CarriedEndpoint::path_ended(const PathChannel& channel, Flights, const Results&) {
  // It ends with its connection, or its peer broke the protocol. What was under way ends with the connection.
  if (!channel.why().empty()) doom(channel.connection, Status::kProtocolError, channel.why());
}

}  // namespace sage_kvt
