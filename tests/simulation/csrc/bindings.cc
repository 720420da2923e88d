// SPDX-License-Identifier: Apache-2.0
// What a simulation has beside the data plane; only in builds with SAGE_KVT_SIMULATION.
#include "bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include "conversion/handles.h"
#include "stepped.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace sage_kvt;
using namespace sage_kvt::simulation;

void sage_kvt::bind_simulation(nb::module_& m) {
  m.def("simulate_now", &simulate_now, "ns"_a);
  nb::class_<Wire>(m, "Wire")
      .def(nb::init<uint64_t>(), "seed"_a)
      .def(
          "latency",
          [](Wire& w, uint64_t shortest, uint64_t longest) {
            w.manners.shortest_ns = shortest;
            w.manners.longest_ns = longest;
          },
          "shortest_ns"_a, "longest_ns"_a)
      .def(
          "manners",
          [](Wire& w, bool pulls, uint64_t packets, int corrupt, int duplicate) {
            w.manners.pulls = pulls;
            w.manners.packets_in_flight = packets;
            w.manners.corrupt = corrupt;
            w.manners.duplicate = duplicate;
          },
          "pulls"_a, "packets"_a, "corrupt"_a, "duplicate"_a)
      .def("cut", &Wire::cut, "host"_a, "silently"_a)
      .def(
          "silence",
          [](Wire& w, const std::string& host, bool on) {
            if (on)
              w.silent_hosts.insert(host);
            else
              w.silent_hosts.erase(host);
          },
          "host"_a, "on"_a);
  nb::class_<SteppedEndpoint, Endpoint>(m, "SteppedEndpoint")
      .def(
          "__init__",
          [](SteppedEndpoint* self, std::shared_ptr<Wire> wire, int lanes, uint64_t chunk_bytes,
             const std::string& host) {
            EndpointOptions options;
            options.lanes = lanes;
            options.chunk_bytes = chunk_bytes;
            options.spin_ns = 0;
            options.stepped = true;
            new (self) SteppedEndpoint(std::move(wire), options, host);
          },
          "wire"_a, "lanes"_a, "chunk_bytes"_a, "host"_a)
      .def("step", &SteppedEndpoint::step)
      .def("next_due", &SteppedEndpoint::next_due)
      .def("die", &SteppedEndpoint::die);
  m.def(
      "stepped_pool", [](int threads) { return new PoolHandle(threads, true); }, "threads"_a,
      nb::rv_policy::take_ownership);
  // Whether events wait for the control thread, when lanes have something to do, whether conversions wait.
  m.def(
      "pending",
      [](SteppedEndpoint& endpoint, PoolHandle& handle) {
        auto& pool = *handle.pool;
        const bool events = !endpoint.completions().empty() || !pool.completions().empty();
        return nb::make_tuple(events, endpoint.next_due(), !pool.idle());
      },
      "endpoint"_a, "pool"_a);
  m.def("step_pool", [](PoolHandle& handle) { return handle.pool->step(); }, "pool"_a);
}
