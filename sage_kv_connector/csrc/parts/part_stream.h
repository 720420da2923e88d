// SPDX-License-Identifier: Apache-2.0
// A converting transfer on one side: parts that are converted in the background, between pages and staging memory.
//
// A transfer is cut into parts (engine/conversion/part_plan.py); both sides cut it alike. Their wire bytes, one after
// the other, are the transfer's linear space. A part waits in a slot of staging memory, part p in slot p % slots.
//
// Life on prefill: encoder over (parts, tables) -> kPartsReady when a part's pages are final -> `start` with staging
// memory, and a post -> each part is encoded when it is granted, final, and its slot free; lanes send it -> SENT.
// Life on decode: decoder over (parts, pages) -> a window over its space -> each part is decoded when it landed ->
// lanes tell the producer when half of the slots are free again -> kPartsDone.
//
// Threads: the pool's convert, lanes send and land, the control thread grants and closes. Python hears of what is
// above.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "conversion/pool.h"

namespace sage_kvt {

// Some layers of some tokens of a group, `nbytes` of wire from `offset` of the transfer's space on.
struct Part {
  size_t group;
  int64_t first_layer, layers;
  int64_t first_token, tokens;
  uint64_t nbytes, offset;
};

// What all parts of a transfer have in common.
struct PartTerms {
  int64_t first_head, heads;        // of this worker
  std::vector<int64_t> page_sizes;  // tokens, by group
  // By group; empty where Python converts (pages on a device): it is asked by kPartToConvert, and answers.
  std::vector<std::shared_ptr<const PagedConverter>> converters;
};

// Staging memory of one transfer.
struct PartRing {
  uint64_t address = 0, slot_bytes = 0;
  size_t slots = 0;
};

// One part under way.
struct PartWork {
  size_t part;
  Span span;
  uint64_t wire;
};

class PartStream : public std::enable_shared_from_this<PartStream> {
 public:
  // Throws std::invalid_argument for no parts, and for one that is empty or of an unknown group.
  PartStream(std::shared_ptr<ConversionPool> pool, std::vector<Part> parts, PartTerms terms);
  virtual ~PartStream() = default;
  PartStream(const PartStream&) = delete;
  PartStream& operator=(const PartStream&) = delete;

  const uint64_t id;  // of its events, in the pool's queue
  size_t count() const { return parts_.size(); }
  uint64_t size() const { return size_; }
  // Of the largest part.
  uint64_t largest() const { return largest_; }
  const Part& part(size_t number) const { return parts_[number]; }
  // A part that Python is to convert. Throws std::invalid_argument if it is not asked for that.
  PartWork asked(size_t part);
  // It did; `why`: it could not.
  void answered(size_t part, const std::string& why);
  // After this returns no page and no staging memory is touched, and no event follows. Idempotent.
  void close();

 protected:
  // Throws std::invalid_argument for a ring that has no slots, or slots too small.
  void check(const PartRing& ring) const;
  size_t part_at(uint64_t offset) const;
  uint64_t slot_of(size_t part) const { return ring_.address + part % ring_.slots * ring_.slot_bytes; }
  // With `mutex_` held.
  void schedule();
  void emit(EventKind kind, uint64_t offset, uint64_t length, Status status = Status::kOk, std::string detail = "",
            uint64_t began_ns = 0);
  Span span_of(const Part& part, std::vector<int64_t> pages) const;

  // What a side does, with `mutex_` held: whether there is a part to convert (or to give up); which; it is; it can't
  // be.
  virtual bool startable() const = 0;
  virtual Work work() const = 0;
  virtual std::optional<PartWork> take() = 0;
  virtual void converted(size_t part) = 0;
  virtual void fail(Status status, std::string why) = 0;
  // Without it: the conversion, and what lanes are to know of afterwards.
  virtual void convert(const PagedConverter& converter, const PartWork& work) const = 0;
  virtual void tell() {}

  const std::shared_ptr<ConversionPool> pool_;
  const PartTerms terms_;
  // Taken after a connection's lock, and before the pool's and the tables'.
  mutable std::mutex mutex_;
  std::vector<Part> parts_;
  PartRing ring_;
  std::atomic<bool> closed_{false};

 private:
  uint64_t run();

  uint64_t size_ = 0, largest_ = 0;
  int tasks_ = 0;       // in the pool, waiting or running
  int converting_ = 0;  // of them, converting
  std::unordered_map<size_t, PartWork> asked_;
  std::condition_variable idle_;
};

}  // namespace sage_kvt
