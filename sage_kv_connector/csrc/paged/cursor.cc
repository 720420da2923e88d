// SPDX-License-Identifier: Apache-2.0
#include "paged/cursor.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace sage_kvt {
namespace {

std::vector<GroupCount> counts_of(const std::vector<PageRuns>& selection) {
  std::vector<GroupCount> counts;
  for (const auto& pages : selection) counts.push_back({pages.group, pages.count()});
  return counts;
}

}  // namespace

PageRuns::PageRuns(size_t group_, std::vector<std::pair<uint64_t, uint64_t>> runs_)
    : group(group_), runs(std::move(runs_)), before_{0} {
  uint64_t behind = 0;
  for (const auto& [first, count] : runs) {
    if (count == 0 || first < behind || first + count < first)
      throw std::invalid_argument("runs of group " + std::to_string(group) + " are empty or don't ascend");
    behind = first + count;
    before_.push_back(before_.back() + count);
  }
}

uint64_t PageRuns::below(uint64_t end) const {
  const auto run = static_cast<size_t>(
      std::upper_bound(runs.begin(), runs.end(), end, [](uint64_t at, const auto& r) { return at < r.first; }) -
      runs.begin());
  if (run == 0) return 0;
  const auto& [first, count] = runs[run - 1];
  return before_[run - 1] + std::min(count, end - first);
}

PagedCursor::PagedCursor(std::shared_ptr<const PageLayout> layout, std::shared_ptr<PageTables> tables,
                         std::vector<PageRuns> selection, std::optional<Padding> padding)
    : tables_(std::move(tables)),
      selection_(std::move(selection)),
      padding_(std::move(padding)),
      space_(std::move(layout), counts_of(selection_)),
      sent_(space_.spans().size()) {
  for (const auto& span : space_.spans())
    if (span.group >= tables_->groups() || span.layer >= tables_->layers(span.group))
      throw std::invalid_argument("the tables have no layer " + std::to_string(span.layer) + " of group " +
                                  std::to_string(span.group));
  if (padding_ && padding_->needed.size() != tables_->groups())
    throw std::invalid_argument("needed names " + std::to_string(padding_->needed.size()) +
                                " groups, the tables have " + std::to_string(tables_->groups()));
}

uint64_t PagedCursor::ready_bytes(size_t i) const {
  const auto& span = space_.spans()[i];
  uint64_t final_pages = tables_->final_pages(span.group, span.layer);
  if (padding_) {
    const auto last = tables_->last(span.group);
    if (last && final_pages >= *last) final_pages = std::numeric_limits<uint64_t>::max();
  }
  return selection_[span.slot].below(final_pages) * span.page_bytes;
}

size_t PagedCursor::next_ready(size_t span) const {
  while (span < sent_.size() && ready_bytes(span) <= sent_[span]) ++span;
  return span;
}

Chunk PagedCursor::cut(uint64_t max_bytes, size_t max_pieces) {
  Chunk chunk;
  const auto& spans = space_.spans();
  waits_ = false;
  if (status_ != Status::kOk || !within_end()) return chunk;
  size_t i = next_ready(first_open_);
  if (i == spans.size()) {
    waits_ = !exhausted();
    return chunk;
  }
  uint64_t ready = ready_bytes(i);
  chunk.offset = spans[i].start + sent_[i];
  while (true) {
    // Pages are looked up whole; a chunk may end within one.
    const uint64_t wanted = std::min(max_bytes - chunk.length, ready - sent_[i]);
    if (!know(spans[i].slot, (sent_[i] + wanted + spans[i].page_bytes - 1) / spans[i].page_bytes)) return {};
    const uint64_t covered = space_.pieces(spans[i].start + sent_[i], wanted, max_pieces, &chunk.pieces);
    chunk.length += covered;
    sent_[i] += covered;
    if (covered < wanted || sent_[i] < spans[i].bytes || chunk.length == max_bytes) break;
    // The space goes on in the next layer.
    if (++i == spans.size() || sent_[i] != 0 || (ready = ready_bytes(i)) == 0) break;
  }
  while (first_open_ < spans.size() && sent_[first_open_] == spans[first_open_].bytes) ++first_open_;
  waits_ = !exhausted() && next_ready(first_open_) == spans.size();
  return chunk;
}

bool PagedCursor::know(size_t slot, uint64_t count) {
  const auto& pages = selection_[slot];
  uint64_t known = space_.known(slot);
  if (known >= count) return true;
  const auto of_group = [&] { return " of group " + std::to_string(pages.group); };
  uint64_t skip = known;
  for (const auto& [first, in_run] : pages.runs) {
    if (skip >= in_run) {
      skip -= in_run;
      continue;
    }
    const uint64_t from = first + skip, end = from + std::min(in_run - skip, count - known);
    auto ids = tables_->page_ids(pages.group, from, end);
    if (padding_)
      if (const auto last = tables_->last(pages.group); last && end > *last) {
        const uint64_t own = *last > from ? *last - from : 0;
        if (ids.size() >= own) {  // else the table lacks pages that it must have
          ids.resize(own);
          ids.resize(end - from, padding_->page);
        }
      }
    const auto null = std::find(ids.begin(), ids.end(), kNullPage);
    if (null != ids.end())
      return refuse(Status::kOutOfBounds, "page " + std::to_string(from + static_cast<uint64_t>(null - ids.begin())) +
                                              of_group() + " is no longer kept here");
    if (ids.size() < end - from)
      return refuse(Status::kOutOfBounds, "page " + std::to_string(end - 1) + of_group() + " is beyond the " +
                                              std::to_string(tables_->length(pages.group)) + " here");
    try {
      space_.know(slot, ids.data(), ids.size());
    } catch (const std::invalid_argument& error) {
      return refuse(Status::kOutOfBounds, error.what());
    }
    known += end - from;
    if (known == count) return true;
    skip = 0;
  }
  return true;
}

bool PagedCursor::within_end() {
  for (const auto& pages : selection_) {
    if (pages.runs.empty()) continue;
    const auto last = tables_->last(pages.group);
    const uint64_t needed = padding_ ? padding_->needed[pages.group] : pages.last() + 1;
    if (last && needed > *last)
      return refuse(Status::kBeyondEnd, "prefill ended with " + std::to_string(*last) + " pages of group " +
                                            std::to_string(pages.group) + ", number " + std::to_string(needed) +
                                            " asked for");
  }
  return true;
}

bool PagedCursor::refuse(Status status, std::string why) {
  status_ = status;
  why_ = std::move(why);
  return false;
}

PagedPost::PagedPost(std::shared_ptr<PagedCursor> cursor, const std::shared_ptr<Connection>& connection)
    : cursor_(std::move(cursor)), connection_(connection) {
  total = cursor_->size();
}

Chunk PagedPost::cut(uint64_t max_bytes, size_t max_pieces) {
  Chunk chunk = cursor_->cut(max_bytes, max_pieces);
  if (cursor_->status() != Status::kOk && status == Status::kOk) {
    status = cursor_->status();
    detail = cursor_->why();
  }
  return chunk;
}

void PagedPost::wake(int* pushes) {
  const auto connection = connection_.lock();
  if (!connection || !connection->resume(shared_from_this())) return;
  if (*pushes > 0 && !checksum) {
    --*pushes;
    if (connection->push()) return;
  }
  connection->kick();
}

uint64_t post_pages(Endpoint& endpoint, uint64_t connection, const WindowDescriptor& target,
                    const std::shared_ptr<PagedCursor>& cursor, uint64_t generation, int priority, bool checksum) {
  if (cursor->size() > target.size)
    throw std::invalid_argument("pages of " + std::to_string(cursor->size()) + " bytes leave the window of " +
                                std::to_string(target.size) + " bytes");
  auto found = endpoint.find_connection(connection);
  if (!found) throw ConnectionClosed(connection);
  auto post = std::make_shared<PagedPost>(cursor, found);
  const uint64_t id = endpoint.post(connection, target, post, cursor->extents(), {generation, priority, checksum});
  cursor->tables()->attach(post);
  return id;
}

}  // namespace sage_kvt
