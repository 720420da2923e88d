// SPDX-License-Identifier: Apache-2.0
#include "conversion/pool.h"

#include <pthread.h>

#include <algorithm>
#include <stdexcept>

namespace sage_kvt {

ConversionPool::ConversionPool(int threads) {
  if (threads < 1 || threads > 64)
    throw std::invalid_argument("threads is " + std::to_string(threads) + ", allowed: 1 to 64");
  for (int i = 0; i < threads; ++i) {
    threads_.emplace_back([this] { run(); });
    pthread_setname_np(threads_.back().native_handle(), "sage-kvt-conv");
  }
}

ConversionPool::~ConversionPool() { close(); }

uint64_t ConversionPool::encode(const PagedConverter* converter, Span span, uint64_t wire, uint64_t wire_length) {
  return submit(true, converter, std::move(span), wire, wire_length);
}

uint64_t ConversionPool::decode(const PagedConverter* converter, Span span, uint64_t wire, uint64_t wire_length) {
  return submit(false, converter, std::move(span), wire, wire_length);
}

uint64_t ConversionPool::submit(bool encode, const PagedConverter* converter, Span span, uint64_t wire,
                                uint64_t wire_length) {
  converter->check(span);
  const size_t length = converter->wire_bytes(span);
  if (wire_length != length)
    throw std::invalid_argument("wire_length is " + std::to_string(wire_length) + ", the span has " +
                                std::to_string(length));
  std::lock_guard lock(mutex_);
  if (closing_) throw std::invalid_argument("the conversion pool is closed");
  const uint64_t id = next_++;
  waiting_.push_back({id, encode, converter, std::move(span), reinterpret_cast<uint8_t*>(wire), length});
  work_.notify_one();
  return id;
}

void ConversionPool::cancel(uint64_t job) {
  std::unique_lock lock(mutex_);
  const auto found = std::find_if(waiting_.begin(), waiting_.end(), [&](const Job& j) { return j.id == job; });
  if (found != waiting_.end()) {
    waiting_.erase(found);
    Event event;
    event.kind = EventKind::kConverted;
    event.id = job;
    event.status = Status::kCancelled;
    completions_.push(std::move(event));
    return;
  }
  ended_.wait(lock, [&] { return !running_.contains(job); });
}

uint64_t ConversionPool::busy_ns() const {
  std::lock_guard lock(mutex_);
  return busy_ns_;
}

uint64_t ConversionPool::wire_bytes() const {
  std::lock_guard lock(mutex_);
  return wire_bytes_;
}

void ConversionPool::close() {
  {
    std::lock_guard lock(mutex_);
    if (closing_) return;
    closing_ = true;
    waiting_.clear();
    work_.notify_all();
  }
  for (auto& thread : threads_) thread.join();
  completions_.close();
}

void ConversionPool::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    work_.wait(lock, [&] { return closing_ || !waiting_.empty(); });
    if (closing_) return;
    Job job = std::move(waiting_.front());
    waiting_.pop_front();
    running_.insert(job.id);
    lock.unlock();
    const uint64_t begun = now_ns();
    if (job.encode)
      job.converter->encode(job.span, job.wire);
    else
      job.converter->decode(job.span, job.wire);
    const uint64_t spent = now_ns() - begun;
    lock.lock();
    busy_ns_ += spent;
    wire_bytes_ += job.length;
    running_.erase(job.id);
    ended_.notify_all();
    Event event;
    event.kind = EventKind::kConverted;
    event.id = job.id;
    event.length = job.length;
    completions_.push(std::move(event));
  }
}

}  // namespace sage_kvt
