// SPDX-License-Identifier: Apache-2.0
// Decode's side of a converting transfer: a window over slots of staging memory, each decoded into pages as it is full.
#pragma once

#include <deque>

#include "endpoint.h"
#include "parts/part_stream.h"
#include "space.h"

namespace sage_kvt {

// Pages of a group to fill: `ids[i]` holds page `first + i` of the request.
struct TargetPages {
  int64_t first = 0;
  std::vector<int64_t> ids;
};

class PartDecoder : public PartStream {
 public:
  // `pages`: by group. Throws std::invalid_argument for a part whose pages are not among them.
  PartDecoder(std::shared_ptr<ConversionPool> pool, std::vector<Part> parts, PartTerms terms,
              std::vector<TargetPages> pages);

  // Its slots are to be filled, by a window over its space; returns the window. Once. As `Endpoint::open_window`.
  uint64_t start(const PartRing& ring, Endpoint& endpoint, uint64_t connection, uint64_t generation);
  // The producer may send so many of the first parts. It grows as slots are free again: lanes tell the producer.
  uint64_t granted() const;

  // -- its space's

  bool admits(uint64_t offset, uint64_t length) const;
  uint64_t pieces(uint64_t offset, uint64_t length, size_t max, std::vector<iovec>* out) const;
  void landed(uint64_t offset, uint64_t length);

 private:
  bool startable() const override { return !landed_.empty(); }
  Work work() const override { return Work::kDecode; }
  std::optional<PartWork> take() override;
  void converted(size_t part) override;
  void fail(Status status, std::string why) override;
  void convert(const PagedConverter& converter, const PartWork& work) const override;
  void tell() override;

  const std::vector<TargetPages> pages_;
  // Guarded by `mutex_`.
  uint64_t granted_ = 0, window_ = 0;
  mutable uint64_t first_ns_ = 0;  // the first bytes came
  uint64_t last_ns_ = 0;           // the last ones are here
  bool to_tell_ = false;
  std::weak_ptr<Connection> connection_;
  std::vector<uint64_t> missing_;  // bytes by part
  std::vector<bool> decoded_;
  size_t to_land_;         // parts
  size_t first_open_ = 0;  // every part before it is decoded
  std::deque<size_t> landed_;
};

// What a window over a decoder is.
class PartSpace : public Space {
 public:
  explicit PartSpace(std::shared_ptr<PartDecoder> decoder) : decoder_(std::move(decoder)) {}
  uint64_t size() const override { return decoder_->size(); }
  uint64_t pieces(uint64_t offset, uint64_t length, size_t max, std::vector<iovec>* out) const override {
    return decoder_->pieces(offset, length, max, out);
  }
  bool admits(uint64_t offset, uint64_t length) const override { return decoder_->admits(offset, length); }
  void landed(uint64_t offset, uint64_t length) override { decoder_->landed(offset, length); }

 private:
  const std::shared_ptr<PartDecoder> decoder_;
};

}  // namespace sage_kvt
