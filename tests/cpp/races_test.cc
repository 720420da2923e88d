// SPDX-License-Identifier: Apache-2.0
// Everything that may end a transfer, at any moment of it, from other threads.
#include <algorithm>
#include <atomic>

#include "pair.h"

using namespace sage_kvt;

namespace {

constexpr size_t kSize = 3u << 20;
constexpr int kRounds = 12;
// Of the memory that posters fill, each slice once.
constexpr size_t kSlice = 256u << 10, kSlices = 40, kPosters = 2;

void pause_up_to(std::mt19937& random, int most_us) {
  std::this_thread::sleep_for(std::chrono::microseconds(random() % static_cast<unsigned>(most_us)));
}

// After SENT the source is overwritten at once: what counts as landed must not show it.
void cancel_races_with_the_transfer(Kind kind) {
  Pair pair(kind);
  std::mt19937 random(1);
  for (int round = 0; round < kRounds; ++round) {
    Bytes source(kSize, 1), target(kSize, 0);
    const uint64_t window = pair.open(target, 1, true);
    const uint64_t post = pair.post(window, source);
    std::thread canceller([&] {
      pause_up_to(random, 3000);
      pair.sender->cancel(post);
    });
    pair.sent.wait_for(EventKind::kSent, post);
    const Status status = pair.sent.find(EventKind::kSent, post)->status;
    CHECK(status == Status::kOk || status == Status::kCancelled);
    std::fill(source.begin(), source.end(), 2);
    canceller.join();
    if (status == Status::kOk) pair.received.wait_for(EventKind::kWindowDone, window);
    const uint64_t landed = pair.receiver->close_window(window);
    CHECK(landed <= kSize);
    pair.received.take();
    for (const auto& event : pair.received.events)
      if (event.kind == EventKind::kLanded && event.id == window)
        for (uint64_t i = 0; i < event.length; ++i) CHECK(target[event.offset + i] == 1);
    pair.received.events.clear();
  }
}

void close_window_races_with_the_transfer(Kind kind) {
  Pair pair(kind);
  std::mt19937 random(2);
  for (int round = 0; round < kRounds; ++round) {
    const Bytes source(kSize, 1);
    Bytes target(kSize, 0);
    const uint64_t window = pair.open(target);
    const uint64_t post = pair.post(window, source);
    pause_up_to(random, 3000);
    const uint64_t landed = pair.receiver->close_window(window);
    const auto before = static_cast<uint64_t>(std::count(target.begin(), target.end(), 1));
    CHECK(landed <= before);
    std::fill(target.begin(), target.end(), 3);
    pair.sent.wait_for(EventKind::kSent, post);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    CHECK(std::count(target.begin(), target.end(), 3) == static_cast<long>(kSize));
  }
}

// Posts, messages, windows, cancels and waits from several threads while one side hangs up.
void hanging_up_races_with_everything(Kind kind) {
  std::mt19937 random(3);
  for (int round = 0; round < kRounds; ++round) {
    const Bytes source = random_bytes(kSlice, 1);
    Bytes target(kPosters * kSlices * kSlice);
    Pair pair(kind);  // its windows end before the memory does
    source.register_at(pair.sender);
    target.register_at(pair.receiver);
    std::atomic<bool> over{false};
    std::atomic<size_t> posted{0}, opened{0};
    std::vector<std::thread> threads;
    for (size_t t = 0; t < kPosters; ++t)
      threads.emplace_back([&, t] {
        for (size_t i = 0; i < kSlices && !over; ++i) {
          try {
            const Segment slice{address_of(target) + (t * kSlices + i) * kSlice, kSlice};
            const uint64_t window = pair.receiver->open_window(pair.to_sender, {slice}, 1, false);
            ++opened;
            const uint64_t post =
                pair.sender->post(pair.to_receiver, {window, 1, kSlice}, {{address_of(source), 0, kSlice}}, 1, 0, true);
            ++posted;
            pair.sender->send(pair.to_receiver, "hello");
            pair.receiver->send(pair.to_sender, "hello");
            pair.sender->cancel(post - 1);
          } catch (const ConnectionClosed&) {
            return;
          }
          std::this_thread::sleep_for(std::chrono::microseconds(200));
        }
      });
    threads.emplace_back([&] {  // a peer that is given up ends as one that hung up
      for (int i = 0; !over; ++i) {
        pair.sender->watch(pair.to_receiver, 0.3);
        pair.receiver->watch(pair.to_sender, 0.003 * (1 + i % 100));
        std::this_thread::sleep_for(std::chrono::microseconds(300));
        if (i % 3 == 0) pair.sender->unwatch(pair.to_receiver);
        pair.receiver->unwatch(pair.to_sender);
      }
    });
    threads.emplace_back([&] { pair.received.until([&] { return pair.received.count(EventKind::kClosed) == 1; }); });
    const unsigned how = random() % 4;
    std::thread closer([&] {
      pause_up_to(random, 8000);
      if (how == 0) pair.sender->close_connection(pair.to_receiver, Status::kCancelled, "");
      if (how == 1) pair.receiver->close_connection(pair.to_sender, Status::kCancelled, "");
      if (how == 2) pair.sender->close();
      if (how == 3) pair.receiver->close();
    });
    pair.sent.until([&] { return pair.sent.count(EventKind::kClosed) == 1; });
    closer.join();
    over = true;
    for (auto& thread : threads) thread.join();
    pair.sender->close();
    pair.receiver->close();
    pair.sent.take();
    pair.received.take();
    CHECK(pair.sent.count(EventKind::kSent) == posted);
    CHECK(pair.received.count(EventKind::kWindowDone) + pair.received.count(EventKind::kWindowFailed) == opened);
    CHECK(pair.sent.events.back().kind == EventKind::kClosed && pair.sent.count(EventKind::kClosed) == 1);
    CHECK(pair.received.events.back().kind == EventKind::kClosed && pair.received.count(EventKind::kClosed) == 1);
  }
}

// Connections come and go while an endpoint is closed.
void closing_races_with_connecting(Kind kind) {
  std::mt19937 random(4);
  for (int round = 0; round < kRounds; ++round) {
    auto server = make_endpoint(kind, 64u << 10), client = make_endpoint(kind, 64u << 10);
    const std::string address = server->listen(is_tcp(kind) ? "127.0.0.1:0" : "");
    std::thread connecting([&] {
      for (int i = 0; i < 50; ++i) {
        try {
          const uint64_t connection = client->connect(address, 1.0);
          protect(kind, *client, connection, true);
          client->authorize(connection);
        } catch (const std::exception&) {
          return;
        }
        for (const auto& event : server->poll(16))
          if (event.kind == EventKind::kAccepted) {
            protect(kind, *server, event.connection, false);
            server->authorize(event.connection);
          }
      }
    });
    std::thread waiting([&] { client->wait(0.02); });
    pause_up_to(random, 4000);
    (round % 2 ? *server : *client).close();
    connecting.join();
    waiting.join();
  }
}

}  // namespace

int main() {
  for (Kind kind : kinds()) {
    std::fprintf(stderr, "kind %d\n", static_cast<int>(kind));
    RUN(cancel_races_with_the_transfer, kind);
    RUN(close_window_races_with_the_transfer, kind);
    RUN(hanging_up_races_with_everything, kind);
    RUN(closing_races_with_connecting, kind);
  }
}
