// SPDX-License-Identifier: Apache-2.0
// What the parts of the Python module share.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "endpoint.h"

namespace sage_kvt {

// Tuples in the order of sage_kv_connector.backends.base.Event.
nanobind::list events_of(std::vector<Event> events);

// What a peer sent; throws std::invalid_argument for another size.
WindowDescriptor window_descriptor(const nanobind::bytes& data);

// Throws std::invalid_argument naming what is out of range.
EndpointOptions options_of(int lanes, uint64_t chunk_bytes, uint64_t spin_us, bool measures);

// After TcpEndpoint.
void bind_carried(nanobind::module_& m);
void bind_conversion(nanobind::module_& m);
void bind_paged(nanobind::module_& m);
void bind_parts(nanobind::module_& m);
void bind_simulation(nanobind::module_& m);

}  // namespace sage_kvt
