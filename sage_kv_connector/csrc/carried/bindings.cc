// SPDX-License-Identifier: Apache-2.0
#include "bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <cstring>
#include <utility>

#include "carried/carried_endpoint.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace sage_kvt {
namespace {

using Rows = nb::ndarray<nb::numpy, uint64_t, nb::shape<-1, 3>>;
static_assert(sizeof(CarriedRow) == 24);

Rows rows_of(const CarriedJob& job) {
  const size_t count = job.read ? job.read->rows.size() : 0;
  auto* copy = new uint64_t[3 * count];
  if (count > 0) std::memcpy(copy, job.read->rows.data(), count * sizeof(CarriedRow));
  return Rows(copy, {count, 3}, nb::capsule(copy, [](void* p) noexcept { delete[] static_cast<uint64_t*>(p); }));
}

std::string text_of(const nb::bytes& bytes) { return {bytes.c_str(), bytes.size()}; }

}  // namespace

void bind_carried(nb::module_& m) {
  nb::class_<CarriedEndpoint, TcpEndpoint>(m, "CarriedEndpoint")
      .def(
          "__init__",
          [](CarriedEndpoint* self, const std::string& name, int lanes, uint64_t chunk_bytes, uint64_t spin_us,
             const std::string& local_address, bool measures, size_t slots) {
            if (slots < 1 || slots > 1024)
              throw std::invalid_argument("slots is " + std::to_string(slots) + ", allowed: 1 to 1024");
            new (self) CarriedEndpoint(options_of(lanes, chunk_bytes, spin_us, measures), TcpOptions{0, local_address},
                                       CarriedOptions{name, slots});
          },
          nb::kw_only(), "name"_a, "lanes"_a, "chunk_bytes"_a, "spin_us"_a, "local_address"_a, "measures"_a, "slots"_a)
      .def("slots", [](CarriedEndpoint& e) { return std::make_pair(e.slots().begin(), e.slots().size()); })
      .def("abandon_slots", [](CarriedEndpoint& e) { e.slots().abandon(); })
      .def("carry", &CarriedEndpoint::carry, "region"_a, "address"_a, "length"_a,
           nb::call_guard<nb::gil_scoped_release>())
      .def(
          "describe_library",
          [](CarriedEndpoint& e, const nb::bytes& description) {
            auto text = text_of(description);
            nb::gil_scoped_release release;
            e.describe_library(std::move(text));
          },
          "description"_a)
      // What is to be done (0 meet, 1 read, 2 forget), connection, number of a read, a peer's description, and
      // rows (local address, peer's address, bytes).
      .def(
          "next_job",
          [](CarriedEndpoint& e, double timeout_s) -> nb::object {
            std::optional<CarriedJob> job;
            {
              nb::gil_scoped_release release;
              job = e.next_job(timeout_s);
            }
            if (!job) return nb::none();
            return nb::make_tuple(static_cast<int>(job->what), job->connection, job->read ? job->read->number : 0,
                                  nb::bytes(job->description.data(), job->description.size()), rows_of(*job));
          },
          "timeout_s"_a)
      .def("met", &CarriedEndpoint::met, "connection"_a, "why"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("read_ended", &CarriedEndpoint::read_ended, "number"_a, "failed"_a,
           nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace sage_kvt
