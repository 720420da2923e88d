// SPDX-License-Identifier: Apache-2.0
// What only carried connections do: their library fails, hangs, or knows nothing of some memory.
#include <ctime>

#include "local_library.h"
#include "pair.h"

using namespace sage_kvt;

namespace {

constexpr size_t kSize = 6u << 20;
constexpr uint64_t kChunk = 64u << 10;

LocallyCarried& carried(const std::shared_ptr<Endpoint>& endpoint) { return static_cast<LocallyCarried&>(*endpoint); }

// What arrived is what was sent, and counts once. `more`: while it is under way.
void transfer(Pair& pair, unsigned seed, const std::function<void()>& more = [] {}) {
  const Bytes source = random_bytes(kSize, seed);
  Bytes target(kSize);
  const uint64_t landed = pair.receiver->counters.bytes_landed;
  const uint64_t window = pair.open(target, seed + 1);
  const uint64_t post = pair.post(window, source, seed + 1);
  more();
  pair.received.wait_for(EventKind::kWindowDone, window);
  CHECK(pair.sent.wait_for(EventKind::kSent, post).status == Status::kOk);
  CHECK(target == source);
  CHECK(pair.receiver->counters.bytes_landed == landed + kSize);
  CHECK(pair.receiver->close_window(window) == kSize);
}

void wait_until(const std::function<bool()>& holds) {
  for (int i = 0; !holds(); ++i) {
    CHECK(i < 20000);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

void chunks_go_by_the_library() {
  Pair pair(Kind::kCarried, kChunk);
  transfer(pair, 1);
  CHECK(carried(pair.receiver).reads == kSize / kChunk && carried(pair.sender).reads == 0);
}

void what_it_does_not_know_goes_by_sockets() {
  Pair pair(Kind::kCarried, kChunk);
  carried(pair.sender).knows_memory = false;
  transfer(pair, 1);
  CHECK(carried(pair.receiver).reads == 0);
  carried(pair.receiver).knows_memory = false;  // it reads into slots
  carried(pair.sender).knows_memory = true;
  transfer(pair, 2);
  CHECK(carried(pair.receiver).reads > 0);
}

void a_peer_that_can_not_be_read_is_sent_to_by_sockets() {
  Pair pair(Kind::kCarried, kChunk, false);
  carried(pair.receiver).meets = false;
  pair.receiver->authorize(pair.to_sender);
  pair.sender->authorize(pair.to_receiver);
  wait_until([&] { return carried(pair.receiver).met_peers == 1 && carried(pair.sender).met_peers == 1; });
  transfer(pair, 1);
  CHECK(carried(pair.receiver).reads == 0);
  wait_until([&] { return !pair.sender->info(pair.to_receiver).reason.empty(); });
  CHECK(pair.receiver->info(pair.to_sender).mode == "stream");
  CHECK(pair.receiver->info(pair.to_sender).reason == "it does not want to");
  wait_until(
      [&] { return pair.sender->info(pair.to_receiver).reason == "the peer can't read here: it does not want to"; });
  carried(pair.receiver).met(pair.to_sender, "");  // it tried again
  wait_until([&] { return pair.sender->info(pair.to_receiver).mode == kLocal; });
  transfer(pair, 2);
  CHECK(carried(pair.receiver).reads > 0);
}

void reads_that_fail_go_by_sockets(int rounds) {
  Pair pair(Kind::kCarried, kChunk);
  for (int i = 0; i < rounds; ++i) {
    auto& library = carried(pair.receiver);
    library.fails = i % 2 == 0;
    const uint64_t before = library.reads;
    transfer(pair, static_cast<unsigned>(i), [&] {
      wait_until([&] { return library.reads > before; });
      library.fails = !library.fails;  // half a transfer
    });
  }
}

// The library hangs with reads under way. Nothing of it may land once their window is closed, or its connection gone.
void what_is_read_late_lands_in_no_page(bool loses_connection) {
  Pair pair(Kind::kCarried, kChunk);
  auto& library = carried(pair.receiver);
  const Bytes source = random_bytes(kSize, 3);
  Bytes target(kSize);
  const uint64_t window = pair.open(target);
  library.holds = true;
  const uint64_t post = pair.post(window, source);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  if (loses_connection) {
    pair.receiver->close_connection(pair.to_sender, Status::kCancelled, "");
    pair.received.wait_for(EventKind::kWindowFailed, window);
  }
  pair.receiver->close_window(window);  // does not wait for the library
  std::fill(target.begin(), target.end(), uint8_t{7});
  library.holds = false;
  pair.sent.wait_for(EventKind::kSent, post);
  wait_until([&] { return library.reads > 0; });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  for (const uint8_t byte : target) CHECK(byte == 7);
  if (loses_connection) return;
  transfer(pair, 5);
}

// The slot that a path waits for comes back before it sleeps: it may not sleep then.
void a_slot_that_comes_back_at_once_is_seen() {
  class NoReader : public Reader {
    void submit(const std::shared_ptr<CarriedRead>&, const std::shared_ptr<WireEnd>&) override {}
    std::shared_ptr<const KeyTable> readable() const override { return nullptr; }
  };
  class Other : public SlotWaiter {
    void look_again() override {}
  };
  Pair pair(Kind::kCarried, kChunk);
  NoReader reader;
  Slots slots(1, kChunk);
  const auto end = std::make_shared<WireEnd>(slots);
  CarriedWire wire(*pair.receiver->find_connection(pair.to_sender), reader, slots, end);
  CHECK(wire.arm());
  wire.disarm();
  const uint64_t slot = slots.take(std::make_shared<Other>());
  CHECK(!wire.room_for_read(kChunk));
  CHECK(wire.arm());  // nothing to do before it is back
  wire.disarm();
  slots.give_back(slot);
  CHECK(!wire.arm());
  CHECK(wire.room_for_read(kChunk));
  CHECK(wire.arm());
}

// One slot for all: chunks wait for it, of several connections.
void few_slots_are_shared() {
  EndpointOptions options;
  options.chunk_bytes = kChunk;
  LocallyCarried receiver(options, 1), sender(options);
  Inbox received(receiver), sent(sender);
  const auto address = receiver.listen("127.0.0.1:0");
  constexpr size_t kPeers = 3;
  std::vector<Bytes> sources, targets(kPeers, Bytes(kSize));
  std::vector<uint64_t> windows;
  for (size_t i = 0; i < kPeers; ++i) {
    const uint64_t there = sender.connect(address, 5.0);
    sent.until([&] { return sent.count(EventKind::kConnected) == i + 1; });
    received.until([&] { return received.count(EventKind::kAccepted) == i + 1; });
    const uint64_t here = received.events.back().connection;
    receiver.authorize(here);
    sender.authorize(there);
    wait_until([&] { return sender.info(there).mode == kLocal; });
    sources.push_back(random_bytes(kSize, static_cast<unsigned>(i)));
    receiver.register_memory(address_of(targets[i]), kSize);
    sender.register_memory(address_of(sources[i]), kSize);
    windows.push_back(receiver.open_window(here, {{address_of(targets[i]), kSize}}, 1, false));
    sender.post(there, receiver.describe(windows[i]), {{address_of(sources[i]), 0, kSize}}, 1, 0, true);
  }
  for (const uint64_t window : windows) received.wait_for(EventKind::kWindowDone, window);
  CHECK(sources == targets);
  CHECK(receiver.reads >= kPeers * kSize / kChunk);
}

double cpu_s() {
  timespec time{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

// A thread that waits and the lane arm a path in turns, while its library ends a read.
void lanes_sleep_when_nothing_moves(int rounds) {
  for (int i = 0; i < rounds; ++i) {
    Pair pair(Kind::kCarried, 1u << 20);
    const Bytes source = random_bytes(300001, 1);
    Bytes target(source.size());
    const uint64_t window = pair.open(target);
    const uint64_t post = pair.post(window, source);
    pair.received.wait_for(EventKind::kWindowDone, window);
    pair.sent.wait_for(EventKind::kSent, post);
    pair.receiver->close_window(window);
    for (int k = 0; k < 3; ++k) pair.sender->wait(0.01);
    const double before = cpu_s();
    std::this_thread::sleep_for(std::chrono::milliseconds(40));
    CHECK(cpu_s() - before < 0.02);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 20;
  RUN(chunks_go_by_the_library);
  RUN(what_it_does_not_know_goes_by_sockets);
  RUN(a_peer_that_can_not_be_read_is_sent_to_by_sockets);
  RUN(reads_that_fail_go_by_sockets, rounds);
  RUN(what_is_read_late_lands_in_no_page, false);
  RUN(what_is_read_late_lands_in_no_page, true);
  RUN(a_slot_that_comes_back_at_once_is_seen);
  RUN(few_slots_are_shared);
  RUN(lanes_sleep_when_nothing_moves, 2 * rounds);
  return 0;
}
