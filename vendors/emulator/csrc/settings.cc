// SPDX-License-Identifier: Apache-2.0
#include "settings.h"

#include <functional>
#include <map>
#include <sstream>
#include <stdexcept>

namespace sage_emulator {

std::string parse_settings(const std::string& text, Settings* settings) {
  using Reader = std::function<void(const std::string&)>;
  const auto whole = [](int64_t* field) -> Reader {
    return [field](const auto& value) { *field = std::stoll(value); };
  };
  const auto flag = [](bool* field) -> Reader {
    return [field](const auto& value) { *field = std::stoi(value) != 0; };
  };
  const auto scaled = [](double* field, double factor) -> Reader {
    return [=](const auto& value) { *field = std::stod(value) * factor; };
  };
  const auto rate = [&](Direction direction) {
    return scaled(&settings->bytes_per_second[static_cast<int>(direction)], 1e9);
  };
  const std::map<std::string, Reader> readers = {
      {"devices", whole(&settings->devices)},
      {"memory_bytes", whole(&settings->memory_bytes)},
      {"dma_alignment_bytes", whole(&settings->dma_alignment_bytes)},
      {"max_transfer_bytes", whole(&settings->max_transfer_bytes)},
      {"h2d_gbytes_per_s", rate(Direction::kHostToDevice)},
      {"d2h_gbytes_per_s", rate(Direction::kDeviceToHost)},
      {"d2d_gbytes_per_s", rate(Direction::kDeviceToDevice)},
      {"peer_gbytes_per_s", rate(Direction::kPeer)},
      {"latency_us", scaled(&settings->latency_seconds, 1e-6)},
      {"pinned_only", flag(&settings->pinned_only)},
      {"ipc", flag(&settings->ipc)},
      {"virtual_memory", flag(&settings->virtual_memory)},
      {"held", whole(&settings->held)},
      {"out_of_memory_after_bytes", whole(&settings->out_of_memory_after_bytes)},
      {"dma_error_after_copies", whole(&settings->dma_error_after_copies)},
      {"device_lost_after_copies", whole(&settings->device_lost_after_copies)},
      {"count_copies_anew", flag(&settings->count_copies_anew)},
      {"peer_access",
       [settings](const std::string& value) {
         settings->peer_access.clear();
         std::istringstream rows(value);
         for (std::string row; std::getline(rows, row, ';');) settings->peer_access.push_back(row);
       }},
  };
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const size_t equals = line.find('=');
    const auto reader = readers.find(line.substr(0, equals));
    if (equals == std::string::npos || reader == readers.end()) return "unknown setting: " + line;
    try {
      reader->second(line.substr(equals + 1));
    } catch (const std::exception&) {
      return "not a value: " + line;
    }
  }
  if (settings->devices < 0 || settings->memory_bytes <= 0 || settings->dma_alignment_bytes < 1)
    return "devices must be at least 0, memory_bytes and dma_alignment_bytes at least 1";
  if (static_cast<int64_t>(settings->peer_access.size()) != settings->devices)
    return "peer_access must have one row a device";
  for (const auto& row : settings->peer_access)
    if (static_cast<int64_t>(row.size()) != settings->devices) return "peer_access must have one column a device";
  return "";
}

}  // namespace sage_emulator
