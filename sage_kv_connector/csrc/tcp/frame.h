// SPDX-License-Identifier: Apache-2.0
// What a tcp lane writes before and after its payload. docs/protocol.md, "tcp", is the format.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace sage_kvt {

enum class FrameType : uint8_t {
  kPreface = 1,
  kMessage = 2,
  kData = 3,
  kJoin = 4,
  kPing = 5,
  kPong = 6,
  kGrant = 7,
  kNote = 8,
  kTaken = 9,
  kEnded = 10
};

// One of a connection's lanes: its number, and how often it was dialled before.
struct LaneId {
  size_t lane = 0;
  uint32_t turn = 0;

  uint64_t packed() const { return lane | uint64_t{turn} << 8; }
  // Any number makes one; whether it is allowed is another matter.
  static LaneId unpacked(uint64_t number) {
    return {number & 0xff, static_cast<uint32_t>(number >> 8 > UINT32_MAX ? UINT32_MAX : number >> 8)};
  }
  bool operator==(const LaneId&) const = default;
};
// Two sides that lost a lane so often do without it.
constexpr uint32_t kMostTurns = 4096;

struct FrameHeader {
  uint32_t magic;
  uint8_t type;
  uint8_t flags;
  uint16_t reserved;
  uint64_t length;
  uint64_t window;
  uint64_t offset;
  uint64_t generation;
  std::array<uint8_t, 16> token;
  uint32_t zero;
  uint32_t header_crc;
};
static_assert(sizeof(FrameHeader) == 64);

struct FrameTrailer {
  uint32_t crc;
  uint32_t aborted;
  uint64_t generation;
};
static_assert(sizeof(FrameTrailer) == 16);

constexpr uint32_t kFrameMagic = 0x54564B53;  // "SKVT"
constexpr uint8_t kFlagChecksum = 1;
constexpr size_t kMaxNoteBytes = 20u << 10;

using Token = std::array<uint8_t, 16>;
bool equal_in_constant_time(const Token& a, const Token& b);
// What a protected frame carries behind its header, and behind its body.
using Tag = std::array<uint8_t, 16>;

// As they are read: without the tags where nothing is protected.
struct FrameStart {
  FrameHeader header;
  Tag tag;
};
static_assert(sizeof(FrameStart) == 80);

struct FrameEnd {
  FrameTrailer trailer;
  Tag tag;
};
static_assert(sizeof(FrameEnd) == 32);

// Over all fields before it.
uint32_t frame_header_crc(const FrameHeader& header);

// A header of this type, sealed, without payload.
FrameHeader control_frame(FrameType type, const Token& token, uint64_t number, uint64_t window = 0);

}  // namespace sage_kvt
