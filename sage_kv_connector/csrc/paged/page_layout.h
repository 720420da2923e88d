// SPDX-License-Identifier: Apache-2.0
// An engine's paged KV caches as places in memory, and pages of them as one linear space.
//
// Memory model: pages of a group lie at the same number in each of its layers. A page of a layer is its planes one
// after the other, a page of a plane its runs of bytes. The space of a selection is linear: group after group, in a
// group layer after layer, in a layer the selected pages in order, in a page its planes (docs/protocol.md).
//
// What a selection costs is its page ids and a span a layer, never a segment for each page of each layer.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "memory_region.h"
#include "space.h"

namespace sage_kvt {

// Page id of a block table's entry that has no memory.
constexpr int64_t kNullPage = -1;

// One plane of one layer: page p has `run_bytes` at base + p * page_stride + each of `run_offsets`.
struct PagePlane {
  uint64_t base = 0, page_stride = 0, run_bytes = 0;
  std::vector<uint64_t> run_offsets;
  uint64_t page_bytes() const { return run_bytes * run_offsets.size(); }
};

struct PageLayer {
  std::vector<PagePlane> planes;
  uint64_t page_bytes = 0;
};

// Layers that share one block table, of `pages` pages.
struct PageGroup {
  uint64_t pages = 0;
  std::vector<PageLayer> layers;
  uint64_t page_bytes = 0;  // of all layers
};

class PageLayout {
 public:
  // `extents`: spans of memory that hold every page. Throws std::invalid_argument for a group without layers, a layer
  // without planes or bytes, and a page that leaves the extents.
  PageLayout(std::vector<PageGroup> groups, std::vector<Segment> extents);
  const std::vector<PageGroup>& groups() const { return groups_; }
  const std::vector<Segment>& extents() const { return extents_; }

 private:
  std::vector<PageGroup> groups_;
  std::vector<Segment> extents_;
};

// So many pages of a group are selected.
struct GroupCount {
  size_t group, pages;
};

// One layer's part of a space.
struct LayerSpan {
  size_t slot;  // which of the selected groups
  size_t group, layer;
  uint64_t start, bytes, page_bytes;
};

// A selection's pages; ids may become known one after the other.
class PagedSpace : public Space {
 public:
  // Groups ascend. Throws std::invalid_argument for an unknown or repeated group, and for a selection without pages.
  PagedSpace(std::shared_ptr<const PageLayout> layout, const std::vector<GroupCount>& selected);

  // The next pages of a selected group. Throws std::invalid_argument for an id outside of the cache.
  void know(size_t slot, const int64_t* ids, size_t count);
  size_t known(size_t slot) const { return ids_[slot].size(); }

  uint64_t size() const override { return size_; }
  // Only of pages that are known.
  uint64_t pieces(uint64_t offset, uint64_t length, size_t max, std::vector<iovec>* out) const override;
  const std::vector<LayerSpan>& spans() const { return spans_; }
  const PageLayout& layout() const { return *layout_; }

 private:
  std::shared_ptr<const PageLayout> layout_;
  std::vector<GroupCount> selected_;
  std::vector<std::vector<int64_t>> ids_;
  std::vector<LayerSpan> spans_;
  uint64_t size_ = 0;
};

}  // namespace sage_kvt
