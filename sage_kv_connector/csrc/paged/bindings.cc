// SPDX-License-Identifier: Apache-2.0
#include "bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "paged/handles.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace sage_kvt {
namespace {

using Ids = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using PlaneFields = std::tuple<uint64_t, uint64_t, uint64_t, std::vector<uint64_t>>;  // as PagePlane
using GroupFields = std::pair<uint64_t, std::vector<std::vector<PlaneFields>>>;       // pages, layers of planes
using RunsFields = std::pair<size_t, std::vector<std::pair<uint64_t, uint64_t>>>;     // as PageRuns

LayoutHandle make_layout(const std::vector<GroupFields>& groups,
                         const std::vector<std::pair<uint64_t, uint64_t>>& extents) {
  std::vector<PageGroup> made;
  for (const auto& [pages, layers] : groups) {
    PageGroup group;
    group.pages = pages;
    for (const auto& planes : layers) {
      PageLayer layer;
      for (const auto& [base, stride, bytes, offsets] : planes) layer.planes.push_back({base, stride, bytes, offsets});
      group.layers.push_back(std::move(layer));
    }
    made.push_back(std::move(group));
  }
  std::vector<Segment> memory;
  for (const auto& [address, length] : extents) memory.push_back({address, length});
  return {std::make_shared<const PageLayout>(std::move(made), std::move(memory))};
}

// A NumPy array of its own.
template <typename T>
nb::object array_of(const std::vector<T>& values, std::initializer_list<size_t> shape) {
  auto* data = new T[std::max<size_t>(values.size(), 1)];
  std::copy(values.begin(), values.end(), data);
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T>(data, shape, owner));
}

// All that can be cut now, for backends whose lanes don't.
nb::object take_ready(CursorHandle& self) {
  std::vector<uint64_t> rows;
  while (true) {
    const Chunk chunk = self.cursor->cut(std::numeric_limits<uint64_t>::max(), std::numeric_limits<size_t>::max());
    if (chunk.length == 0) break;
    uint64_t offset = chunk.offset;
    for (const auto& piece : chunk.pieces) {
      rows.insert(rows.end(), {reinterpret_cast<uint64_t>(piece.iov_base), offset, piece.iov_len});
      offset += piece.iov_len;
    }
  }
  if (rows.empty()) return nb::none();
  return array_of(rows, {rows.size() / 3, 3});
}

}  // namespace

void bind_paged(nb::module_& m) {
  nb::class_<LayoutHandle>(m, "PageLayout")
      .def(
          "__init__",
          [](LayoutHandle* self, const std::vector<GroupFields>& groups,
             const std::vector<std::pair<uint64_t, uint64_t>>& extents) {
            new (self) LayoutHandle(make_layout(groups, extents));
          },
          "groups"_a, "extents"_a)
      .def_prop_ro("page_bytes", [](const LayoutHandle& self) {
        std::vector<uint64_t> out;
        for (const auto& group : self.layout->groups()) out.push_back(group.page_bytes);
        return out;
      });

  nb::class_<TablesHandle>(m, "PageTables")
      .def(
          "__init__",
          [](TablesHandle* self, const std::vector<size_t>& layers) {
            new (self) TablesHandle{std::make_shared<PageTables>(layers)};
          },
          "layers"_a)
      .def(
          "set_pages",
          [](TablesHandle& self, size_t group, const Ids& ids) {
            self.tables->set_pages(group, ids.data(), ids.shape(0));
          },
          "group"_a, "ids"_a)
      .def(
          "append",
          [](TablesHandle& self, size_t group, const Ids& ids) {
            self.tables->append(group, ids.data(), ids.shape(0));
          },
          "group"_a, "ids"_a)
      .def(
          "advance",
          [](TablesHandle& self, size_t group, size_t first_layer, size_t layers, uint64_t pages) {
            int pushes = 0;
            self.tables->advance(group, first_layer, layers, pages, &pushes);
          },
          "group"_a, "first_layer"_a, "layers"_a, "pages"_a)
      .def(
          "advance_all",
          [](TablesHandle& self, const std::vector<uint64_t>& pages) {
            int pushes = kPushes;
            self.tables->advance_all(pages, &pushes);
          },
          "pages"_a)
      .def(
          "end", [](TablesHandle& self, const std::vector<uint64_t>& pages) { self.tables->end(pages); }, "pages"_a)
      .def(
          "final_pages",
          [](const TablesHandle& self, size_t group, size_t first_layer, size_t layers) {
            uint64_t least = std::numeric_limits<uint64_t>::max();
            for (size_t l = first_layer; l < first_layer + layers; ++l)
              least = std::min(least, self.tables->final_pages(group, l));
            return least;
          },
          "group"_a, "first_layer"_a, "layers"_a)
      .def(
          "last", [](const TablesHandle& self, size_t group) { return self.tables->last(group); }, "group"_a)
      .def(
          "length", [](const TablesHandle& self, size_t group) { return self.tables->length(group); }, "group"_a)
      .def(
          "page_ids",
          [](const TablesHandle& self, size_t group, uint64_t first, uint64_t end) {
            const auto ids = self.tables->page_ids(group, first, end);
            return array_of(ids, {ids.size()});
          },
          "group"_a, "first"_a, "end"_a);

  nb::class_<Step>(m, "Step")
      .def(nb::init<>())
      .def(
          "add",
          [](Step& self, const TablesHandle& of, std::vector<uint64_t> pages) {
            self.add(of.tables, std::move(pages));
          },
          "tables"_a, "pages"_a)
      .def("layer", &Step::layer, "group"_a, "layer"_a)
      .def("all", &Step::all);

  nb::class_<CursorHandle>(m, "PagedCursor")
      .def(
          "__init__",
          [](CursorHandle* self, const LayoutHandle& layout, const TablesHandle& tables,
             const std::vector<RunsFields>& selection,
             const std::optional<std::pair<int64_t, std::vector<uint64_t>>>& padding) {
            std::vector<PageRuns> runs;
            for (const auto& [group, ranges] : selection) runs.emplace_back(group, ranges);
            std::optional<Padding> behind;
            if (padding) behind = Padding{padding->first, padding->second};
            new (self) CursorHandle{
                std::make_shared<PagedCursor>(layout.layout, tables.tables, std::move(runs), std::move(behind))};
          },
          "layout"_a, "tables"_a, "selection"_a, "padding"_a.none() = nb::none())
      .def_prop_ro("nbytes", [](const CursorHandle& self) { return self.cursor->size(); })
      .def_prop_ro("exhausted", [](const CursorHandle& self) { return self.cursor->exhausted(); })
      .def_prop_ro("status", [](const CursorHandle& self) { return static_cast<int>(self.cursor->status()); })
      .def_prop_ro("why", [](const CursorHandle& self) { return self.cursor->why(); })
      .def("take_ready", &take_ready);

  m.def(
      "open_paged_window",
      [](Endpoint& endpoint, uint64_t connection, const LayoutHandle& layout,
         const std::vector<std::pair<size_t, Ids>>& pages, uint64_t generation) {
        std::vector<GroupCount> counts;
        for (const auto& [group, ids] : pages) counts.push_back({group, ids.shape(0)});
        auto space = std::make_unique<PagedSpace>(layout.layout, counts);
        for (size_t slot = 0; slot < pages.size(); ++slot)
          space->know(slot, pages[slot].second.data(), pages[slot].second.shape(0));
        return endpoint.open_window(connection, std::move(space), layout.layout->extents(), generation, false);
      },
      "endpoint"_a, "connection"_a, "layout"_a, "pages"_a, "generation"_a);
  // Short, and the interpreter would not be had back at once: it is kept.
  m.def(
      "post_pages",
      [](Endpoint& endpoint, uint64_t connection, const nb::bytes& window, const CursorHandle& cursor,
         uint64_t generation, int priority, bool checksum) {
        return post_pages(endpoint, connection, window_descriptor(window), cursor.cursor, generation, priority,
                          checksum);
      },
      "endpoint"_a, "connection"_a, "window_descriptor"_a, "cursor"_a, "generation"_a, "priority"_a, "checksum"_a);
}

}  // namespace sage_kvt
