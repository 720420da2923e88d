// SPDX-License-Identifier: Apache-2.0
// What a prefill on offer has so far: its block tables, and how many of their pages are final in each layer.
//
// Memory model: one table of page ids a group and one counter a layer. Any thread may change them; the engine's own
// does, once a step for the tables and once a layer for the counters. Nothing but a short lock is taken, and no
// interpreter is needed.
//
// Life: tables grow while prefill computes -> `advance` says what is final -> who waits for it is woken -> `end` says
// how many pages there will be. A table's entries never change once they were final.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "paged/page_layout.h"

namespace sage_kvt {

// Somebody who is told that more became final.
class Waiter {
 public:
  virtual ~Waiter() = default;
  // Any thread, with the tables' list of waiters locked: must not call back. `pushes`: so many times the caller's
  // own thread may still send a chunk, where that is cheap.
  virtual void wake(int* pushes) = 0;
  // It needs no more.
  virtual bool ended() const = 0;
};

// How many chunks the engine's own thread sends at the end of a layer, or of a step: that costs it as much as to wake a
// lane, which would take its core as well.
constexpr int kPushes = 1;

class PageTables {
 public:
  // `layers`: how many each group has.
  explicit PageTables(const std::vector<size_t>& layers);

  // -- the engine's side; std::invalid_argument names a group or layer that is not there

  // The whole table of a group: `kNullPage` where the engine keeps no memory.
  void set_pages(size_t group, const int64_t* ids, size_t count);
  void append(size_t group, const int64_t* ids, size_t count);
  // The first `pages` pages of these layers hold their final bytes. Never goes back. `pushes` as in `Waiter::wake`.
  void advance(size_t group, size_t first_layer, size_t layers, uint64_t pages, int* pushes);
  void advance_all(const std::vector<uint64_t>& pages, int* pushes);
  // The request has so many pages in each group, once they are final.
  void end(const std::vector<uint64_t>& pages);

  // -- who serves it

  uint64_t final_pages(size_t group, size_t layer) const { return finals_[group][layer].load(); }
  // Of the group, unless that is not known yet.
  std::optional<uint64_t> last(size_t group) const;
  size_t length(size_t group) const;
  // Ids at places [first, end) of a table, as far as it has them.
  std::vector<int64_t> page_ids(size_t group, uint64_t first, uint64_t end) const;
  void attach(const std::shared_ptr<Waiter>& waiter);
  size_t groups() const { return finals_.size(); }
  size_t layers(size_t group) const { return layers_[group]; }

 private:
  void check(size_t group, size_t first_layer, size_t layers) const;
  void raise_to(size_t group, size_t layer, uint64_t pages);
  void wake(int* pushes);

  const std::vector<size_t> layers_;
  std::vector<std::unique_ptr<std::atomic<uint64_t>[]>> finals_;
  // Taken before a connection's lock.
  std::mutex waiters_mutex_;
  std::vector<std::weak_ptr<Waiter>> waiters_;
  // Taken last of all.
  mutable std::mutex mutex_;
  std::vector<std::vector<int64_t>> tables_;
  std::optional<std::vector<uint64_t>> last_;
};

// What one step of the engine makes final, for all prefills on offer that it computes.
//
// The thread that calls launches the model's next layer: it sends a chunk itself where that is cheap (`Channel::push`),
// wakes the lanes for all others, and does no more.
class Step {
 public:
  // `pages`: of each group, final when the step ran.
  void add(std::shared_ptr<PageTables> tables, std::vector<uint64_t> pages);
  void layer(size_t group, size_t layer);
  void all();

 private:
  struct Progress {
    std::shared_ptr<PageTables> tables;
    std::vector<uint64_t> pages;
  };
  std::vector<Progress> progress_;
};

}  // namespace sage_kvt
