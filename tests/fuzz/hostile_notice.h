// SPDX-License-Identifier: Apache-2.0
// A notice of a chunk as a hostile peer may write it into a cell: mostly one that makes sense.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "attacked_connection.h"
#include "input.h"
#include "path/cell.h"

namespace sage_kvt::fuzz {

struct HostileNotice {
  uint32_t cell;
  std::string bytes;  // the notice, and its pieces
};

inline HostileNotice notice_from(Input& input, const AttackedConnection& attacked) {
  CellNotice notice{};
  const uint8_t how = input.byte();
  const uint32_t cell = input.byte() % kCells;
  notice.number = how & 1 ? input.number<uint64_t>() : input.byte();
  notice.window = attacked.window_named(input.byte());
  notice.offset = how & 128 ? input.number<uint64_t>() : input.number<uint16_t>();
  notice.length = how & 2 ? input.number<uint64_t>() : input.number<uint16_t>();
  notice.generation = how & 4 ? input.number<uint64_t>() : kGeneration;
  notice.flags = how >> 4 & 3;
  std::vector<RemotePiece> pieces(notice.flags & kNoticeHoldsBytes ? 0 : 1 + input.byte() % 8);
  uint64_t left = notice.length;
  for (auto& piece : pieces) {
    piece.address = input.number<uint64_t>();
    piece.length = static_cast<uint32_t>(&piece == &pieces.back() ? left : std::min<uint64_t>(left, input.byte() * 8u));
    left -= piece.length;
  }
  notice.crc = how & 8 ? input.number<uint32_t>() : 0;
  notice.pieces = how & 64 ? input.number<uint16_t>() : static_cast<uint16_t>(pieces.size());
  HostileNotice made{cell, {reinterpret_cast<const char*>(&notice), sizeof notice}};
  made.bytes.append(reinterpret_cast<const char*>(pieces.data()), pieces.size() * sizeof(RemotePiece));
  return made;
}

}  // namespace sage_kvt::fuzz
