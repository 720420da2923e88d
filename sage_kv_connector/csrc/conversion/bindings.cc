// SPDX-License-Identifier: Apache-2.0
#include "bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <stdexcept>
#include <tuple>

#include "conversion/handles.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace sage_kvt {
namespace {

template <size_t N>
int32_t index_of(const char* field, const std::array<const char*, N>& names, const std::string& value) {
  for (size_t i = 0; i < N; ++i)
    if (value == names[i]) return static_cast<int32_t>(i);
  throw std::invalid_argument(std::string(field) + " is '" + value + "', which no kernel here knows");
}

Dtype dtype_of(const std::string& name) {
  static constexpr std::array names{"fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "int4"};
  return static_cast<Dtype>(index_of("dtype", names, name));
}

Granularity granularity_of(const std::string& name) {
  static constexpr std::array names{"none", "tensor", "channel", "token", "head"};
  return static_cast<Granularity>(index_of("granularity", names, name));
}

std::pair<uint64_t, uint64_t> pair_of(const Converted& c) { return {c.busy_ns, c.wire_bytes}; }

using FormatFields = std::tuple<std::string, std::string, int, bool>;  // dtype, granularity, group_tokens, zero_point
using Strides = std::tuple<int64_t, int64_t, int64_t>;                 // tile, inner, outer
using PlaneFields = std::tuple<Strides, Strides, int64_t, int64_t, int64_t, FormatFields, std::vector<uint64_t>,
                               std::vector<float>, std::vector<float>>;

WireFormat format_of(const FormatFields& fields) {
  const auto& [dtype, granularity, group_tokens, zero_point] = fields;
  return {dtype_of(dtype), granularity_of(granularity), group_tokens, zero_point};
}

std::shared_ptr<PagedConverter> make(const std::string& dtype, int64_t page_size, int64_t page_count, int64_t heads,
                                     const std::vector<PlaneFields>& planes, const std::string& kernels) {
  const TileKernels* chosen = kernels.empty() ? &chosen_tile_kernels() : tile_kernels_named(kernels);
  if (chosen == nullptr) throw std::invalid_argument("kernels is '" + kernels + "', which this machine can't run");
  std::vector<ConvertedPlane> out;
  for (const auto& [token, channel, head_stride, page_stride, dim, format, bases, memory_scales, wire_scales] : planes)
    out.push_back({{std::get<0>(token), std::get<1>(token), std::get<2>(token), std::get<0>(channel),
                    std::get<1>(channel), std::get<2>(channel)},
                   head_stride,
                   page_stride,
                   dim,
                   format_of(format),
                   bases,
                   memory_scales,
                   wire_scales});
  return std::make_shared<PagedConverter>(dtype_of(dtype), page_size, page_count, heads, std::move(out), *chosen);
}

using SpanFields = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, std::vector<int64_t>>;

Span span_of(const SpanFields& fields) {
  const auto& [first_layer, layers, first_head, heads, first_token, tokens, pages] = fields;
  return {first_layer, layers, first_head, heads, first_token, tokens, pages};
}

void check_length(const PagedConverter& converter, const Span& span, uint64_t wire_length) {
  converter.check(span);
  if (converter.wire_bytes(span) != wire_length)
    throw std::invalid_argument("wire_length is " + std::to_string(wire_length) + ", the span has " +
                                std::to_string(converter.wire_bytes(span)));
}

}  // namespace

void bind_conversion(nb::module_& m) {
  nb::class_<PagedConverter>(m, "PagedConverter")
      .def_prop_ro("kernels", &PagedConverter::kernels)
      .def("wire_bytes",
           [](const PagedConverter& c, const SpanFields& fields) {
             const Span span = span_of(fields);
             c.check(span);
             return c.wire_bytes(span);
           })
      .def(
          "encode",
          [](const PagedConverter& c, const SpanFields& fields, uint64_t wire, uint64_t wire_length) {
            const Span span = span_of(fields);
            check_length(c, span, wire_length);
            nb::gil_scoped_release release;
            c.encode(span, reinterpret_cast<uint8_t*>(wire));
          },
          "span"_a, "wire"_a, "wire_length"_a)
      .def(
          "decode",
          [](const PagedConverter& c, const SpanFields& fields, uint64_t wire, uint64_t wire_length) {
            const Span span = span_of(fields);
            check_length(c, span, wire_length);
            nb::gil_scoped_release release;
            c.decode(span, reinterpret_cast<const uint8_t*>(wire));
          },
          "span"_a, "wire"_a, "wire_length"_a);
  m.def("paged_converter", make, "dtype"_a, "page_size"_a, "page_count"_a, "heads"_a, "planes"_a, "kernels"_a = "");
  m.def("tile_kernels", [] {
    std::vector<std::string> names;
    for (const char* name : {"avx512", "avx2", "portable"})
      if (tile_kernels_named(name)) names.emplace_back(name);
    return names;
  });

  nb::class_<PoolHandle>(m, "ConversionPool")
      .def(nb::init<int>(), "threads"_a)
      .def(
          "encode",
          [](PoolHandle& self, const PagedConverter* c, const SpanFields& span, uint64_t wire, uint64_t wire_length) {
            return self.pool->encode(c, span_of(span), wire, wire_length);
          },
          "converter"_a, "span"_a, "wire"_a, "wire_length"_a)
      .def(
          "decode",
          [](PoolHandle& self, const PagedConverter* c, const SpanFields& span, uint64_t wire, uint64_t wire_length) {
            return self.pool->decode(c, span_of(span), wire, wire_length);
          },
          "converter"_a, "span"_a, "wire"_a, "wire_length"_a)
      .def(
          "cancel", [](PoolHandle& self, uint64_t job) { self.pool->cancel(job); }, "job"_a,
          nb::call_guard<nb::gil_scoped_release>())
      .def("poll",
           [](PoolHandle& self, size_t max_events) { return events_of(self.pool->completions().take(max_events)); })
      .def("fileno", [](PoolHandle& self) { return self.pool->completions().fd(); })
      .def_prop_ro("encoded", [](PoolHandle& self) { return pair_of(self.pool->converted(Work::kEncode)); })
      .def_prop_ro("decoded", [](PoolHandle& self) { return pair_of(self.pool->converted(Work::kDecode)); })
      .def("close", [](PoolHandle& self) { self.pool->close(); }, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace sage_kvt
