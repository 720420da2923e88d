// SPDX-License-Identifier: Apache-2.0
#include "parts/part_encoder.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace sage_kvt {
namespace {

// Parts that are looked at before the first is sent.
constexpr size_t kLookedAt = 8;

// Cut from what an encoder has.
struct PartPost : Post {
  explicit PartPost(std::shared_ptr<PartEncoder> of) : encoder(std::move(of)) { total = encoder->size(); }
  bool all_cut() const override { return encoder->all_cut(); }
  bool waits() const override { return encoder->waits(); }
  bool needs_acks() const override { return true; }  // to have its slots back
  Chunk cut(uint64_t max_bytes, size_t) override {
    Chunk chunk = encoder->cut(max_bytes);
    if (status == Status::kOk) std::tie(status, detail) = encoder->refusal();
    return chunk;
  }
  void granted(uint64_t parts) override { encoder->grant(parts); }
  void sent(uint64_t offset, uint64_t length) override { encoder->sent(offset, length); }
  void finished() override { encoder->post_ended(); }

  const std::shared_ptr<PartEncoder> encoder;
};

}  // namespace

PartEncoder::PartEncoder(std::shared_ptr<ConversionPool> pool, std::vector<Part> parts, PartTerms terms,
                         std::shared_ptr<PageTables> tables, PromptEnd end)
    : PartStream(std::move(pool), std::move(parts), std::move(terms)),
      tables_(std::move(tables)),
      end_(end),
      states_(count(), State::kOpen) {
  for (const auto& part : parts_) {
    if (part.group >= tables_->groups() ||
        static_cast<size_t>(part.first_layer + part.layers) > tables_->layers(part.group))
      throw std::invalid_argument("the tables have no layers " + std::to_string(part.first_layer) + ", +" +
                                  std::to_string(part.layers) + " of group " + std::to_string(part.group));
    unsent_.push_back(part.nbytes);
  }
}

PartEncoder::Pages PartEncoder::look(const Part& part, std::vector<int64_t>* ids, Status* status,
                                     std::string* why) const {
  const auto refused = [&](Status what, std::string text) {
    *status = what;
    *why = std::move(text);
    return Pages::kRefused;
  };
  const int64_t size = terms_.page_sizes[part.group];
  const auto first = static_cast<uint64_t>(part.first_token / size);
  const auto end = static_cast<uint64_t>((part.first_token + part.tokens + size - 1) / size);
  const auto of_group = [&] { return " of group " + std::to_string(part.group); };
  uint64_t held = end;
  if (const auto last = tables_->last(part.group)) {
    const auto tokens = static_cast<int64_t>(*last) * size;
    if (end_.tokens > tokens)
      return refused(Status::kBeyondEnd, "prefill ended with " + std::to_string(tokens) + " tokens at most, " +
                                             std::to_string(end_.tokens) + " asked for");
    if (end > *last && !end_.padding_page)
      return refused(Status::kBeyondEnd, "prefill ended with " + std::to_string(*last) + " pages" + of_group() +
                                             ", number " + std::to_string(end) + " asked for");
    held = std::min(end, *last);
  }
  for (int64_t l = part.first_layer; l < part.first_layer + part.layers; ++l)
    if (tables_->final_pages(part.group, static_cast<size_t>(l)) < held) return Pages::kWait;
  if (ids == nullptr) return Pages::kFinal;
  *ids = tables_->page_ids(part.group, first, held);
  if (const uint64_t length = tables_->length(part.group); held > length)
    return refused(Status::kOutOfBounds, "page " + std::to_string(held - 1) + of_group() + " is beyond the " +
                                             std::to_string(length) + " here");
  if (const auto null = std::find(ids->begin(), ids->end(), kNullPage); null != ids->end())
    return refused(Status::kOutOfBounds, "page " + std::to_string(first + static_cast<uint64_t>(null - ids->begin())) +
                                             of_group() + " is no longer kept here");
  ids->resize(end - first, end_.padding_page.value_or(0));
  return Pages::kFinal;
}

std::optional<size_t> PartEncoder::next() const {
  if (status_ != Status::kOk || post_ended_) return std::nullopt;
  Status status;
  std::string why;
  const size_t end = std::min<size_t>(granted_, first_open_ + ring_.slots);
  for (size_t p = first_open_; p < end; ++p) {
    if (states_[p] != State::kOpen) continue;
    if (p >= ring_.slots && states_[p - ring_.slots] != State::kSent) continue;
    if (look(parts_[p], nullptr, &status, &why) != Pages::kWait) return p;
  }
  return std::nullopt;
}

std::optional<PartWork> PartEncoder::take() {
  const auto found = next();
  if (!found) return std::nullopt;
  const size_t part = *found;
  std::vector<int64_t> ids;
  Status status = Status::kOk;
  std::string why;
  if (look(parts_[part], &ids, &status, &why) != Pages::kFinal) {
    fail(status, std::move(why));
    return std::nullopt;
  }
  states_[part] = State::kBegun;
  while (first_open_ < states_.size() && states_[first_open_] != State::kOpen) ++first_open_;
  return PartWork{part, span_of(parts_[part], std::move(ids)), slot_of(part)};
}

void PartEncoder::convert(const PagedConverter& converter, const PartWork& work) const {
  converter.encode(work.span, reinterpret_cast<uint8_t*>(work.wire));
}

void PartEncoder::converted(size_t part) {
  encoded_.push_back(part);
  changed_ = true;
}

void PartEncoder::fail(Status status, std::string why) {
  if (status_ != Status::kOk) return;
  status_ = status;
  why_ = std::move(why);
  changed_ = true;
}

void PartEncoder::tell() {
  std::shared_ptr<Connection> connection;
  std::shared_ptr<Post> post;
  {
    std::lock_guard lock(mutex_);
    if (!std::exchange(changed_, false)) return;
    connection = connection_.lock();
    post = post_.lock();
  }
  if (connection && post && connection->resume(post)) connection->kick();
}

void PartEncoder::grant(uint64_t parts) {
  std::lock_guard lock(mutex_);
  granted_ = std::max<uint64_t>(granted_, std::min<uint64_t>(parts, count()));
  schedule();
}

uint64_t PartEncoder::start(const PartRing& ring, Endpoint& endpoint, uint64_t connection,
                            const WindowDescriptor& target, const PostOptions& how) {
  check(ring);
  if (size() > target.size)
    throw std::invalid_argument("parts of " + std::to_string(size()) + " bytes leave the window of " +
                                std::to_string(target.size) + " bytes");
  auto found = endpoint.find_connection(connection);
  if (!found) throw ConnectionClosed(connection);
  auto self = std::static_pointer_cast<PartEncoder>(shared_from_this());
  auto post = std::make_shared<PartPost>(self);
  {
    std::lock_guard lock(mutex_);
    if (ring_.slots > 0) throw std::invalid_argument("the transfer is being sent already");
    connection_ = found;
    post_ = post;
  }
  const uint64_t id = endpoint.post(connection, target, post, {{ring.address, ring.slots * ring.slot_bytes}}, how);
  {
    std::lock_guard lock(mutex_);
    ring_ = ring;
    schedule();
  }
  return id;
}

void PartEncoder::wake(int*) {
  std::lock_guard lock(mutex_);
  if (ring_.slots > 0) {
    schedule();
    return;
  }
  if (told_ready_ || closed_) return;
  Status status = Status::kOk;
  std::string why;
  for (size_t p = 0; p < std::min(kLookedAt, count()) && !told_ready_; ++p)
    told_ready_ = look(parts_[p], nullptr, &status, &why) != Pages::kWait;
  if (told_ready_) emit(EventKind::kPartsReady, 0, 0, status, why);
}

Chunk PartEncoder::cut(uint64_t max_bytes) {
  std::lock_guard lock(mutex_);
  Chunk chunk;
  if (status_ != Status::kOk || encoded_.empty()) return chunk;
  const size_t number = encoded_.front();
  const Part& part = parts_[number];
  chunk.offset = part.offset + within_;
  chunk.length = std::min(max_bytes, part.nbytes - within_);
  chunk.pieces.push_back({reinterpret_cast<void*>(slot_of(number) + within_), chunk.length});
  within_ += chunk.length;
  cut_ += chunk.length;
  if (within_ == part.nbytes) {
    encoded_.pop_front();
    within_ = 0;
  }
  return chunk;
}

bool PartEncoder::all_cut() const {
  std::lock_guard lock(mutex_);
  return cut_ == size();
}

bool PartEncoder::waits() const {
  std::lock_guard lock(mutex_);
  return encoded_.empty() && cut_ < size();
}

void PartEncoder::sent(uint64_t offset, uint64_t length) {
  std::lock_guard lock(mutex_);
  const size_t part = part_at(offset);
  unsent_[part] -= length;
  if (unsent_[part] > 0) return;
  states_[part] = State::kSent;
  schedule();
}

std::pair<Status, std::string> PartEncoder::refusal() const {
  std::lock_guard lock(mutex_);
  return {status_, why_};
}

}  // namespace sage_kvt
