// SPDX-License-Identifier: Apache-2.0
// What only paths do: they break while chunks are under way, and nothing is lost, wrong or counted twice. Without an
// RDMA device there is nothing to run.
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>

#include "pair.h"

#ifdef SAGE_KVT_RDMA

using namespace sage_kvt;

namespace {

// More than a path has under way at a time.
constexpr size_t kSize = 12u << 20;
constexpr uint64_t kChunk = 64u << 10;

RdmaEndpoint& rdma(const std::shared_ptr<Endpoint>& endpoint) { return static_cast<RdmaEndpoint&>(*endpoint); }

void wait_for_paths(Pair& pair, int paths = 1) {
  const int lanes = 1 + paths;
  for (int i = 0;
       pair.sender->info(pair.to_receiver).lanes < lanes || pair.receiver->info(pair.to_sender).lanes < lanes; ++i) {
    CHECK(i < 60000);  // one that broke is dialled again up to half a minute later
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

// One transfer, in the middle of which `harm` is done. What arrived is what was sent, and counts once.
void transfer(Pair& pair, unsigned seed, const std::function<void()>& harm) {
  const Bytes source = random_bytes(kSize, seed);
  Bytes target(kSize);
  const uint64_t sent = pair.sender->counters.bytes_sent, landed = pair.receiver->counters.bytes_landed;
  const uint64_t window = pair.open(target, seed + 1);
  const uint64_t post = pair.post(window, source, seed + 1);
  const uint64_t some = landed + kSize / 4;
  pair.received.until([&] { return pair.receiver->counters.bytes_landed > some; });
  harm();
  pair.received.wait_for(EventKind::kWindowDone, window);
  const Event& ended = pair.sent.wait_for(EventKind::kSent, post);
  CHECK(ended.status == Status::kOk && ended.length == kSize);
  CHECK(target == source);
  CHECK(pair.receiver->counters.bytes_landed == landed + kSize);
  CHECK(pair.sender->counters.bytes_sent >= sent + kSize);
  CHECK(pair.receiver->close_window(window) == kSize);
}

void a_path_that_breaks_loses_nothing(int rounds) {
  Pair pair(Kind::kRdma, kChunk);
  for (int i = 0; i < rounds; ++i) {
    wait_for_paths(pair);
    auto& side = i % 2 ? pair.sender : pair.receiver;
    transfer(pair, static_cast<unsigned>(i),
             [&] { CHECK(rdma(side).end_paths(i % 2 ? pair.to_receiver : pair.to_sender) == 1); });
  }
}

// The sender hears nothing any more while the receiver takes all that is under way; then the path breaks.
void what_ended_and_was_not_heard_of_counts_once() {
  Pair pair(Kind::kRdma, kChunk);
  transfer(pair, 1, [&] {
    const auto channel = pair.sender->find_connection(pair.to_receiver)->channels().front();
    CHECK(channel->is_path());
    std::lock_guard deaf(channel->mutex);
    const auto& landed = pair.receiver->counters.bytes_landed;
    for (uint64_t before = landed, still = 0; still < 20; before = landed) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      still = before == landed ? still + 1 : 0;
    }
    static_cast<PathChannel&>(*channel).end("deaf");
  });
}

void both_sides_may_break_it() {
  Pair pair(Kind::kRdma, kChunk);
  transfer(pair, 1, [&] {
    rdma(pair.sender).end_paths(pair.to_receiver);
    rdma(pair.receiver).end_paths(pair.to_sender);
  });
}

void chunks_go_over_the_path() {
  Pair pair(Kind::kRdma, kChunk);
  transfer(pair, 1, [] {});
  CHECK(pair.sender->info(pair.to_receiver).mode == "rdma" && pair.receiver->info(pair.to_sender).mode == "rdma");
  CHECK(rdma(pair.sender).unregistered().empty());
}

// How many paths their accepting side does not get: it is told of a fault where they are established.
std::atomic<int> g_half_made{0};
decltype(Verbs::get_cm_event) g_get_cm_event = nullptr;

int get_cm_event(rdma_event_channel* channel, rdma_cm_event** event) {
  const int error = g_get_cm_event(channel, event);
  if (error != 0 || (*event)->event != RDMA_CM_EVENT_ESTABLISHED) return error;
  const bool accepting = (*event)->param.conn.private_data_len < sizeof(PathTerms);
  if (!accepting || g_half_made-- <= 0) return 0;
  std::this_thread::sleep_for(std::chrono::milliseconds(1000));  // the other side begins to send
  (*event)->event = RDMA_CM_EVENT_CONNECT_ERROR;
  return 0;
}

// Its dialling side sends over it already.
void what_a_half_made_path_took_goes_another_way() {
  std::string why;
  auto* functions = const_cast<Verbs*>(verbs(&why));  // a test of its own process
  g_get_cm_event = functions->get_cm_event;
  functions->get_cm_event = get_cm_event;
  g_half_made = 1;
  {
    const Bytes source = random_bytes(8 * kSize, 9);
    Bytes target(source.size());
    Pair pair(Kind::kRdma, kChunk, false);
    const uint64_t window = pair.open(target), post = pair.post(window, source);
    pair.receiver->authorize(pair.to_sender);
    pair.sender->authorize(pair.to_receiver);
    pair.received.wait_for(EventKind::kWindowDone, window);
    CHECK(pair.sent.wait_for(EventKind::kSent, post).status == Status::kOk);
    CHECK(target == source);
    wait_for_paths(pair);
    CHECK(g_half_made <= 0);
  }
  functions->get_cm_event = g_get_cm_event;
}

// What this side says of memory that peers may read is not what its card knows.
enum class Claim { kNothing, kKey, kLength };
Claim g_claim = Claim::kNothing;
decltype(Verbs::reg_mr) g_reg_mr = nullptr;

ibv_mr* reg_mr(ibv_pd* domain, void* address, size_t length, int access) {
  const bool readable = access & IBV_ACCESS_REMOTE_READ;
  const size_t half = g_claim == Claim::kLength && readable ? length / 2 : length;
  ibv_mr* made = g_reg_mr(domain, address, half, access);
  if (made && readable) {
    made->length = length;
    if (g_claim == Claim::kKey) made->rkey ^= 0x5500;
  }
  return made;
}

// The card refuses the read, and the chunk goes another way. Nothing else arrives instead, and nothing twice.
void what_a_card_does_not_know_is_not_read(Claim claim) {
  std::string why;
  auto* functions = const_cast<Verbs*>(verbs(&why));
  g_reg_mr = functions->reg_mr;
  functions->reg_mr = reg_mr;
  {
    Pair pair(Kind::kRdma, kChunk);
    const Bytes source = random_bytes(kSize, 11);
    Bytes target(kSize);
    const uint64_t window = pair.open(target, 1);
    g_claim = claim;
    const uint64_t post = pair.post(window, source, 1);
    g_claim = Claim::kNothing;
    std::atomic<bool> over{false};
    size_t foreign = 0, looks = 0;
    std::thread watcher([&] {  // each byte is what was there, or what was sent
      for (; !over; ++looks)
        for (size_t i = 0; i < kSize; i += 509) {
          const uint8_t seen = reinterpret_cast<std::atomic<uint8_t>&>(target[i]);
          foreign += seen != 0 && seen != source[i];
        }
    });
    pair.received.wait_for(EventKind::kWindowDone, window);
    CHECK(pair.sent.wait_for(EventKind::kSent, post).status == Status::kOk);
    over = true;
    watcher.join();
    CHECK(foreign == 0 && looks > 0);
    CHECK(pair.sender->counters.bytes_sent > kSize);  // some went twice
    CHECK(target == source);
    CHECK(pair.receiver->counters.bytes_landed == kSize);
    CHECK(pair.receiver->close_window(window) == kSize);
  }
  functions->reg_mr = g_reg_mr;
}

// Memory with a hole can be a region of ours, and is refused by a card.
class Holed {
 public:
  Holed() {
    void* made = ::mmap(nullptr, 2 * kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(made != MAP_FAILED);
    begin = static_cast<uint8_t*>(made);
    ::munmap(begin + kSize, kSize);
  }
  ~Holed() { ::munmap(begin, kSize); }
  uint64_t address() const { return reinterpret_cast<uint64_t>(begin); }
  uint8_t* begin;
};

void what_a_card_refuses_goes_by_sockets(bool sends) {
  Pair pair(Kind::kRdma, kChunk);
  Holed holed;
  const Bytes bytes = random_bytes(kSize, 7);
  Bytes other(bytes);
  auto& from = pair.sender;
  auto& to = pair.receiver;
  (sends ? from : to)->register_memory(holed.address(), 2 * kSize);
  other.register_at(sends ? to : from);
  if (sends) std::memcpy(holed.begin, bytes.data(), kSize), std::fill(other.begin(), other.end(), 0);
  const uint64_t source = sends ? holed.address() : address_of(other),
                 target = sends ? address_of(other) : holed.address();
  CHECK(!rdma(sends ? from : to).unregistered().empty());
  const uint64_t window = to->open_window(pair.to_sender, {{target, kSize}}, 1, false);
  const uint64_t post = from->post(pair.to_receiver, to->describe(window), {{source, 0, kSize}}, 1, 0, true);
  pair.received.wait_for(EventKind::kWindowDone, window);
  CHECK(pair.sent.wait_for(EventKind::kSent, post).status == Status::kOk);
  CHECK(to->close_window(window) == kSize);
  CHECK(std::memcmp(reinterpret_cast<void*>(target), bytes.data(), kSize) == 0);
}

// Its owner writes there again as soon as the window is closed: nothing that was under way may land later.
void nothing_is_written_after_a_window_is_closed(int rounds) {
  Pair pair(Kind::kRdma, kChunk);
  const Bytes source = random_bytes(kSize, 3);
  Bytes target(kSize);
  source.register_at(pair.sender);
  target.register_at(pair.receiver);
  for (int i = 0; i < rounds; ++i) {
    const auto generation = static_cast<uint64_t>(i + 1);
    const uint64_t landed = pair.receiver->counters.bytes_landed;
    const uint64_t window =
        pair.receiver->open_window(pair.to_sender, {{address_of(target), kSize}}, generation, false);
    const uint64_t post = pair.sender->post(pair.to_receiver, pair.receiver->describe(window),
                                            {{address_of(source), 0, kSize}}, generation, 0, true);
    pair.received.until([&] { return pair.receiver->counters.bytes_landed > landed + kSize / 4; });
    pair.receiver->close_window(window);
    std::fill(target.begin(), target.end(), static_cast<uint8_t>(i));
    pair.sent.wait_for(EventKind::kSent, post);
    for (const uint8_t byte : target) CHECK(byte == static_cast<uint8_t>(i));
  }
}

// The longest time without a byte, in milliseconds, while `work` is done.
double longest_silence_ms(Endpoint& receiver, const std::function<void()>& work) {
  std::atomic<bool> over{false};
  double longest = 0;
  std::thread watcher([&] {
    uint64_t landed = receiver.counters.bytes_landed, since = now_ns();
    while (!over) {
      std::this_thread::sleep_for(std::chrono::microseconds(200));
      if (const uint64_t now = receiver.counters.bytes_landed; now != landed) {
        longest = std::max(longest, static_cast<double>(now_ns() - since) / 1e6);
        landed = now;
        since = now_ns();
      }
    }
  });
  work();
  over = true;
  watcher.join();
  return longest;
}

// Two cards. The link of one goes down in the middle of a transfer, and comes back.
void a_link_that_goes_down_loses_nothing(const std::string& interface, int rounds) {
  const auto set_link = [&](const char* state) {
    CHECK(std::system(("ip link set " + interface + " " + state).c_str()) == 0);
  };
  auto pair = std::make_unique<Pair>(Kind::kRdma, kChunk, false);
  pair->receiver->authorize(pair->to_sender);
  pair->sender->authorize(pair->to_receiver);
  for (int i = 0; i < rounds; ++i) {
    wait_for_paths(*pair, 2);
    const auto seed = static_cast<unsigned>(i);
    const double undisturbed = longest_silence_ms(*pair->receiver, [&] { transfer(*pair, 2 * seed, [] {}); });
    const double disturbed =
        longest_silence_ms(*pair->receiver, [&] { transfer(*pair, 2 * seed + 1, [&] { set_link("down"); }); });
    std::fprintf(stderr, "longest silence: %.1f ms, with a link that goes down %.1f ms\n", undisturbed, disturbed);
    set_link("up");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 8;
  if (const std::string why = rdma_lacks(); !why.empty()) {
    std::fprintf(stderr, "left out: %s\n", why.c_str());
    return 0;
  }
  if (argc > 2) {
    RUN(a_link_that_goes_down_loses_nothing, argv[2], rounds);
    return 0;
  }
  RUN(chunks_go_over_the_path);
  RUN(a_path_that_breaks_loses_nothing, rounds);
  RUN(what_ended_and_was_not_heard_of_counts_once);
  RUN(both_sides_may_break_it);
  RUN(what_a_half_made_path_took_goes_another_way);
  RUN(what_a_card_does_not_know_is_not_read, Claim::kKey);
  RUN(what_a_card_does_not_know_is_not_read, Claim::kLength);
  RUN(what_a_card_refuses_goes_by_sockets, true);
  RUN(what_a_card_refuses_goes_by_sockets, false);
  RUN(nothing_is_written_after_a_window_is_closed, rounds);
  return 0;
}

#else

int main() { return 0; }

#endif
