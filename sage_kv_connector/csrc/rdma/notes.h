// SPDX-License-Identifier: Apache-2.0
// What the endpoints of an rdma connection write to each other over its sockets. docs/protocol.md, "rdma".
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "path/cell.h"
#include "tcp/tcp_endpoint.h"

namespace sage_kvt {

// Where the side that accepted a connection takes paths of it, and what to show there.
struct Invitation {
  std::array<uint8_t, 16> token{};
  std::vector<SocketAddress> addresses;
};

// A path is gone on this side; how the last chunks that came over it ended.
struct PathEnded {
  uint32_t path = 0;
  Results results{};
};

std::string note_of(const Invitation& invitation);
std::string note_of(const PathEnded& ended);
// Nothing if it is none.
std::optional<Invitation> invitation_of(const std::string& note);
std::optional<PathEnded> path_ended_of(const std::string& note);

}  // namespace sage_kvt
