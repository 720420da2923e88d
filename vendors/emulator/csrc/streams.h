// SPDX-License-Identifier: Apache-2.0
// The inside of streams and events, shared by the files that fill and drain queues.
#pragma once

#include "machine.h"

namespace sage_emulator {

struct Event {
  explicit Event(int on) : device(on) {}
  const int device;
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t recorded = 0;   // how often it was recorded, counted when the call was made
  uint64_t completed = 0;  // the last of these that the stream reached
  Status status = Status::kOk;
};

struct Operation {
  enum class What { kCopy, kRecord, kWait } what;
  std::vector<Move> moves;
  std::shared_ptr<Event> event;
  uint64_t generation = 0;
  std::chrono::steady_clock::time_point enqueued{};
};

struct Stream {
  explicit Stream(int on) : device(on) {}
  const int device;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Operation> queue;
  uint64_t enqueued = 0, finished = 0;
  bool closing = false;
  Status status = Status::kOk;  // the first failure stays: later work of the stream is dropped
};

}  // namespace sage_emulator
