// SPDX-License-Identifier: Apache-2.0
// What the data plane reports, and the queue it comes out of.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

namespace sage_kvt {

// Values are those of sage_kv_connector/backends/base.py.
enum class EventKind : int {
  kConnected = 1,
  kAccepted = 2,
  kClosed = 3,
  kMessage = 4,
  kSent = 5,
  kLanded = 6,
  kWindowDone = 7,
  kWindowFailed = 8,
  kConverted = 9,
  kPartsReady = 10,
  kPartsDone = 11,
  kPartToConvert = 12,
  kTurnedAway = 13,
};

enum class Status : int {
  kOk = 0,
  kCancelled = 1,
  kConnectionLost = 2,
  kChecksumMismatch = 3,
  kStaleGeneration = 4,
  kOutOfBounds = 5,
  kOverlap = 6,
  kProtocolError = 7,
  kRefused = 8,
  kIoError = 9,
  kBeyondEnd = 10,
  kSilent = 11,
  kNotConverted = 12,
  kForged = 13,
};

// CLOCK_MONOTONIC in nanoseconds; comparable between processes of one node.
uint64_t now_ns();
#ifdef SAGE_KVT_SIMULATION
// What `now_ns` says instead, until it is set to 0.
void simulate_now(uint64_t ns);
#endif

struct Event {
  EventKind kind = EventKind::kClosed;
  uint64_t connection = 0;
  uint64_t id = 0;
  Status status = Status::kOk;
  uint64_t offset = 0;
  uint64_t length = 0;
  uint64_t time_ns = 0;
  uint64_t began_ns = 0;  // when the first chunk of a post was cut, or came for a window
  std::string payload;
  std::string detail;
};

// Many lanes push, one or more threads take. The eventfd is readable while events wait.
class CompletionQueue {
 public:
  CompletionQueue();
  ~CompletionQueue();
  CompletionQueue(const CompletionQueue&) = delete;
  CompletionQueue& operator=(const CompletionQueue&) = delete;

  void push(Event event);
  std::vector<Event> take(size_t max_events);
  bool empty() const;
  // Blocks until an event waits (true), `deadline_ns` is over or the queue was closed.
  bool wait(uint64_t deadline_ns);
  // -1 once closed.
  int fd() const;
  // Ends every wait and closes the eventfd; events can still be taken.
  void close();

 private:
  mutable std::mutex mutex_;
  std::deque<Event> events_;
  int fd_;
  size_t waiting_ = 0;
  bool closed_ = false;
  std::condition_variable nobody_waits_;
};

}  // namespace sage_kvt
