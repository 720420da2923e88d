// SPDX-License-Identifier: Apache-2.0
// One direction of one lane under AES-128-GCM. docs/protocol.md, "Protected frames", is the format.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tcp/frame.h"
#include "tcp/libcrypto.h"

namespace sage_kvt {

constexpr size_t kMaxLanes = 16;

struct LaneKey {
  std::array<uint8_t, 16> key;
  std::array<uint8_t, 12> iv;
};
static_assert(sizeof(LaneKey) == 28);
constexpr size_t kLaneKeysBytes = kMaxLanes * sizeof(LaneKey);

// Of a connection, by lane. Wiped when it goes.
struct ConnectionKeys {
  // Throws std::invalid_argument for another length, std::runtime_error without libcrypto.
  ConnectionKeys(bool encrypts, const std::string& send, const std::string& receive);
  ~ConnectionKeys();
  ConnectionKeys(const ConnectionKeys&) = delete;
  ConnectionKeys& operator=(const ConnectionKeys&) = delete;

  const LibCrypto& crypto;
  const bool encrypts;
  std::array<LaneKey, kMaxLanes> send, receive;
};

// Either seals what leaves or opens what comes. Each header and each body is a message of its own, with the next
// number as its nonce; a body is bound to its header. False: the tag does not hold, or the key is used up.
class LaneCipher {
 public:
  enum class Direction { kSeal, kOpen };
  // Bytes under one key, so that what GCM promises holds with room to spare.
  static constexpr uint64_t kMaxBytes = uint64_t{1} << 46;

  // A lane's key goes on each time that it is dialled again, with numbers that it never had.
  LaneCipher(const std::shared_ptr<const ConnectionKeys>& keys, Direction direction, const LaneId& lane);
  ~LaneCipher();
  LaneCipher(const LaneCipher&) = delete;
  LaneCipher& operator=(const LaneCipher&) = delete;

  bool encrypts() const { return encrypts_; }
  bool worn() const { return bytes_ >= kMaxBytes; }

  // The tag of a header is made (seal) or compared (open).
  bool header(const FrameHeader& header, Tag* tag);
  // A body begins, goes on piece by piece, and ends with its tag. `out` may be `in`; without encryption nothing is
  // written, and `out` is not used.
  bool begin(const FrameHeader& header);
  bool pass(const void* in, void* out, size_t length);
  bool end(Tag* tag);

 private:
  bool next_nonce();
  bool authenticate(const void* data, size_t length);

  const LibCrypto& crypto_;
  const bool seals_, encrypts_;
  std::array<uint8_t, 12> iv_;
  LibCrypto::Context* context_;
  uint64_t number_, bytes_ = 0;
};

// Seconds in which one thread seals `bytes`, a slice of `slice` bytes at a time. Throws as ConnectionKeys.
double measure_cipher(bool encrypts, uint64_t bytes, uint64_t slice);

}  // namespace sage_kvt
