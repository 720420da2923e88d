// SPDX-License-Identifier: Apache-2.0
// Connections with several links: any lane may end in mid-transfer, and nothing is lost, wrong or told twice.
#include <linux/filter.h>
#include <sys/socket.h>

#include <atomic>
#include <optional>

#include "pair.h"

using namespace sage_kvt;

namespace {

using Lanes = std::vector<std::shared_ptr<Channel>>;

Lanes lanes_of(Endpoint& endpoint, uint64_t connection) {
  const auto found = endpoint.find_connection(connection);
  return found ? found->channels() : Lanes{};
}

// As if a router forgot it.
void cut(Channel& lane) {
  std::lock_guard lock(lane.mutex);
  if (!lane.dead) ::shutdown(lane.fds().front(), SHUT_RDWR);
}

// As if its cable was pulled: nothing that comes from now on is seen here, acknowledgements included.
void silence(Channel& lane) {
  sock_filter nothing[] = {{BPF_RET | BPF_K, 0, 0, 0}};
  const sock_fprog program{1, nothing};
  std::lock_guard lock(lane.mutex);
  if (!lane.dead) CHECK(::setsockopt(lane.fds().front(), SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program) == 0);
}

void silence_link(Pair& pair, size_t link) {
  for (auto* side : {&pair.receiver, &pair.sender})
    for (const auto& lane : lanes_of(**side, side == &pair.receiver ? pair.to_sender : pair.to_receiver))
      if (lane->link() == link) silence(*lane);
}

// Messages both ways, all the time, in the order in which they were sent.
class Talk {
 public:
  explicit Talk(Pair& pair) : pair_(pair) {
    speaker_ = std::thread([this] {
      for (; !over_; ++said_) {
        const auto word = std::to_string(said_);
        CHECK(pair_.sender->send(pair_.to_receiver, word) && pair_.receiver->send(pair_.to_sender, word));
        std::this_thread::sleep_for(std::chrono::microseconds(300));
      }
    });
  }
  ~Talk() {
    over_ = true;
    speaker_.join();
    for (auto* inbox : {&pair_.received, &pair_.sent}) {
      inbox->until([&] { return inbox->count(EventKind::kMessage) == said_; });
      size_t next = 0;
      for (const auto& event : inbox->events)
        if (event.kind == EventKind::kMessage) CHECK(event.payload == std::to_string(next++));
      std::erase_if(inbox->events, [](const auto& event) { return event.kind == EventKind::kMessage; });
    }
  }

 private:
  Pair& pair_;
  std::atomic<bool> over_{false};
  size_t said_ = 0;
  std::thread speaker_;
};

// Those that carry messages, on the side that has fewer; none of them is `gone` already.
int usable_lanes(Pair& pair, const std::optional<LaneId>& gone) {
  int fewer = 100;
  for (auto* side : {&pair.receiver, &pair.sender}) {
    int usable = 0;
    for (const auto& lane : lanes_of(**side, side == &pair.receiver ? pair.to_sender : pair.to_receiver)) {
      if (gone && static_cast<TcpChannel&>(*lane).id() == *gone) return 0;
      usable += !lane->dead && lane->carries_messages();
    }
    fewer = std::min(fewer, usable);
  }
  return fewer;
}

void wait_for_lanes(Pair& pair, int lanes, const std::optional<LaneId>& gone = {}) {
  for (int i = 0; usable_lanes(pair, gone) < lanes; ++i) {
    for (auto* inbox : {&pair.received, &pair.sent}) {
      inbox->take();
      CHECK(inbox->count(EventKind::kClosed) == 0);
    }
    CHECK(i < 30000);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

// The first one, which carries messages, as often as any other.
LaneId cut_any(const Lanes& lanes, std::mt19937& random) {
  const bool first = random() % 2;
  const auto found = std::find_if(lanes.begin(), lanes.end(), [&](const auto& lane) { return lane->first == first; });
  CHECK(found != lanes.end());
  cut(**found);
  return static_cast<TcpChannel&>(**found).id();
}

// One lane of either side is cut while bytes and messages go over it; the connection lives on, and the lane comes back.
void a_lane_that_breaks_costs_nothing(Kind kind, int rounds) {
  constexpr int kOfOnePair = 16;
  const Bytes source = random_bytes(24u << 20, 1);
  std::mt19937 random(3);
  for (int begun = 0; begun < rounds; begun += kOfOnePair) {
    Pair pair(kind, 256u << 10);
    for (int round = begun; round < std::min(rounds, begun + kOfOnePair); ++round) {
      Bytes target(source.size());
      LaneId gone;
      {
        Talk talk(pair);
        const uint64_t window = pair.open(target), post = pair.post(window, source);
        std::this_thread::sleep_for(std::chrono::microseconds(random() % 8000));
        const bool ours = random() % 2;
        gone =
            cut_any(ours ? lanes_of(*pair.sender, pair.to_receiver) : lanes_of(*pair.receiver, pair.to_sender), random);
        CHECK(pair.received.wait_for(EventKind::kWindowDone, window).status == Status::kOk);
        CHECK(pair.sent.wait_for(EventKind::kSent, post).status == Status::kOk);
        pair.receiver->close_window(window);
        CHECK(pair.received.count(EventKind::kWindowDone) == 1);
      }
      CHECK(target == source);
      for (auto* inbox : {&pair.received, &pair.sent}) {
        CHECK(inbox->count(EventKind::kClosed) == 0 && inbox->count(EventKind::kWindowFailed) == 0);
        inbox->events.clear();
      }
      wait_for_lanes(pair, 2, gone);
    }
    wait_for_lanes(pair, lanes_of(kind));
  }
}

// A network goes silent without a word to anybody: its bytes come by the other one soon.
void a_link_that_falls_silent_is_left(Kind kind, int rounds) {
  const Bytes source = random_bytes(64u << 20, 1);
  std::vector<double> took, alone;
  for (int round = 0; round < rounds; ++round) {
    Pair pair(kind, 256u << 10);
    for (const bool silent : {false, true}) {
      Bytes target(source.size());
      Talk talk(pair);
      const uint64_t window = pair.open(target), begun = now_ns(), post = pair.post(window, source);
      std::this_thread::sleep_for(std::chrono::milliseconds(3));
      if (silent) silence_link(pair, static_cast<size_t>(round % 2));
      pair.received.wait_for(EventKind::kWindowDone, window);
      (silent ? took : alone).push_back(static_cast<double>(now_ns() - begun) / 1e6);
      CHECK(pair.sent.wait_for(EventKind::kSent, post).status == Status::kOk);
      CHECK(target == source);
      pair.receiver->close_window(window);
    }
    wait_for_lanes(pair, lanes_of(kind));
    CHECK(pair.received.count(EventKind::kClosed) + pair.sent.count(EventKind::kClosed) == 0);
  }
  std::sort(took.begin(), took.end());
  std::sort(alone.begin(), alone.end());
  std::fprintf(stderr, "(%.0f ms, %.0f ms without) ", took[took.size() / 2], alone[alone.size() / 2]);
}

void without_any_lane_it_is_lost(Kind kind) {
  Bytes target(8u << 20);
  Pair pair(kind, 256u << 10);
  const uint64_t window = pair.open(target);
  for (const auto& lane : lanes_of(*pair.sender, pair.to_receiver)) cut(*lane);
  CHECK(pair.received.wait_for(EventKind::kWindowFailed, window).status == Status::kConnectionLost);
  pair.sent.until([&] { return pair.sent.count(EventKind::kClosed) == 1; });
}

// A post that is cancelled while a lane with its chunks is gone ends, once.
void what_is_cancelled_meanwhile_ends(Kind kind, int rounds) {
  const Bytes source = random_bytes(24u << 20, 1);
  Bytes target(source.size());
  Pair pair(kind, 256u << 10);
  std::mt19937 random(4);
  for (int round = 0; round < rounds; ++round) {
    const uint64_t window = pair.open(target), post = pair.post(window, source);
    std::this_thread::sleep_for(std::chrono::microseconds(500 * (round % 8)));
    const LaneId gone = cut_any(lanes_of(*pair.sender, pair.to_receiver), random);
    pair.sender->cancel(post);
    pair.sent.wait_for(EventKind::kSent, post);
    pair.receiver->close_window(window);
    wait_for_lanes(pair, 2, gone);
  }
  CHECK(pair.sent.count(EventKind::kSent) == static_cast<size_t>(rounds));
  CHECK(pair.sent.count(EventKind::kClosed) == 0);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 4;
  for (const Kind kind : kinds()) {
    if (!has_links(kind)) continue;
    RUN(a_lane_that_breaks_costs_nothing, kind, rounds);
    RUN(a_link_that_falls_silent_is_left, kind, std::min(rounds, 8));
    RUN(what_is_cancelled_meanwhile_ends, kind, rounds);
    RUN(without_any_lane_it_is_lost, kind);
  }
}
