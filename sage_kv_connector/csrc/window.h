// SPDX-License-Identifier: Apache-2.0
// The receiver's side of a transfer: where the bytes of a linear space go, and which arrived.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "event.h"
#include "space.h"

namespace sage_kvt {

class Window {
 public:
  Window(uint64_t id, uint64_t connection, uint64_t generation, std::unique_ptr<Space> space, bool notify,
         std::vector<uint64_t> regions);

  const uint64_t id, connection, generation;
  const bool notify_chunks;
  const std::vector<uint64_t> regions;  // in use as long as the window is open
  uint64_t size() const { return size_; }
  // When its first chunk came; 0 before.
  uint64_t began_ns() const { return began_ns_; }
  const Space& space() const { return *space_; }

  // Reserve [offset, offset + length) for a chunk. kOk, or why it is refused; a byte is taken once only.
  Status reserve(uint64_t offset, uint64_t length, uint64_t generation);

  // What was reserved did not come, and may come again.
  void release(uint64_t offset, uint64_t length);

  // A copy runs between begin_copy and end_copy; false once the window is closed.
  bool begin_copy();
  void end_copy();

  // The chunk arrived and held; true if it was the last one.
  bool land(uint64_t offset, uint64_t length);
  // True the first time: the caller reports the failure.
  bool fail();

  // Waits for a running copy; afterwards begin_copy is false. Returns the bytes that landed.
  uint64_t close();

 private:
  const std::unique_ptr<Space> space_;
  const uint64_t size_;
  std::mutex mutex_;
  std::condition_variable idle_;
  std::map<uint64_t, uint64_t> taken_;  // offset -> end, disjoint, neighbours merged
  uint64_t landed_ = 0;
  std::atomic<uint64_t> began_ns_{0};
  int copies_ = 0;
  bool closed_ = false, failed_ = false;
};

// Pins a window for the length of one copy call.
class WindowPin {
 public:
  explicit WindowPin(Window& window) : window_(window), held_(window.begin_copy()) {}
  ~WindowPin() {
    if (held_) window_.end_copy();
  }
  WindowPin(const WindowPin&) = delete;
  WindowPin& operator=(const WindowPin&) = delete;
  explicit operator bool() const { return held_; }

 private:
  Window& window_;
  bool held_;
};

}  // namespace sage_kvt
