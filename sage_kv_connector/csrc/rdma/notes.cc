// SPDX-License-Identifier: Apache-2.0
#include "rdma/notes.h"

#include <netinet/in.h>

#include <cstring>

namespace sage_kvt {
namespace {

enum class Kind : uint32_t { kInvitation = 1, kEnded = 2 };

struct Address {
  uint16_t family, port;  // 4 or 6; in network order
  uint32_t zero;
  std::array<uint8_t, 16> host;
};
static_assert(sizeof(Address) == 24);

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
static_assert(sizeof(InvitationHead) + kMostAddresses * sizeof(Address) <= kMaxNoteBytes);

Address packed(const SocketAddress& from) {
  Address to{};
  if (from.storage.ss_family == AF_INET) {
    const auto& v4 = reinterpret_cast<const sockaddr_in&>(from.storage);
    to.family = 4;
    to.port = v4.sin_port;
    std::memcpy(to.host.data(), &v4.sin_addr, sizeof v4.sin_addr);
  } else {
    const auto& v6 = reinterpret_cast<const sockaddr_in6&>(from.storage);
    to.family = 6;
    to.port = v6.sin6_port;
    std::memcpy(to.host.data(), &v6.sin6_addr, sizeof v6.sin6_addr);
  }
  return to;
}

std::optional<SocketAddress> unpacked(const Address& from) {
  SocketAddress to{};
  if (from.family == 4) {
    auto& v4 = reinterpret_cast<sockaddr_in&>(to.storage);
    v4.sin_family = AF_INET;
    v4.sin_port = from.port;
    std::memcpy(&v4.sin_addr, from.host.data(), sizeof v4.sin_addr);
    to.size = sizeof v4;
  } else if (from.family == 6) {
    auto& v6 = reinterpret_cast<sockaddr_in6&>(to.storage);
    v6.sin6_family = AF_INET6;
    v6.sin6_port = from.port;
    std::memcpy(&v6.sin6_addr, from.host.data(), sizeof v6.sin6_addr);
    to.size = sizeof v6;
  } else {
    return std::nullopt;
  }
  return to;
}

template <typename T>
std::string bytes_of(const T& value) {
  return {reinterpret_cast<const char*>(&value), sizeof value};
}

}  // namespace

std::string note_of(const Invitation& invitation) {
  std::string note =
      bytes_of(InvitationHead{Kind::kInvitation, static_cast<uint32_t>(invitation.addresses.size()), invitation.token});
  for (const auto& address : invitation.addresses) note += bytes_of(packed(address));
  return note;
}

std::string note_of(const PathEnded& ended) { return bytes_of(EndedNote{Kind::kEnded, ended.path, ended.results}); }

std::optional<Invitation> invitation_of(const std::string& note) {
  InvitationHead head;
  if (note.size() < sizeof head) return std::nullopt;
  std::memcpy(&head, note.data(), sizeof head);
  if (head.kind != Kind::kInvitation || head.count == 0 || head.count > kMostAddresses) return std::nullopt;
  if (note.size() != sizeof head + head.count * sizeof(Address)) return std::nullopt;
  Invitation invitation{head.token, {}};
  for (uint32_t i = 0; i < head.count; ++i) {
    Address address;
    std::memcpy(&address, note.data() + sizeof head + i * sizeof address, sizeof address);
    const auto found = unpacked(address);
    if (!found) return std::nullopt;
    invitation.addresses.push_back(*found);
  }
  return invitation;
}

std::optional<PathEnded> path_ended_of(const std::string& note) {
  EndedNote ended;
  if (note.size() != sizeof ended) return std::nullopt;
  std::memcpy(&ended, note.data(), sizeof ended);
  if (ended.kind != Kind::kEnded) return std::nullopt;
  return PathEnded{ended.path, ended.results};
}

}  // namespace sage_kvt
