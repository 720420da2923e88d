// SPDX-License-Identifier: Apache-2.0
// Orders that cross each other: many threads, cancels, closes, and the end of an endpoint in full flight.
#include <algorithm>
#include <atomic>
#include <thread>

#include "pair.h"

using namespace sage_kvt;

namespace {

void many_threads_post_at_once(Kind kind) {
  Pair pair(kind);
  constexpr size_t kThreads = 4, kEach = 12, kCount = 24, kPage = 4096;
  std::vector<std::unique_ptr<Pages>> sources, targets;
  std::vector<uint64_t> windows;
  for (size_t i = 0; i < kThreads * kEach; ++i) {
    sources.push_back(std::make_unique<Pages>(*pair.from, kCount, kPage, i + 1));
    targets.push_back(std::make_unique<Pages>(*pair.to, kCount, kPage, i + 1000));
    sources.back()->fill(static_cast<uint32_t>(i));
    windows.push_back(pair.to->open_window(pair.receiving, targets.back()->segments(), i + 1, false));
  }
  std::vector<std::thread> threads;
  for (size_t t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      for (size_t i = t * kEach; i < (t + 1) * kEach; ++i)
        pair.from->post(pair.sending, pair.to->describe(windows[i]), sources[i]->descriptors(), i + 1,
                        static_cast<int>(i % 3), i % 2 == 0);
    });
  for (size_t i = 0; i < windows.size(); ++i) pair.to_inbox.take(EventKind::kWindowDone, windows[i]);
  for (size_t i = 0; i < windows.size(); ++i) {
    CHECK(pair.from_inbox.take(EventKind::kSent).status == Status::kOk);
    CHECK(targets[i]->equals(*sources[i]));
  }
  for (auto& thread : threads) thread.join();
}

// After SENT the source may be overwritten, and a window that is done holds what was there before.
void a_cancelled_post_leaves_no_trace_in_a_done_window(Kind kind) {
  Pair pair(kind);
  Pages source(*pair.from, 200, 16384, 1), target(*pair.to, 200, 16384, 2);
  for (uint32_t round = 0; round < 12; ++round) {
    source.fill(round);
    const std::vector<uint8_t> kept = source.bytes;
    const uint64_t window = pair.to->open_window(pair.receiving, target.segments(), round + 1, false);
    const uint64_t post =
        pair.from->post(pair.sending, pair.to->describe(window), source.descriptors(), round + 1, 0, false);
    if (round % 3) std::this_thread::sleep_for(std::chrono::microseconds(100 * round));
    pair.from->cancel(post);
    const Event sent = pair.from_inbox.take(EventKind::kSent, post);
    std::fill(source.bytes.begin(), source.bytes.end(), uint8_t{0xEE});
    if (sent.status == Status::kOk) {
      pair.to_inbox.take(EventKind::kWindowDone, window);
      source.bytes = kept;
      CHECK(target.equals(source));
    } else {
      CHECK(sent.status == Status::kCancelled);
      pair.to->close_window(window);
    }
  }
}

void nothing_is_written_after_close_window(Kind kind) {
  Pair pair(kind);
  Pages source(*pair.from, 400, 16384, 1), target(*pair.to, 400, 16384, 2);
  source.fill(1);
  for (uint32_t round = 0; round < 8; ++round) {
    const uint64_t window = pair.to->open_window(pair.receiving, target.segments(), round + 1, false);
    const uint64_t post =
        pair.from->post(pair.sending, pair.to->describe(window), source.descriptors(), round + 1, 0, true);
    std::this_thread::sleep_for(std::chrono::microseconds(150 * round));
    pair.to->close_window(window);
    std::fill(target.bytes.begin(), target.bytes.end(), uint8_t{0x55});
    pair.from_inbox.take(EventKind::kSent, post);
    for (uint8_t byte : target.bytes) CHECK_EQUAL(byte, 0x55);
  }
}

void a_connection_closes_in_full_flight(Kind kind) {
  for (int round = 0; round < 6; ++round) {
    Pair pair(kind);
    Pages source(*pair.from, 300, 16384, 1), target(*pair.to, 300, 16384, 2);
    const uint64_t window = pair.to->open_window(pair.receiving, target.segments(), 3, false);
    const uint64_t post = pair.from->post(pair.sending, pair.to->describe(window), source.descriptors(), 3, 0, true);
    std::this_thread::sleep_for(std::chrono::microseconds(200 * round));
    auto& closing = round % 2 ? *pair.from : *pair.to;
    closing.close_connection(round % 2 ? pair.sending : pair.receiving, Status::kCancelled, "test");
    pair.from_inbox.take(EventKind::kSent, post);
    pair.from_inbox.take(EventKind::kClosed);
    pair.to_inbox.take(EventKind::kClosed);
  }
}

void endpoints_end_in_full_flight(Kind kind) {
  for (int round = 0; round < 6; ++round) {
    auto pair = std::make_unique<Pair>(kind);
    Pages source(*pair->from, 300, 16384, 1), target(*pair->to, 300, 16384, 2);
    const uint64_t window = pair->to->open_window(pair->receiving, target.segments(), 3, false);
    const auto described = pair->to->describe(window);
    std::atomic<bool> go_on{true};
    std::thread poster([&] {
      while (go_on) {
        try {
          pair->from->post(pair->sending, described, source.descriptors(), 3, 0, true);
          pair->from->send(pair->sending, "hello");
        } catch (const std::invalid_argument&) {
          break;
        }
      }
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(round));
    (round % 2 ? pair->from : pair->to)->close();
    go_on = false;
    poster.join();
    pair.reset();  // before the memory that its posts name
  }
}

}  // namespace

int main() {
  for (Kind kind : kKinds) {
    std::cerr << "-- " << name_of(kind) << "\n";
    RUN(many_threads_post_at_once(kind));
    RUN(a_cancelled_post_leaves_no_trace_in_a_done_window(kind));
    RUN(nothing_is_written_after_close_window(kind));
    RUN(a_connection_closes_in_full_flight(kind));
    RUN(endpoints_end_in_full_flight(kind));
  }
}
