// SPDX-License-Identifier: Apache-2.0
// A conversion pool whose tasks run where it is said, on the thread that says so, and whose conversions are Python's.
#pragma once

namespace sage_kvt::fuzz {

// Runs all tasks that wait in any pool, and those that they bring.
void run_tasks();
// As when a pool is closed.
void drop_tasks();

}  // namespace sage_kvt::fuzz
