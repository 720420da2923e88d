// SPDX-License-Identifier: Apache-2.0
// What the machine itself can do, measured with plain loops: the floor that benchmarks compare with.
#pragma once

#include <cstdint>
#include <vector>

#include "window.h"

namespace sage_kvt {

// Seconds to copy `remote` runs of process `pid` into `local` runs, 512 of each a call. Throws std::system_error.
double measure_process_vm_readv(int pid, const std::vector<Segment>& local, const std::vector<Segment>& remote);

// Seconds to memcpy runs in this process, pairwise.
double measure_memcpy(const std::vector<Segment>& to, const std::vector<Segment>& from);

// The two ends of a plain blocking loopback socket pair, `block` bytes a call; seconds for all bytes.
double measure_socket_send(int fd, const void* data, uint64_t size, uint64_t block);
double measure_socket_receive(int fd, void* data, uint64_t size, uint64_t block);

// Half round trips of `block` bytes in seconds; the echoing end calls socket_echo.
std::vector<double> measure_socket_ping(int fd, uint64_t block, int count);
void socket_echo(int fd, uint64_t block, int count);

}  // namespace sage_kvt
