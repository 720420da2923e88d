// SPDX-License-Identifier: Apache-2.0
// What the endpoints of a carried connection write to each other over its sockets. docs/protocol.md, "nixl, mooncake".
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "path/cell.h"
#include "tcp/frame.h"

namespace sage_kvt {

// A library's description of an endpoint is longer than a note may be: it comes in pieces.
constexpr uint64_t kMaxDescriptionBytes = 1u << 20;
constexpr uint64_t kMostInPiece = 16u << 10;
constexpr size_t kMostWhy = 512;

struct CarriedNote {
  enum class Kind : uint32_t { kInvitation = 1, kDescription = 2, kAble = 3, kUnable = 4, kWord = 5 } kind;
  // kDescription: of the whole, and where the body belongs. kAble: total is the longest chunk. kWord: the word.
  uint64_t total = 0, offset = 0;
  // kDescription: a piece. kUnable: why. kWord: what the cell holds, if it is of a chunk.
  std::string body{};
};

std::string note_of(const CarriedNote& note);
// Nothing if it is none.
std::optional<CarriedNote> carried_note_of(const std::string& note);

}  // namespace sage_kvt
