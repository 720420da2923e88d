// SPDX-License-Identifier: Apache-2.0
#include "carried/notes.h"

#include <algorithm>
#include <cstring>

namespace sage_kvt {
namespace {

struct Head {
  CarriedNote::Kind kind;
  uint32_t zero;
  uint64_t total, offset;
};
static_assert(sizeof(Head) == 24);
static_assert(sizeof(Head) + std::max<uint64_t>(kMostInPiece, kCellBytes) <= kMaxNoteBytes);

bool valid(const CarriedNote& note) {
  const size_t size = note.body.size();
  switch (note.kind) {
    case CarriedNote::Kind::kInvitation:
      return size == 0;
    case CarriedNote::Kind::kDescription:
      return size > 0 && size <= kMostInPiece && note.total <= kMaxDescriptionBytes && note.offset < note.total &&
             size <= note.total - note.offset;
    case CarriedNote::Kind::kAble:
      return size == 0 && note.total > 0;
    case CarriedNote::Kind::kUnable:
      return size <= kMostWhy;
    case CarriedNote::Kind::kWord:
      return size <= kCellBytes && note.total <= UINT32_MAX;
  }
  return false;
}

}  // namespace

std::string note_of(const CarriedNote& note) {
  const Head head{note.kind, 0, note.total, note.offset};
  std::string bytes(reinterpret_cast<const char*>(&head), sizeof head);
  return bytes += note.body;
}

std::optional<CarriedNote> carried_note_of(const std::string& note) {
  Head head;
  if (note.size() < sizeof head) return std::nullopt;
  std::memcpy(&head, note.data(), sizeof head);
  CarriedNote read{head.kind, head.total, head.offset, note.substr(sizeof head)};
  if (!valid(read)) return std::nullopt;
  return read;
}

}  // namespace sage_kvt
