// SPDX-License-Identifier: Apache-2.0
#include "parts/part_stream.h"

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <utility>

namespace sage_kvt {

PartStream::PartStream(std::shared_ptr<ConversionPool> pool, std::vector<Part> parts, PartTerms terms)
    : id(pool->new_id()), pool_(std::move(pool)), terms_(std::move(terms)), parts_(std::move(parts)) {
  if (parts_.empty()) throw std::invalid_argument("a converting transfer needs at least one part");
  const auto& converters = terms_.converters;
  for (auto& part : parts_) {
    const auto of_part = [&] { return "part " + std::to_string(&part - parts_.data()); };
    if (part.nbytes == 0 || part.tokens < 1 || part.layers < 1 || part.first_token < 0 || part.first_layer < 0)
      throw std::invalid_argument(of_part() + " is empty, or begins below 0");
    if (part.group >= terms_.page_sizes.size())
      throw std::invalid_argument(of_part() + " is of group " + std::to_string(part.group) + ", there are " +
                                  std::to_string(terms_.page_sizes.size()));
    if (!converters.empty() && !converters.at(part.group))
      throw std::invalid_argument(of_part() + " is of group " + std::to_string(part.group) +
                                  ", which has no converter");
    part.offset = size_;
    size_ += part.nbytes;
    largest_ = std::max(largest_, part.nbytes);
  }
}

void PartStream::check(const PartRing& ring) const {
  if (ring.slots == 0 || ring.slot_bytes < largest_)
    throw std::invalid_argument("staging memory of " + std::to_string(ring.slots) + " slots of " +
                                std::to_string(ring.slot_bytes) + " bytes, a part has up to " +
                                std::to_string(largest_));
}

size_t PartStream::part_at(uint64_t offset) const {
  const auto behind = std::upper_bound(parts_.begin(), parts_.end(), offset,
                                       [](uint64_t at, const Part& part) { return at < part.offset; });
  return static_cast<size_t>(behind - parts_.begin()) - 1;
}

Span PartStream::span_of(const Part& part, std::vector<int64_t> pages) const {
  return {part.first_layer, part.layers, terms_.first_head, terms_.heads,
          part.first_token, part.tokens, std::move(pages)};
}

void PartStream::emit(EventKind kind, uint64_t offset, uint64_t length, Status status, std::string detail,
                      uint64_t began_ns) {
  Event event;
  event.kind = kind;
  event.id = id;
  event.offset = offset;
  event.length = length;
  event.status = status;
  event.detail = std::move(detail);
  event.began_ns = began_ns;
  pool_->completions().push(std::move(event));
}

void PartStream::schedule() {
  if (closed_ || tasks_ >= pool_->threads() || !startable()) return;
  if (pool_->submit(work(), [self = shared_from_this()] { return self->run(); })) ++tasks_;
}

// One part; then the others in the pool have their turn.
uint64_t PartStream::run() {
  std::unique_lock lock(mutex_);
  const auto work = closed_ ? std::nullopt : take();
  uint64_t done = 0;
  if (work && terms_.converters.empty()) {
    asked_[work->part] = *work;
    emit(EventKind::kPartToConvert, work->part, parts_[work->part].nbytes);
  } else if (work) {
    const Part part = parts_[work->part];
    ++converting_;
    lock.unlock();
    Status status = Status::kOk;
    std::string why;
    try {
      const auto& converter = *terms_.converters[part.group];
      converter.check(work->span);
      if (const uint64_t here = converter.wire_bytes(work->span); here != part.nbytes)
        throw std::invalid_argument("a part has " + std::to_string(part.nbytes) + " bytes, its span " +
                                    std::to_string(here));
      convert(converter, *work);
    } catch (const std::exception& error) {
      status = Status::kOutOfBounds;
      why = error.what();
    }
    lock.lock();
    --converting_;
    idle_.notify_all();
    done = part.nbytes;
    if (!closed_ && status == Status::kOk) converted(work->part);
    if (!closed_ && status != Status::kOk) fail(status, why);
  }
  --tasks_;
  schedule();
  const bool closed = closed_;
  lock.unlock();
  if (!closed) tell();
  return done;
}

PartWork PartStream::asked(size_t part) {
  std::lock_guard lock(mutex_);
  const auto found = asked_.find(part);
  if (found == asked_.end())
    throw std::invalid_argument("part " + std::to_string(part) + " is not to be converted now");
  return found->second;
}

void PartStream::answered(size_t part, const std::string& why) {
  {
    std::lock_guard lock(mutex_);
    if (closed_ || asked_.erase(part) == 0) return;
    if (why.empty())
      converted(part);
    else
      fail(Status::kNotConverted, why);
    schedule();
  }
  tell();
}

void PartStream::close() {
  std::unique_lock lock(mutex_);
  closed_ = true;
  asked_.clear();
  idle_.wait(lock, [this] { return converting_ == 0; });
}

}  // namespace sage_kvt
