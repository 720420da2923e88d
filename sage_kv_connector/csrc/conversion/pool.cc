// SPDX-License-Identifier: Apache-2.0
#include "conversion/pool.h"

#include <pthread.h>

#include <algorithm>
#include <stdexcept>

namespace sage_kvt {

ConversionPool::ConversionPool(int threads, bool stepped) : wanted_(threads) {
  if (threads < 1 || threads > 64)
    throw std::invalid_argument("threads is " + std::to_string(threads) + ", allowed: 1 to 64");
  for (int i = 0; i < threads && !stepped; ++i) {
    threads_.emplace_back([this] { run(); });
    pthread_setname_np(threads_.back().native_handle(), "sage-kvt-conv");
  }
}

ConversionPool::~ConversionPool() { close(); }

uint64_t ConversionPool::encode(const PagedConverter* converter, Span span, uint64_t wire, uint64_t wire_length) {
  return submit(Work::kEncode, converter, std::move(span), wire, wire_length);
}

uint64_t ConversionPool::decode(const PagedConverter* converter, Span span, uint64_t wire, uint64_t wire_length) {
  return submit(Work::kDecode, converter, std::move(span), wire, wire_length);
}

uint64_t ConversionPool::submit(Work work, const PagedConverter* converter, Span span, uint64_t wire,
                                uint64_t wire_length) {
  converter->check(span);
  const size_t length = converter->wire_bytes(span);
  if (wire_length != length)
    throw std::invalid_argument("wire_length is " + std::to_string(wire_length) + ", the span has " +
                                std::to_string(length));
  auto* at = reinterpret_cast<uint8_t*>(wire);
  std::lock_guard lock(mutex_);
  if (closing_) throw std::invalid_argument("the conversion pool is closed");
  const uint64_t id = next_++;
  waiting_.push_back({id, work, [=, span = std::move(span)] {
                        if (work == Work::kEncode)
                          converter->encode(span, at);
                        else
                          converter->decode(span, at);
                        return length;
                      }});
  work_.notify_one();
  return id;
}

bool ConversionPool::submit(Work work, std::function<uint64_t()> task) {
  std::lock_guard lock(mutex_);
  if (closing_) return false;
  waiting_.push_back({0, work, std::move(task)});
  work_.notify_one();
  return true;
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

Converted ConversionPool::converted(Work work) const {
  std::lock_guard lock(mutex_);
  return converted_[static_cast<size_t>(work)];
}

void ConversionPool::close() {
  std::deque<Job> dropped;  // destroyed after the lock
  {
    std::lock_guard lock(mutex_);
    if (closing_) return;
    closing_ = true;
    dropped.swap(waiting_);
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
    run_next(lock);
  }
}

bool ConversionPool::step() {
  std::unique_lock lock(mutex_);
  if (closing_ || waiting_.empty()) return false;
  run_next(lock);
  return true;
}

bool ConversionPool::idle() const {
  std::lock_guard lock(mutex_);
  return waiting_.empty();
}

void ConversionPool::run_next(std::unique_lock<std::mutex>& lock) {
  Job job = std::move(waiting_.front());
  waiting_.pop_front();
  if (job.id != 0) running_.insert(job.id);
  lock.unlock();
  const uint64_t begun = now_ns();
  const uint64_t length = job.run();
  const uint64_t spent = now_ns() - begun;
  job.run = nullptr;  // what it holds ends without the lock
  lock.lock();
  auto& converted = converted_[static_cast<size_t>(job.work)];
  converted.busy_ns += length > 0 ? spent : 0;
  converted.wire_bytes += length;
  if (job.id == 0) return;
  running_.erase(job.id);
  ended_.notify_all();
  Event event;
  event.kind = EventKind::kConverted;
  event.id = job.id;
  event.length = length;
  completions_.push(std::move(event));
}

}  // namespace sage_kvt
