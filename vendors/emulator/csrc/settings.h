// SPDX-License-Identifier: Apache-2.0
// What a person can set about the emulated machine. The names and their meaning are EmulatorSettings'.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sage_emulator {

enum class Direction { kHostToDevice, kDeviceToHost, kDeviceToDevice, kPeer };
constexpr int kDirections = 4;

struct Settings {
  int64_t devices = 2;
  int64_t memory_bytes = 0;
  int64_t dma_alignment_bytes = 1;
  int64_t max_transfer_bytes = 0;             // 0: any
  double bytes_per_second[kDirections] = {};  // 0: as fast as memcpy; index is a Direction
  double latency_seconds = 0;
  bool pinned_only = false;
  bool ipc = true;
  bool virtual_memory = false;           // of allocations from now on
  std::vector<std::string> peer_access;  // a row a device, '1' where it reaches that peer
  int64_t held = 0;                      // bits of Directions whose engines stand still
  int64_t out_of_memory_after_bytes = -1;
  int64_t dma_error_after_copies = -1;
  int64_t device_lost_after_copies = -1;
  bool count_copies_anew = false;  // both count from this setting on
};

// Reads lines "name=value"; returns what is wrong, or nothing.
std::string parse_settings(const std::string& text, Settings* settings);

}  // namespace sage_emulator
