// SPDX-License-Identifier: Apache-2.0
// Prefill's side of a converting transfer: parts are encoded as their pages become final, and sent by the lanes.
#pragma once

#include <deque>

#include "endpoint.h"
#include "paged/page_tables.h"
#include "parts/part_stream.h"
#include "post.h"

namespace sage_kvt {

// What a consumer may ask for behind the end of a prompt.
struct PromptEnd {
  int64_t tokens = 0;                   // of the consumer's prompt, 0 if it does not say
  std::optional<int64_t> padding_page;  // stands for pages behind the last one; without one they are refused
};

class PartEncoder : public PartStream, public Waiter {
 public:
  PartEncoder(std::shared_ptr<ConversionPool> pool, std::vector<Part> parts, PartTerms terms,
              std::shared_ptr<PageTables> tables, PromptEnd end);

  // -- the control thread's

  // It is told (kPartsReady) once pages of one of the first parts are final, or can't be had (its status).
  static void attach(const std::shared_ptr<PartEncoder>& encoder) { encoder->tables_->attach(encoder); }
  // The consumer has room for the first `parts` parts.
  void grant(uint64_t parts);
  // From now on parts are encoded into `ring`, and sent by the lanes; returns the post. Once. As `Endpoint::post`.
  uint64_t start(const PartRing& ring, Endpoint& endpoint, uint64_t connection, const WindowDescriptor& target,
                 const PostOptions& how);

  // -- the tables'

  void wake(int* pushes) override;
  bool ended() const override { return closed_ || post_ended_; }

  // -- the post's, with its connection's mutex held

  Chunk cut(uint64_t max_bytes);
  bool all_cut() const;
  bool waits() const;
  void sent(uint64_t offset, uint64_t length);
  void post_ended() { post_ended_ = true; }
  // Why nothing more can be cut.
  std::pair<Status, std::string> refusal() const;

 private:
  enum class State : uint8_t { kOpen, kBegun, kSent };
  enum class Pages { kWait, kFinal, kRefused };
  bool startable() const override { return next().has_value(); }
  Work work() const override { return Work::kEncode; }
  std::optional<PartWork> take() override;
  void converted(size_t part) override;
  void fail(Status status, std::string why) override;
  void convert(const PagedConverter& converter, const PartWork& work) const override;
  void tell() override;

  // The first part that can begin or is to be refused; none before `start`.
  std::optional<size_t> next() const;
  // Whether a part's pages are final; `ids` where they are asked for; `status` and `why` where they can't be had.
  Pages look(const Part& part, std::vector<int64_t>* ids, Status* status, std::string* why) const;

  const std::shared_ptr<PageTables> tables_;
  const PromptEnd end_;
  std::atomic<bool> post_ended_{false};
  // Guarded by `mutex_`.
  bool told_ready_ = false, changed_ = false;
  uint64_t granted_ = 0;
  std::vector<State> states_;
  std::vector<uint64_t> unsent_;  // bytes by part
  size_t first_open_ = 0;         // every part before it has begun
  std::deque<size_t> encoded_;
  uint64_t within_ = 0, cut_ = 0;  // bytes of the first encoded part, and of all, that were cut
  Status status_ = Status::kOk;
  std::string why_;
  std::weak_ptr<Connection> connection_;
  std::weak_ptr<Post> post_;
};

}  // namespace sage_kvt
