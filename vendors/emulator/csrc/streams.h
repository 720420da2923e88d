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

// In flight is the memory whose addresses stand in the argument; what is found through tables is not known.
struct Launch : InFlight {
  Kernel kernel = nullptr;
  std::vector<uint8_t> argument;
  unsigned blocks[2] = {};
  unsigned threads = 0;
  unsigned shared_bytes = 0;
};

struct Operation {
  enum class What { kCopy, kRecord, kWait, kLaunch } what;
  std::vector<Move> moves;
  std::shared_ptr<Event> event;
  uint64_t generation = 0;
  std::chrono::steady_clock::time_point enqueued{};
  std::unique_ptr<Launch> launch = nullptr;
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
