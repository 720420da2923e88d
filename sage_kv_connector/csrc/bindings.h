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

void bind_conversion(nanobind::module_& m);
void bind_paged(nanobind::module_& m);
void bind_parts(nanobind::module_& m);
void bind_simulation(nanobind::module_& m);

}  // namespace sage_kvt
