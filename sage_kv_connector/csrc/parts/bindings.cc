// SPDX-License-Identifier: Apache-2.0
#include "bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "conversion/handles.h"
#include "paged/handles.h"
#include "parts/part_decoder.h"
#include "parts/part_encoder.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace sage_kvt {
namespace {

// Of a part: group, first_layer, layers, first_token, tokens, nbytes.
using PartRows = nb::ndarray<const int64_t, nb::shape<-1, 6>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Converters = std::vector<std::pair<size_t, std::shared_ptr<PagedConverter>>>;  // by group

struct EncoderHandle {
  std::shared_ptr<PartEncoder> stream;
};
struct DecoderHandle {
  std::shared_ptr<PartDecoder> stream;
};

std::vector<Part> parts_of(const PartRows& rows) {
  std::vector<Part> parts;
  parts.reserve(rows.shape(0));
  for (size_t i = 0; i < rows.shape(0); ++i) {
    const int64_t* row = rows.data() + 6 * i;
    if (row[0] < 0 || row[5] < 0) throw std::invalid_argument("part " + std::to_string(i) + " has a number below 0");
    parts.push_back({static_cast<size_t>(row[0]), row[1], row[2], row[3], row[4], static_cast<uint64_t>(row[5]), 0});
  }
  return parts;
}

PartTerms terms_of(std::pair<int64_t, int64_t> heads, std::vector<int64_t> page_sizes, const Converters& converters) {
  for (int64_t size : page_sizes)
    if (size < 1) throw std::invalid_argument("a page size is " + std::to_string(size));
  std::vector<std::shared_ptr<const PagedConverter>> by_group(converters.empty() ? 0 : page_sizes.size());
  for (const auto& [group, converter] : converters) {
    if (group >= by_group.size())
      throw std::invalid_argument("a converter of group " + std::to_string(group) + ", there are " +
                                  std::to_string(by_group.size()));
    by_group[group] = converter;
  }
  return {heads.first, heads.second, std::move(page_sizes), std::move(by_group)};
}

template <typename Handle>
void bind_stream(nb::class_<Handle>& cls) {
  cls.def_prop_ro("id", [](const Handle& self) { return self.stream->id; })
      .def_prop_ro("count", [](const Handle& self) { return self.stream->count(); })
      .def_prop_ro("nbytes", [](const Handle& self) { return self.stream->size(); })
      .def_prop_ro("largest", [](const Handle& self) { return self.stream->largest(); })
      .def(
          "asked",
          [](Handle& self, size_t part) {
            const PartWork work = self.stream->asked(part);
            const Span& s = work.span;
            const Part& of = self.stream->part(part);
            return nb::make_tuple(
                of.group,
                nb::make_tuple(s.first_layer, s.layers, s.first_head, s.heads, s.first_token, s.tokens, s.pages),
                work.wire, of.nbytes);
          },
          "part"_a)
      .def(
          "answered", [](Handle& self, size_t part, const std::string& why) { self.stream->answered(part, why); },
          "part"_a, "why"_a)
      .def("close", [](Handle& self) { self.stream->close(); }, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace

void bind_parts(nb::module_& m) {
  auto encoder = nb::class_<EncoderHandle>(m, "PartEncoder");
  encoder.def(
      "__init__",
      [](EncoderHandle* self, const PoolHandle& pool, const PartRows& parts, std::pair<int64_t, int64_t> heads,
         std::vector<int64_t> page_sizes, const Converters& converters, const TablesHandle& tables,
         int64_t prompt_tokens, std::optional<int64_t> padding_page) {
        new (self) EncoderHandle{std::make_shared<PartEncoder>(pool.pool, parts_of(parts),
                                                               terms_of(heads, std::move(page_sizes), converters),
                                                               tables.tables, PromptEnd{prompt_tokens, padding_page})};
      },
      "pool"_a, "parts"_a, "heads"_a, "page_sizes"_a, "converters"_a, "tables"_a, "prompt_tokens"_a,
      "padding_page"_a.none());
  bind_stream(encoder);
  encoder.def("attach", [](EncoderHandle& self) { PartEncoder::attach(self.stream); })
      .def("grant", [](EncoderHandle& self, uint64_t parts) { self.stream->grant(parts); }, "parts"_a);

  auto decoder = nb::class_<DecoderHandle>(m, "PartDecoder");
  decoder.def(
      "__init__",
      [](DecoderHandle* self, const PoolHandle& pool, const PartRows& parts, std::pair<int64_t, int64_t> heads,
         std::vector<int64_t> page_sizes, const Converters& converters,
         const std::vector<std::tuple<size_t, int64_t, Ids>>& pages) {
        std::vector<TargetPages> targets(page_sizes.size());
        for (const auto& [group, first, ids] : pages) {
          if (group >= targets.size())
            throw std::invalid_argument("pages of group " + std::to_string(group) + ", there are " +
                                        std::to_string(targets.size()));
          targets[group] = {first, {ids.data(), ids.data() + ids.shape(0)}};
        }
        new (self) DecoderHandle{std::make_shared<PartDecoder>(
            pool.pool, parts_of(parts), terms_of(heads, std::move(page_sizes), converters), std::move(targets))};
      },
      "pool"_a, "parts"_a, "heads"_a, "page_sizes"_a, "converters"_a, "pages"_a);
  bind_stream(decoder);
  decoder.def_prop_ro("granted", [](const DecoderHandle& self) { return self.stream->granted(); });

  m.def(
      "open_part_window",
      [](Endpoint& endpoint, uint64_t connection, DecoderHandle& decoder, uint64_t address, uint64_t slot_bytes,
         size_t slots, uint64_t generation) {
        return decoder.stream->start({address, slot_bytes, slots}, endpoint, connection, generation);
      },
      "endpoint"_a, "connection"_a, "decoder"_a, "address"_a, "slot_bytes"_a, "slots"_a, "generation"_a);
  m.def(
      "post_parts",
      [](Endpoint& endpoint, uint64_t connection, const nb::bytes& window, EncoderHandle& encoder, uint64_t address,
         uint64_t slot_bytes, size_t slots, uint64_t generation, int priority, bool checksum) {
        return encoder.stream->start({address, slot_bytes, slots}, endpoint, connection, window_descriptor(window),
                                     {generation, priority, checksum});
      },
      "endpoint"_a, "connection"_a, "window_descriptor"_a, "encoder"_a, "address"_a, "slot_bytes"_a, "slots"_a,
      "generation"_a, "priority"_a, "checksum"_a);
}

}  // namespace sage_kvt
