// SPDX-License-Identifier: Apache-2.0
// Memory that a library reads into. What it still writes late lands here, and in no page.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace sage_kvt {

// Who waits for a free one.
class SlotWaiter {
 public:
  virtual ~SlotWaiter() = default;
  virtual void look_again() = 0;
};

// `count` slots of `bytes` each, touched only as far as they are used. Any thread.
class Slots {
 public:
  // Throws std::system_error.
  Slots(size_t count, uint64_t bytes);
  ~Slots();
  Slots(const Slots&) = delete;
  Slots& operator=(const Slots&) = delete;

  uint64_t bytes() const { return bytes_; }
  uint64_t begin() const { return reinterpret_cast<uint64_t>(memory_); }
  uint64_t size() const { return count_ * bytes_; }
  // The address of a free one; 0 if there is none: `waiter` is told when one may be there.
  uint64_t take(const std::shared_ptr<SlotWaiter>& waiter);
  // Without any lock held.
  void give_back(uint64_t address);
  // They stay for ever: somebody may still write there.
  void abandon() { abandoned_ = true; }

 private:
  const size_t count_;
  const uint64_t bytes_;
  void* memory_;
  bool abandoned_ = false;
  std::mutex mutex_;
  std::vector<uint64_t> free_;
  std::vector<std::weak_ptr<SlotWaiter>> waiting_;
};

}  // namespace sage_kvt
