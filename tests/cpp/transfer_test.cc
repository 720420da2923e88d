// SPDX-License-Identifier: Apache-2.0
// Whole transfers between two endpoints of one process.
#include <algorithm>
#include <numeric>

#include "pair.h"

using namespace sage_kvt;

namespace {

void shuffled_pages_are_exact(Kind kind) {
  constexpr size_t kPage = 4096, kPages = 1024;
  const Bytes source = random_bytes(kPages * kPage, 1);
  Bytes target(source.size());
  Pair pair(kind);  // its windows end before the memory does
  const uint64_t window = pair.open(target);
  source.register_at(pair.sender);
  std::vector<size_t> from(kPages), order(kPages);
  std::iota(from.begin(), from.end(), 0);
  std::iota(order.begin(), order.end(), 0);
  std::mt19937 random(2);
  std::shuffle(from.begin(), from.end(), random);
  std::shuffle(order.begin(), order.end(), random);
  for (size_t part = 0; part < 4; ++part) {
    std::vector<Descriptor> descriptors;
    for (size_t i = part; i < kPages; i += 4)
      descriptors.push_back({address_of(source) + from[order[i]] * kPage, order[i] * kPage, kPage});
    pair.sender->post(pair.to_receiver, pair.receiver->describe(window), descriptors, 1, 0, part % 2 == 0);
  }
  pair.received.wait_for(EventKind::kWindowDone, window);
  pair.sent.until([&] { return pair.sent.count(EventKind::kSent) == 4; });
  for (size_t i = 0; i < kPages; ++i)
    CHECK(std::equal(target.begin() + static_cast<long>(i * kPage), target.begin() + static_cast<long>((i + 1) * kPage),
                     source.begin() + static_cast<long>(from[i] * kPage)));
}

// Several threads post at once, each to windows of its own, while another polls.
void many_threads_post(Kind kind) {
  constexpr size_t kThreads = 4, kPosts = 40, kSize = 70001;
  std::vector<Bytes> sources, targets(kThreads * kPosts, Bytes(kSize));
  Pair pair(kind);  // its windows end before the memory does
  std::vector<uint64_t> windows;
  for (size_t i = 0; i < targets.size(); ++i) {
    sources.push_back(random_bytes(kSize, static_cast<unsigned>(i)));
    windows.push_back(pair.open(targets[i]));
  }
  std::vector<std::thread> threads;
  for (size_t t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      for (size_t i = t; i < windows.size(); i += kThreads)
        pair.post(windows[i], sources[i], 1, static_cast<int>(i % 3));
    });
  std::thread receiving(
      [&] { pair.received.until([&] { return pair.received.count(EventKind::kWindowDone) == windows.size(); }); });
  pair.sent.until([&] { return pair.sent.count(EventKind::kSent) == windows.size(); });
  receiving.join();
  for (auto& thread : threads) thread.join();
  CHECK(sources == targets);
  for (const auto& event : pair.sent.events)
    if (event.kind == EventKind::kSent) CHECK(event.status == Status::kOk && event.length == kSize);
}

void urgent_posts_overtake(Kind kind) {
  const Bytes source = random_bytes(40u << 20, 1), urgent = random_bytes(100000, 2);
  Bytes target(source.size()), urgent_target(urgent.size());
  Pair pair(kind, 1u << 20, /*trusted=*/false);  // its windows end before the memory does
  const uint64_t window = pair.open(target), urgent_window = pair.open(urgent_target);
  pair.post(window, source, 1, 5);
  pair.post(urgent_window, urgent, 1, -5);
  pair.trust(kind);
  pair.received.wait_for(EventKind::kWindowDone, window);
  // Of several lanes the one with the urgent bytes may be read last.
  if (lanes_of(kind) == 1) CHECK(pair.received.find(EventKind::kWindowDone, urgent_window) != nullptr);
  pair.received.wait_for(EventKind::kWindowDone, urgent_window);
  pair.sent.until([&] { return pair.sent.count(EventKind::kSent) == 2; });
  CHECK(target == source && urgent_target == urgent);
}

void messages_keep_their_order(Kind kind) {
  Pair pair(kind);
  constexpr size_t kMessages = 3000;
  std::thread sending([&] {
    for (size_t i = 0; i < kMessages;)
      if (pair.sender->send(pair.to_receiver, std::string(i % 5000, 'x') + std::to_string(i)))
        ++i;
      else
        std::this_thread::yield();
  });
  pair.received.until([&] { return pair.received.count(EventKind::kMessage) == kMessages; });
  sending.join();
  size_t next = 0;
  for (const auto& event : pair.received.events)
    if (event.kind == EventKind::kMessage) {
      CHECK(event.payload == std::string(next % 5000, 'x') + std::to_string(next));
      ++next;
    }
}

// What lanes count while others read it, and what a time is counted as.
void counts_are_right_and_read_at_any_time(Kind kind) {
  Pair pair(kind);
  constexpr size_t kBytes = 4096, kPosts = 200;
  const Bytes source = random_bytes(kBytes, 3);
  source.register_at(pair.sender);
  std::atomic<bool> over{false};
  std::thread reading([&] {
    uint64_t before = 0;
    while (!over) {
      for (const auto& [id, sent, landed] : pair.sender->traffic()) {
        CHECK(id == pair.to_receiver && sent >= before && landed == 0);
        before = sent;
      }
      uint64_t small = 0;
      for (size_t i = 0; i < Histogram::kBuckets; ++i) small += pair.sender->counters.small_posts.count(i);
      CHECK(small <= kPosts);
    }
  });
  for (size_t i = 0; i < kPosts; ++i) {
    Bytes target(kBytes);
    const uint64_t window = pair.open(target);
    const uint64_t post = pair.sender->post(pair.to_receiver, pair.receiver->describe(window),
                                            {{address_of(source), 0, kBytes}}, 1, 0, true);
    const Event sent = pair.sent.wait_for(EventKind::kSent, post);
    const Event done = pair.received.wait_for(EventKind::kWindowDone, window);
    CHECK(sent.began_ns > 0 && sent.began_ns <= sent.time_ns);
    CHECK(done.began_ns > 0 && done.began_ns <= done.time_ns);
    pair.receiver->close_window(window);
  }
  over = true;
  reading.join();
  uint64_t small = 0, ns = 0;
  for (size_t i = 0; i < Histogram::kBuckets; ++i) {
    small += pair.sender->counters.small_posts.count(i);
    ns += pair.sender->counters.small_posts.sum_ns(i);
  }
  CHECK(small == kPosts && ns > 0);
  CHECK(pair.sender->counters.bytes_sent == kPosts * kBytes);
  const auto traffic = pair.receiver->traffic();
  CHECK(traffic.size() == 1 && std::get<2>(traffic[0]) == kPosts * kBytes);
  pair.sender->close_connection(pair.to_receiver, Status::kCancelled, "");
  const Event closed = pair.sent.wait_for(EventKind::kClosed, 0);
  CHECK(closed.offset == kPosts * kBytes && closed.length == 0);
}

void a_time_is_counted_below_its_power_of_two(Kind) {
  CHECK(Histogram::bucket_of(0) == 0 && Histogram::bucket_of(1000) == 0 && Histogram::bucket_of(1001) == 1);
  for (size_t bucket = 1; bucket + 1 < Histogram::kBuckets; ++bucket) {
    const uint64_t end = 1000ull << bucket;
    CHECK(Histogram::bucket_of(end) == bucket && Histogram::bucket_of(end + 1) == bucket + 1);
  }
  CHECK(Histogram::bucket_of(~0ull - 1000) == Histogram::kBuckets - 1);
}

}  // namespace

int main() {
  for (Kind kind : kinds()) {
    std::fprintf(stderr, "kind %d\n", static_cast<int>(kind));
    RUN(shuffled_pages_are_exact, kind);
    RUN(many_threads_post, kind);
    RUN(urgent_posts_overtake, kind);
    RUN(messages_keep_their_order, kind);
    RUN(counts_are_right_and_read_at_any_time, kind);
    RUN(a_time_is_counted_below_its_power_of_two, kind);
  }
}
