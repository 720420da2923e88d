// SPDX-License-Identifier: Apache-2.0
// Whether a socket's network still carries what it sends.
#pragma once

#include <cstdint>

namespace sage_kvt {

class SocketProgress {
 public:
  // So often it is looked at while something is on the way.
  static constexpr uint64_t kLookNs = 25000000;

  enum class Verdict { kIdle, kMoves, kSlow, kStalled };
  // Idle: all that was sent was acknowledged. Stalled: nothing of it for so long that no healthy network would need;
  // slow: for half of that.
  Verdict look(int fd, uint64_t now);
  // From when on it was slow, if it is.
  uint64_t slow_since() const { return since_ + patience_ / 2; }

 private:
  uint64_t acknowledged_ = 0, since_ = 0, patience_ = 0;
};

}  // namespace sage_kvt
