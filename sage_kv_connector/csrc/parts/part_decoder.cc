// SPDX-License-Identifier: Apache-2.0
#include "parts/part_decoder.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace sage_kvt {

PartDecoder::PartDecoder(std::shared_ptr<ConversionPool> pool, std::vector<Part> parts, PartTerms terms,
                         std::vector<TargetPages> pages)
    : PartStream(std::move(pool), std::move(parts), std::move(terms)),
      pages_(std::move(pages)),
      decoded_(count()),
      to_land_(count()) {
  for (const auto& part : parts_) {
    missing_.push_back(part.nbytes);
    const int64_t size = terms_.page_sizes[part.group];
    const int64_t end = (part.first_token + part.tokens + size - 1) / size;
    const auto known = part.group < pages_.size() ? static_cast<int64_t>(pages_[part.group].ids.size()) : 0;
    if (known == 0 || part.first_token / size < pages_[part.group].first || end > pages_[part.group].first + known)
      throw std::invalid_argument("tokens " + std::to_string(part.first_token) + ", +" + std::to_string(part.tokens) +
                                  " of group " + std::to_string(part.group) + " have no pages here");
  }
}

uint64_t PartDecoder::start(const PartRing& ring, Endpoint& endpoint, uint64_t connection, uint64_t generation) {
  check(ring);
  {
    std::lock_guard lock(mutex_);
    if (ring_.slots > 0) throw std::invalid_argument("the transfer is being received already");
    ring_ = ring;
    granted_ = std::min(ring.slots, count());
    connection_ = endpoint.find_connection(connection);
  }
  auto space = std::make_unique<PartSpace>(std::static_pointer_cast<PartDecoder>(shared_from_this()));
  const uint64_t window = endpoint.open_window(connection, std::move(space),
                                               {{ring.address, ring.slots * ring.slot_bytes}}, generation, false);
  std::lock_guard lock(mutex_);
  return window_ = window;
}

uint64_t PartDecoder::granted() const {
  std::lock_guard lock(mutex_);
  return granted_;
}

bool PartDecoder::admits(uint64_t offset, uint64_t length) const {
  std::lock_guard lock(mutex_);
  if (first_ns_ == 0) first_ns_ = now_ns();
  return !closed_ && part_at(offset + length - 1) < granted_;
}

uint64_t PartDecoder::pieces(uint64_t offset, uint64_t length, size_t max, std::vector<iovec>* out) const {
  uint64_t covered = 0;
  for (size_t p = part_at(offset); covered < length; ++p) {
    const uint64_t within = offset + covered - parts_[p].offset;
    const uint64_t n = std::min(parts_[p].nbytes - within, length - covered);
    if (!add_piece(slot_of(p) + within, n, max, out)) break;
    covered += n;
  }
  return covered;
}

void PartDecoder::landed(uint64_t offset, uint64_t length) {
  std::lock_guard lock(mutex_);
  for (size_t p = part_at(offset); length > 0; ++p) {
    const uint64_t n = std::min(parts_[p].offset + parts_[p].nbytes - offset, length);
    offset += n;
    length -= n;
    missing_[p] -= n;
    if (missing_[p] > 0) continue;
    landed_.push_back(p);
    if (--to_land_ == 0) last_ns_ = now_ns();
  }
  schedule();
}

std::optional<PartWork> PartDecoder::take() {
  if (landed_.empty()) return std::nullopt;
  const size_t number = landed_.front();
  landed_.pop_front();
  const Part& part = parts_[number];
  const auto& pages = pages_[part.group];
  const int64_t size = terms_.page_sizes[part.group];
  const int64_t first = part.first_token / size - pages.first;
  const int64_t end = (part.first_token + part.tokens + size - 1) / size - pages.first;
  std::vector<int64_t> ids(pages.ids.begin() + first, pages.ids.begin() + end);
  return PartWork{number, span_of(part, std::move(ids)), slot_of(number)};
}

void PartDecoder::convert(const PagedConverter& converter, const PartWork& work) const {
  converter.decode(work.span, reinterpret_cast<const uint8_t*>(work.wire));
}

void PartDecoder::converted(size_t part) {
  decoded_[part] = true;
  while (first_open_ < count() && decoded_[first_open_]) ++first_open_;
  if (first_open_ == count()) {
    emit(EventKind::kPartsDone, last_ns_, size(), Status::kOk, "", first_ns_);
    return;
  }
  // Told for half of the slots at once, so that the producer never waits and is seldom told.
  const uint64_t room = std::min<uint64_t>(first_open_ + ring_.slots, count());
  const uint64_t more = room - granted_;
  if (more == 0 || (more < (ring_.slots + 1) / 2 && room < count())) return;
  granted_ = room;
  to_tell_ = true;
}

void PartDecoder::tell() {
  std::shared_ptr<Connection> connection;
  Grant grant;
  {
    std::lock_guard lock(mutex_);
    if (!std::exchange(to_tell_, false)) return;
    connection = connection_.lock();
    grant = {window_, granted_};
  }
  if (!connection) return;
  connection->queue_grant(grant);
  connection->kick();
}

void PartDecoder::fail(Status status, std::string why) { emit(EventKind::kPartsDone, 0, 0, status, std::move(why)); }

}  // namespace sage_kvt
