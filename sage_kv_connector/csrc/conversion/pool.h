// SPDX-License-Identifier: Apache-2.0
// Threads that convert spans in the background, so that conversion, wire and scatter overlap.
//
// A job runs on one thread; jobs and tasks start in order of submission. A job ends in exactly one
// CONVERTED event (id = job, length = wire bytes), whatever happens; a task says itself what it did.
// Threads sleep while there is nothing to do. Whoever makes a pool closes it: tasks hold shares of what
// holds a share of it, and the last of those may end on a thread of its own.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <unordered_set>
#include <vector>

#include "conversion/paged_converter.h"
#include "event.h"

namespace sage_kvt {

enum class Work { kEncode, kDecode };

// Nanoseconds that threads spent converting, and the wire bytes that they wrote or read.
struct Converted {
  uint64_t busy_ns = 0, wire_bytes = 0;
};

class ConversionPool {
 public:
  // `stepped`: it has none, `step` runs what waits, one at a time.
  explicit ConversionPool(int threads, bool stepped = false);
  ~ConversionPool();
  ConversionPool(const ConversionPool&) = delete;
  ConversionPool& operator=(const ConversionPool&) = delete;

  // `wire` and `converter` must stay valid until the job's event, or until `cancel` returned. Throws
  // std::invalid_argument for a span outside the group or a wire length that is not the span's.
  uint64_t encode(const PagedConverter* converter, Span span, uint64_t wire, uint64_t wire_length);
  uint64_t decode(const PagedConverter* converter, Span span, uint64_t wire, uint64_t wire_length);
  // After this returns the job touches no memory any more; one that had not begun ends as cancelled.
  void cancel(uint64_t job);
  // `task` returns the wire bytes that it converted. False once the pool is closed: it won't run.
  bool submit(Work work, std::function<uint64_t()> task);
  int threads() const { return wanted_; }
  // Runs the next job or task here; false if none waits.
  bool step();
  bool idle() const;
  // For events in its queue that no job has.
  uint64_t new_id() { return next_++; }
  CompletionQueue& completions() { return completions_; }
  Converted converted(Work work) const;
  void close();

 private:
  struct Job {
    uint64_t id;  // 0 for a task
    Work work;
    std::function<uint64_t()> run;
  };
  uint64_t submit(Work work, const PagedConverter* converter, Span span, uint64_t wire, uint64_t wire_length);
  void run();
  void run_next(std::unique_lock<std::mutex>& lock);

  const int wanted_;
  mutable std::mutex mutex_;
  std::condition_variable work_, ended_;
  std::deque<Job> waiting_;
  std::unordered_set<uint64_t> running_;
  CompletionQueue completions_;
  std::vector<std::thread> threads_;
  std::atomic<uint64_t> next_{1};
  Converted converted_[2];
  bool closing_ = false;
};

}  // namespace sage_kvt
