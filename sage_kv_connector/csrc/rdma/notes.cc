// SPDX-License-Identifier: Apache-2.0
#include "rdma/notes.h"

#include <cstring>

namespace sage_kvt {
namespace {

enum class Kind : uint32_t { kInvitation = 1, kEnded = 2 };

struct InvitationHead {
  Kind kind;
  uint32_t count;
  std::array<uint8_t, 16> token;
};

struct EndedNote {
  Kind kind;
  uint32_t path;
  Results results;
};
static_assert(sizeof(EndedNote) <= kMaxNoteBytes);
static_assert(sizeof(InvitationHead) + kMostAddresses * sizeof(WrittenAddress) <= kMaxNoteBytes);

template <typename T>
std::string bytes_of(const T& value) {
  return {reinterpret_cast<const char*>(&value), sizeof value};
}

}  // namespace

std::string note_of(const Invitation& invitation) {
  const InvitationHead head{Kind::kInvitation, static_cast<uint32_t>(invitation.addresses.size()), invitation.token};
  return bytes_of(head) + written(invitation.addresses);
}

std::string note_of(const PathEnded& ended) { return bytes_of(EndedNote{Kind::kEnded, ended.path, ended.results}); }

std::optional<Invitation> invitation_of(const std::string& note) {
  InvitationHead head;
  if (note.size() < sizeof head) return std::nullopt;
  std::memcpy(&head, note.data(), sizeof head);
  if (head.kind != Kind::kInvitation) return std::nullopt;
  const auto addresses = read_addresses(note.data() + sizeof head, note.size() - sizeof head);
  if (!addresses || addresses->size() != head.count) return std::nullopt;
  return Invitation{head.token, *addresses};
}

std::optional<PathEnded> path_ended_of(const std::string& note) {
  EndedNote ended;
  if (note.size() != sizeof ended) return std::nullopt;
  std::memcpy(&ended, note.data(), sizeof ended);
  if (ended.kind != Kind::kEnded) return std::nullopt;
  return PathEnded{ended.path, ended.results};
}

}  // namespace sage_kvt
