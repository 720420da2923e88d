// SPDX-License-Identifier: Apache-2.0
// Whole transfers between two endpoints of one process.
#include <algorithm>
#include <numeric>

#include "pair.h"

using namespace sage_kvt;

namespace {

void shuffled_pages_are_exact(Kind kind) {
  constexpr size_t kPage = 4096, kPages = 1024;
  Pair pair(kind);
  const Bytes source = random_bytes(kPages * kPage, 1);
  Bytes target(source.size());
  const uint64_t window = pair.open(target);
  pair.sender->register_memory(address_of(source), source.size());
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
  Pair pair(kind);
  std::vector<Bytes> sources, targets(kThreads * kPosts, Bytes(kSize));
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
  Pair pair(kind, 1u << 20, /*trusted=*/false);
  const Bytes source = random_bytes(40u << 20, 1), urgent = random_bytes(100000, 2);
  Bytes target(source.size()), urgent_target(urgent.size());
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

}  // namespace

int main() {
  for (Kind kind : kinds()) {
    std::fprintf(stderr, "kind %d\n", static_cast<int>(kind));
    RUN(shuffled_pages_are_exact, kind);
    RUN(many_threads_post, kind);
    RUN(urgent_posts_overtake, kind);
    RUN(messages_keep_their_order, kind);
  }
}
