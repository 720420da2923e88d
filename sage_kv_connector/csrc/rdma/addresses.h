// SPDX-License-Identifier: Apache-2.0
// Which of this machine's addresses RDMA devices have.
#pragma once

#include <vector>

#include "rdma/device.h"
#include "rdma/notes.h"

namespace sage_kvt {

// One for each port that is up, without a port number. `events`: where nothing of it will be told.
std::vector<SocketAddress> rdma_addresses(const Verbs& verbs, const VerbsDevices& devices, rdma_event_channel* events);

}  // namespace sage_kvt
