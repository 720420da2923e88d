// SPDX-License-Identifier: Apache-2.0
// One subscription's way through a prefill's pages, and the post that lanes cut from it.
//
// Life of a stream: a subscription meets its offer -> a cursor over (layout, tables, selection) -> `Endpoint::post` of
// it -> lanes cut chunks of what is final, layer by layer -> it is parked when there is nothing more, and queued again
// by the engine's `advance` -> SENT when everything selected was sent, when it asks for what is not there (its
// status says why), or when it is cancelled.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "endpoint.h"
#include "paged/page_layout.h"
#include "paged/page_tables.h"
#include "post.h"

namespace sage_kvt {

// Places of a request of one group.
class PageRuns {
 public:
  // (first, count) runs. Throws std::invalid_argument unless they ascend and none is empty.
  PageRuns(size_t group, std::vector<std::pair<uint64_t, uint64_t>> runs);
  const size_t group;
  const std::vector<std::pair<uint64_t, uint64_t>> runs;
  uint64_t count() const { return before_.back(); }
  uint64_t last() const { return runs.back().first + runs.back().second - 1; }
  // How many of the places are below `end`.
  uint64_t below(uint64_t end) const;

 private:
  std::vector<uint64_t> before_;  // places before each run, and in all
};

// Stands for pages behind the end of a request: a consumer that converts to larger pages has room for more.
struct Padding {
  int64_t page;
  std::vector<uint64_t> needed;  // by group: so many pages must be the request's own
};

// Not for several threads at once. Hands each byte out once, in an order of its own, only when it is final.
class PagedCursor {
 public:
  // Throws std::invalid_argument for what the layout or the tables don't have.
  PagedCursor(std::shared_ptr<const PageLayout> layout, std::shared_ptr<PageTables> tables,
              std::vector<PageRuns> selection, std::optional<Padding> padding = std::nullopt);

  uint64_t size() const { return space_.size(); }
  // Contiguous in the space; length 0 if nothing can be cut now, or `status` says that it never can.
  Chunk cut(uint64_t max_bytes, size_t max_pieces);
  bool exhausted() const { return first_open_ == space_.spans().size(); }
  // Nothing that is final was left by the last `cut`, and more is to come.
  bool waits() const { return waits_; }
  Status status() const { return status_; }
  const std::string& why() const { return why_; }
  const std::shared_ptr<PageTables>& tables() const { return tables_; }
  const std::vector<Segment>& extents() const { return space_.layout().extents(); }

 private:
  uint64_t ready_bytes(size_t span) const;
  // The first span from `span` on of which bytes are final that were not cut.
  size_t next_ready(size_t span) const;
  bool know(size_t slot, uint64_t count);
  bool within_end();
  bool refuse(Status status, std::string why);

  const std::shared_ptr<PageTables> tables_;
  const std::vector<PageRuns> selection_;
  const std::optional<Padding> padding_;
  PagedSpace space_;
  std::vector<uint64_t> sent_;  // bytes of each span that were cut
  size_t first_open_ = 0;       // every span before it was cut completely
  bool waits_ = false;
  Status status_ = Status::kOk;
  std::string why_;
};

class PagedPost : public Post, public Waiter, public std::enable_shared_from_this<PagedPost> {
 public:
  PagedPost(std::shared_ptr<PagedCursor> cursor, const std::shared_ptr<Connection>& connection);
  bool all_cut() const override { return cursor_->exhausted(); }
  bool waits() const override { return cursor_->waits(); }
  Chunk cut(uint64_t max_bytes, size_t max_pieces) override;
  void finished() override { ended_ = true; }
  void wake(int* pushes) override;
  bool ended() const override { return ended_; }

 private:
  const std::shared_ptr<PagedCursor> cursor_;
  const std::weak_ptr<Connection> connection_;
  std::atomic<bool> ended_{false};
};

// Let the lanes send what a cursor has, as it becomes final; returns the post. As `Endpoint::post`.
uint64_t post_pages(Endpoint& endpoint, uint64_t connection, const WindowDescriptor& target,
                    const std::shared_ptr<PagedCursor>& cursor, uint64_t generation, int priority, bool checksum);

}  // namespace sage_kvt
