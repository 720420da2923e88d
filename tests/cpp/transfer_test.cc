// SPDX-License-Identifier: Apache-2.0
// What the layer above relies on, over every backend: bytes, order, ends, refusals.
#include <algorithm>

#include "pair.h"

using namespace sage_kvt;

namespace {

void shuffled_pages_arrive_bit_exact(Kind kind) {
  Pair pair(kind);
  for (size_t page : {size_t{8}, size_t{4096}, size_t{300000}}) {
    const size_t count = page == 300000 ? 20 : 600;
    Pages source(*pair.from, count, page, 1), target(*pair.to, count, page, 2);
    source.fill(3);
    for (bool checksum : {true, false}) {
      std::fill(target.bytes.begin(), target.bytes.end(), uint8_t{0});
      const uint64_t window = pair.to->open_window(pair.receiving, target.segments(), 9, false);
      const auto described = pair.to->describe(window);
      const uint64_t post = pair.from->post(pair.sending, described, source.descriptors(), 9, 0, checksum);
      const Event done = pair.to_inbox.take(EventKind::kWindowDone, window);
      CHECK_EQUAL(done.length, count * page);
      const Event sent = pair.from_inbox.take(EventKind::kSent, post);
      CHECK(sent.status == Status::kOk);
      CHECK_EQUAL(sent.length, count * page);
      CHECK(target.equals(source));
      CHECK_EQUAL(pair.to->close_window(window), count * page);
    }
  }
}

void messages_arrive_whole_and_in_order(Kind kind) {
  Pair pair(kind);
  for (size_t size : {size_t{0}, size_t{1}, size_t{100000}, kMaxMessageBytes})
    CHECK(pair.from->send(pair.sending, std::string(size, static_cast<char>('a' + size % 26))));
  for (size_t size : {size_t{0}, size_t{1}, size_t{100000}, kMaxMessageBytes}) {
    const Event message = pair.to_inbox.take(EventKind::kMessage);
    CHECK_EQUAL(message.payload.size(), size);
    CHECK(size == 0 || message.payload.back() == static_cast<char>('a' + size % 26));
  }
  bool refused = false;
  try {
    pair.from->send(pair.sending, std::string(kMaxMessageBytes + 1, 'x'));
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused);
}

void several_posts_fill_one_window(Kind kind) {
  Pair pair(kind);
  Pages source(*pair.from, 64, 4096, 1), target(*pair.to, 64, 4096, 2);
  source.fill(4);
  const uint64_t window = pair.to->open_window(pair.receiving, target.segments(), 5, true);
  const auto described = pair.to->describe(window);
  const auto all = source.descriptors();
  for (size_t i = 0; i < all.size(); i += 16)
    pair.from->post(pair.sending, described,
                    {all.begin() + static_cast<long>(i), all.begin() + static_cast<long>(i) + 16}, 5, 0, true);
  pair.to_inbox.take(EventKind::kWindowDone, window);
  for (size_t i = 0; i < all.size(); i += 16) pair.from_inbox.take(EventKind::kSent);
  CHECK(pair.to_inbox.count(EventKind::kLanded) >= 4);
  CHECK(target.equals(source));
}

void a_window_fails_for(Kind kind, Status expected) {
  Pair pair(kind);
  Pages source(*pair.from, 4, 4096, 1), target(*pair.to, 4, 4096, 2);
  const uint64_t window = pair.to->open_window(pair.receiving, target.segments(), 5, false);
  auto described = pair.to->describe(window);
  uint64_t generation = 5;
  auto descriptors = source.descriptors();
  if (expected == Status::kStaleGeneration) generation = 6;
  if (expected == Status::kOutOfBounds) {
    described.size = 1 << 20;  // as a lying or confused sender sees it
    descriptors.back().remote = 4 * 4096 - 8;
  }
  if (expected == Status::kOverlap) descriptors.back().remote = 0;
  const uint64_t post = pair.from->post(pair.sending, described, descriptors, generation, 0, true);
  const Event failed = pair.to_inbox.take(EventKind::kWindowFailed, window);
  CHECK(failed.status == expected);
  pair.from_inbox.take(EventKind::kSent, post);
}

void wrong_arguments_are_refused(Kind kind) {
  Pair pair(kind);
  Pages source(*pair.from, 4, 4096, 1), target(*pair.to, 4, 4096, 2);
  const uint64_t window = pair.to->open_window(pair.receiving, target.segments(), 5, false);
  const auto described = pair.to->describe(window);
  int refused = 0;
  const auto must_refuse = [&](auto call) {
    try {
      call();
    } catch (const std::invalid_argument&) {
      ++refused;
    }
  };
  must_refuse([&] { pair.to->open_window(pair.receiving, {{target.address() + 1, target.bytes.size()}}, 5, false); });
  must_refuse([&] { pair.to->open_window(pair.receiving, {}, 5, false); });
  must_refuse([&] { pair.to->open_window(pair.receiving, target.segments(), 0, false); });
  must_refuse([&] { pair.to->open_window(999, target.segments(), 5, false); });
  must_refuse([&] { pair.from->post(pair.sending, described, {{source.address() - 8, 0, 8}}, 5, 0, true); });
  must_refuse([&] { pair.from->post(pair.sending, described, {{source.address(), 4 * 4096, 8}}, 5, 0, true); });
  must_refuse([&] { pair.from->post(pair.sending, described, {{source.address(), ~0ull, 8}}, 5, 0, true); });
  must_refuse([&] { pair.from->post(pair.sending, described, {}, 5, 0, true); });
  must_refuse([&] { pair.from->register_memory(~0ull - 4, 8); });
  CHECK_EQUAL(refused, 9);
}

void closing_ends_everything_once(Kind kind) {
  Pair pair(kind);
  Pages source(*pair.from, 64, 4096, 1), target(*pair.to, 128, 4096, 2);
  const uint64_t window = pair.to->open_window(pair.receiving, target.segments(), 5, false);
  const uint64_t post = pair.from->post(pair.sending, pair.to->describe(window), source.descriptors(), 5, 0, true);
  pair.from_inbox.take(EventKind::kSent, post);
  pair.from->close_connection(pair.sending, Status::kCancelled, "test");
  CHECK(pair.from_inbox.take(EventKind::kClosed).status == Status::kCancelled);
  CHECK(pair.to_inbox.take(EventKind::kWindowFailed, window).status == Status::kConnectionLost);
  pair.to_inbox.take(EventKind::kClosed);
  pair.from->wait(0.05);
  CHECK_EQUAL(pair.from_inbox.count(EventKind::kClosed) + pair.to_inbox.count(EventKind::kClosed), 0u);
}

}  // namespace

int main() {
  for (Kind kind : kKinds) {
    std::cerr << "-- " << name_of(kind) << "\n";
    RUN(shuffled_pages_arrive_bit_exact(kind));
    RUN(messages_arrive_whole_and_in_order(kind));
    RUN(several_posts_fill_one_window(kind));
    for (Status status : {Status::kStaleGeneration, Status::kOutOfBounds, Status::kOverlap})
      RUN(a_window_fails_for(kind, status));
    RUN(wrong_arguments_are_refused(kind));
    RUN(closing_ends_everything_once(kind));
  }
}
