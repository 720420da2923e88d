// SPDX-License-Identifier: Apache-2.0
#include "paged/page_layout.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace sage_kvt {
namespace {

void check_plane(const PagePlane& plane, uint64_t pages, const std::vector<Segment>& extents, const std::string& name) {
  if (plane.run_bytes == 0 || plane.run_offsets.empty()) throw std::invalid_argument(name + " has no bytes");
  const uint64_t last = *std::max_element(plane.run_offsets.begin(), plane.run_offsets.end());
  const uint64_t length = last + plane.run_bytes + (pages - 1) * plane.page_stride;
  for (const auto& e : extents)
    if (plane.base >= e.address && length <= e.length && plane.base - e.address <= e.length - length) return;
  throw std::invalid_argument(name + " at " + std::to_string(plane.base) + ", +" + std::to_string(length) +
                              " leaves the extents");
}

}  // namespace

PageLayout::PageLayout(std::vector<PageGroup> groups, std::vector<Segment> extents)
    : groups_(std::move(groups)), extents_(std::move(extents)) {
  for (size_t g = 0; g < groups_.size(); ++g) {
    auto& group = groups_[g];
    if (group.pages == 0 || group.layers.empty())
      throw std::invalid_argument("group " + std::to_string(g) + " has no pages or no layers");
    for (size_t l = 0; l < group.layers.size(); ++l) {
      auto& layer = group.layers[l];
      const std::string name = "layer " + std::to_string(l) + " of group " + std::to_string(g);
      if (layer.planes.empty()) throw std::invalid_argument(name + " has no planes");
      layer.page_bytes = 0;
      for (const auto& plane : layer.planes) {
        check_plane(plane, group.pages, extents_, name);
        layer.page_bytes += plane.page_bytes();
      }
      group.page_bytes += layer.page_bytes;
    }
  }
}

PagedSpace::PagedSpace(std::shared_ptr<const PageLayout> layout, const std::vector<GroupCount>& selected)
    : layout_(std::move(layout)), selected_(selected), ids_(selected.size()) {
  for (size_t slot = 0; slot < selected_.size(); ++slot) {
    const auto [group, pages] = selected_[slot];
    if (group >= layout_->groups().size() || (slot > 0 && group <= selected_[slot - 1].group))
      throw std::invalid_argument("group " + std::to_string(group) + " of a selection is unknown, or out of order");
    if (const uint64_t here = layout_->groups()[group].pages; pages > here)
      throw std::invalid_argument("group " + std::to_string(group) + " has " + std::to_string(here) + " pages here, " +
                                  std::to_string(pages) + " are selected");
    const auto& layers = layout_->groups()[group].layers;
    for (size_t l = 0; l < layers.size() && pages > 0; ++l) {
      const uint64_t bytes = pages * layers[l].page_bytes;
      spans_.push_back({slot, group, l, size_, bytes, layers[l].page_bytes});
      size_ += bytes;
    }
  }
  if (size_ == 0) throw std::invalid_argument("a selection has no pages");
}

void PagedSpace::know(size_t slot, const int64_t* ids, size_t count) {
  const auto& group = layout_->groups()[selected_[slot].group];
  for (size_t i = 0; i < count; ++i)
    if (ids[i] < 0 || static_cast<uint64_t>(ids[i]) >= group.pages)
      throw std::invalid_argument("page id " + std::to_string(ids[i]) + " of group " +
                                  std::to_string(selected_[slot].group) + " is not among its " +
                                  std::to_string(group.pages) + " pages");
  ids_[slot].insert(ids_[slot].end(), ids, ids + count);
}

uint64_t PagedSpace::pieces(uint64_t offset, uint64_t length, size_t max, std::vector<iovec>* out) const {
  auto span = std::upper_bound(spans_.begin(), spans_.end(), offset,
                               [](uint64_t at, const LayerSpan& s) { return at < s.start; }) -
              1;
  uint64_t covered = 0, within = offset - span->start;
  for (; covered < length; ++span, within = 0) {
    const auto& layer = layout_->groups()[span->group].layers[span->layer];
    const auto& ids = ids_[span->slot];
    for (uint64_t place = within / span->page_bytes, skip = within % span->page_bytes;
         place < ids.size() && covered < length; ++place, skip = 0) {
      for (const auto& plane : layer.planes) {
        if (skip >= plane.page_bytes()) {
          skip -= plane.page_bytes();
          continue;
        }
        const uint64_t page = plane.base + static_cast<uint64_t>(ids[place]) * plane.page_stride;
        for (uint64_t run = skip / plane.run_bytes, gone = skip % plane.run_bytes;
             run < plane.run_offsets.size() && covered < length; ++run, gone = 0) {
          const uint64_t n = std::min(length - covered, plane.run_bytes - gone);
          if (!add_piece(page + plane.run_offsets[run] + gone, n, max, out)) return covered;
          covered += n;
        }
        skip = 0;
      }
    }
  }
  return covered;
}

}  // namespace sage_kvt
