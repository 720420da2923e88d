// SPDX-License-Identifier: Apache-2.0
// Streams of pages that become final one after the other, against a model of what must land.
#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "paged/cursor.h"
#include "pair.h"

using namespace sage_kvt;

namespace {

constexpr size_t kPages = 24, kRunBytes = 96;
using Ranges = std::vector<std::pair<uint64_t, uint64_t>>;

// Planes of an engine: K and V beside each other in one tensor, whose pages have several runs; or one tensor a layer.
struct Cache {
  Bytes memory;
  std::shared_ptr<const PageLayout> layout;
  std::vector<size_t> layers;

  Cache(std::vector<size_t> layers_, size_t runs, unsigned seed) : layers(std::move(layers_)) {
    size_t total = 0;
    for (size_t count : layers) total += count;
    const size_t plane = kPages * runs * kRunBytes;
    memory = random_bytes(total * 2 * plane, seed);
    std::vector<PageGroup> groups;
    uint64_t at = address_of(memory);
    for (size_t count : layers) {
      PageGroup group;
      group.pages = kPages;
      for (size_t l = 0; l < count; ++l) {
        PageLayer layer;
        for (int p = 0; p < 2; ++p, at += plane) {
          PagePlane one{at, p == 0 ? runs * kRunBytes : kRunBytes, kRunBytes, {}};
          // The first plane has a page's runs together, the second has them a whole plane apart.
          for (size_t r = 0; r < runs; ++r) one.run_offsets.push_back(p == 0 ? r * kRunBytes : r * kPages * kRunBytes);
          layer.planes.push_back(one);
        }
        group.layers.push_back(layer);
      }
      groups.push_back(group);
    }
    layout = std::make_shared<const PageLayout>(groups, std::vector<Segment>{{address_of(memory), memory.size()}});
  }

  // The forward pass of a layer: what `finals` has of these pages gets its place.
  void compute(const Bytes& finals, size_t group, size_t layer, const std::vector<int64_t>& ids, size_t first,
               size_t end) {
    for (const auto& plane : layout->groups()[group].layers[layer].planes)
      for (size_t i = first; i < end; ++i)
        for (uint64_t offset : plane.run_offsets) {
          const uint64_t at =
              plane.base + static_cast<uint64_t>(ids[i]) * plane.page_stride + offset - address_of(memory);
          std::copy_n(finals.begin() + static_cast<long>(at), plane.run_bytes, memory.begin() + static_cast<long>(at));
        }
  }

  // A page of a layer as it must arrive.
  Bytes page(size_t group, size_t layer, int64_t id) const {
    Bytes out;
    for (const auto& plane : layout->groups()[group].layers[layer].planes)
      for (uint64_t offset : plane.run_offsets) {
        const auto* from =
            reinterpret_cast<const uint8_t*>(plane.base + static_cast<uint64_t>(id) * plane.page_stride + offset);
        out.insert(out.end(), from, from + plane.run_bytes);
      }
    return out;
  }
};

void advance_all(PageTables& tables, const std::vector<uint64_t>& pages) {
  int pushes = kPushes;
  tables.advance_all(pages, &pushes);
}

std::vector<int64_t> some_pages(std::mt19937& random, size_t count) {
  std::vector<int64_t> ids(kPages);
  for (size_t i = 0; i < kPages; ++i) ids[i] = static_cast<int64_t>(i);
  std::shuffle(ids.begin(), ids.end(), random);
  ids.resize(count);
  return ids;
}

uint64_t open_pages(Pair& pair, const Cache& cache, const std::vector<PageRuns>& selection,
                    const std::vector<std::vector<int64_t>>& ids, uint64_t generation) {
  std::vector<GroupCount> counts;
  for (const auto& runs : selection) counts.push_back({runs.group, runs.count()});
  auto space = std::make_unique<PagedSpace>(cache.layout, counts);
  for (size_t slot = 0; slot < selection.size(); ++slot) space->know(slot, ids[slot].data(), ids[slot].size());
  return pair.receiver->open_window(pair.to_sender, std::move(space), cache.layout->extents(), generation, false);
}

// Two groups, another order of runs on each side, tables that grow, layers that become final in any order; some
// streams are cancelled, some ask for what is not there, some lose their window.
void what_lands_is_what_was_final(Kind kind) {
  std::mt19937 random(7);
  for (int round = 0; round < 30; ++round) {
    Cache from({3, 2}, 2, static_cast<unsigned>(1 + round));
    const Bytes finals = from.memory;
    std::fill(from.memory.begin(), from.memory.end(), 0);
    Cache to({3, 2}, 2, static_cast<unsigned>(1000 + round));
    Pair pair(kind, round % 3 == 0 ? 4096 : 64u << 10);  // its lanes end before the memory does
    const Bytes before = to.memory;
    from.memory.register_at(pair.sender);
    to.memory.register_at(pair.receiver);
    auto tables = std::make_shared<PageTables>(from.layers);
    const size_t prompt = 6 + random() % 8;
    const std::vector<std::vector<int64_t>> source{some_pages(random, prompt), some_pages(random, prompt)};
    const size_t first = random() % 3, skipped = random() % 2;
    std::vector<PageRuns> selection;
    selection.emplace_back(0, Ranges{{first, prompt - first}});
    selection.emplace_back(1, Ranges{{skipped, 1}, {skipped + 2, prompt - skipped - 2}});
    std::vector<std::vector<int64_t>> target;
    for (const auto& runs : selection) target.push_back(some_pages(random, runs.count()));
    const uint64_t generation = 1 + static_cast<uint64_t>(round);
    const uint64_t window = open_pages(pair, to, selection, target, generation);
    auto cursor = std::make_shared<PagedCursor>(from.layout, tables, selection);
    // What ends it early, if anything.
    enum class Fate { kRuns, kCancelled, kBeyond, kWindowClosed, kNoPage } fate = static_cast<Fate>(random() % 8);
    if (static_cast<int>(fate) > 4) fate = Fate::kRuns;
    auto grow = [&](size_t until) {
      for (size_t group = 0; group < 2; ++group) {
        std::vector<int64_t> ids(source[group].begin() + static_cast<long>(tables->length(group)),
                                 source[group].begin() + static_cast<long>(until));
        if (fate == Fate::kNoPage && group == 0 && until == prompt && !ids.empty()) ids.back() = kNullPage;
        tables->append(group, ids.data(), ids.size());
      }
    };
    const size_t half = prompt / 2;
    grow(half);
    // What is final, by group and layer.
    std::vector<std::vector<size_t>> computed{{0, 0, 0}, {0, 0}};
    auto forward = [&](size_t group, size_t layer, size_t until) {
      from.compute(finals, group, layer, source[group], computed[group][layer], until);
      computed[group][layer] = std::max(computed[group][layer], until);
    };
    if (random() % 2) {
      for (size_t group = 0; group < 2; ++group)
        for (size_t layer = 0; layer < from.layers[group]; ++layer) forward(group, layer, half);
      advance_all(*tables, {half, half});
    }
    const uint64_t post = post_pages(*pair.sender, pair.to_receiver, pair.receiver->describe(window), cursor,
                                     generation, 0, round % 2 == 0);
    std::thread engine([&] {
      Step step;
      for (size_t until : {half, prompt}) {
        if (tables->length(0) < until) grow(until);
        Step pass;
        pass.add(tables, {until, until});
        std::vector<std::pair<size_t, size_t>> order{{0, 0}, {0, 1}, {0, 2}, {1, 0}, {1, 1}};
        if (round % 2) std::shuffle(order.begin(), order.end(), random);
        for (const auto& [group, layer] : order) {
          forward(group, layer, until);
          pass.layer(group, layer);
          if (random() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 200));
        }
        pass.all();
      }
      tables->end({prompt - (fate == Fate::kBeyond), prompt});
    });
    if (fate == Fate::kCancelled) {
      std::this_thread::sleep_for(std::chrono::microseconds(200));
      pair.sender->cancel(post);
    }
    if (fate == Fate::kWindowClosed) pair.receiver->close_window(window);
    const Event sent = pair.sent.wait_for(EventKind::kSent, post);
    engine.join();
    if (fate == Fate::kRuns) CHECK(sent.status == Status::kOk && sent.length == cursor->size());
    if (fate == Fate::kNoPage) CHECK(sent.status == Status::kOutOfBounds);
    if (fate == Fate::kBeyond) CHECK(sent.status == Status::kOk || sent.status == Status::kBeyondEnd);
    const bool whole = sent.status == Status::kOk && fate != Fate::kWindowClosed;
    if (whole) pair.received.wait_for(EventKind::kWindowDone, window);
    const uint64_t landed = pair.receiver->close_window(window);
    if (whole) CHECK(landed == cursor->size());
    // A page holds what it held, or what prefill has; all of them do where the window is done.
    size_t wrong = 0, there = 0, pages = 0;
    for (size_t slot = 0; slot < selection.size(); ++slot) {
      const size_t group = selection[slot].group;
      size_t i = 0;
      for (const auto& [place, count] : selection[slot].runs)
        for (uint64_t p = place; p < place + count; ++p, ++i)
          for (size_t layer = 0; layer < from.layers[group]; ++layer, ++pages)
            there += to.page(group, layer, target[slot][i]) == from.page(group, layer, source[group][p]);
    }
    if (whole) CHECK(there == pages);
    // Nothing else was touched.
    Bytes model = before;
    for (size_t slot = 0; slot < selection.size(); ++slot)
      for (const auto& layer : to.layout->groups()[selection[slot].group].layers)
        for (const auto& plane : layer.planes)
          for (int64_t id : target[slot])
            for (uint64_t offset : plane.run_offsets) {
              const uint64_t at =
                  plane.base + static_cast<uint64_t>(id) * plane.page_stride + offset - address_of(to.memory);
              std::copy_n(to.memory.begin() + static_cast<long>(at), plane.run_bytes,
                          model.begin() + static_cast<long>(at));
            }
    for (size_t b = 0; b < model.size(); ++b) wrong += model[b] != to.memory[b];
    CHECK(wrong == 0);
  }
}

// The engine goes on while sessions are lost, streams cancelled and tables given up.
void hanging_up_races_with_streams(Kind kind) {
  std::mt19937 random(11);
  for (int round = 0; round < 6; ++round) {
    const Cache from({4}, 2, 3);
    Cache to({4}, 2, 4);
    Pair pair(kind);  // its lanes end before the memory does
    from.memory.register_at(pair.sender);
    to.memory.register_at(pair.receiver);
    std::vector<std::shared_ptr<PageTables>> all;
    std::vector<uint64_t> posts;
    for (uint64_t i = 0; i < 12; ++i) {
      auto tables = std::make_shared<PageTables>(from.layers);
      // Each has pages of its own: lanes of one connection write side by side.
      const std::vector<int64_t> ids{static_cast<int64_t>(2 * i), static_cast<int64_t>(2 * i + 1)};
      tables->append(0, ids.data(), ids.size());
      const std::vector<PageRuns> selection{PageRuns(0, {{0, 2}})};
      const uint64_t window = open_pages(pair, to, selection, {ids}, i + 1);
      auto cursor = std::make_shared<PagedCursor>(from.layout, tables, selection);
      posts.push_back(
          post_pages(*pair.sender, pair.to_receiver, pair.receiver->describe(window), cursor, i + 1, 0, true));
      all.push_back(tables);
    }
    std::atomic<bool> over{false};
    std::thread engine([&] {
      Step step;
      for (const auto& tables : all) step.add(tables, {2});
      for (size_t layer = 0; layer < 4 && !over; ++layer) step.layer(0, layer);
      step.all();
    });
    for (size_t i = 0; i < posts.size(); i += 3) pair.sender->cancel(posts[i]);
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
    if (round % 2)
      pair.receiver->close_connection(pair.to_sender, Status::kCancelled, "test");
    else
      pair.sender->close_connection(pair.to_receiver, Status::kCancelled, "test");
    for (uint64_t post : posts) pair.sent.wait_for(EventKind::kSent, post);
    over = true;
    engine.join();
    for (const auto& tables : all) advance_all(*tables, {2});  // nobody listens any more
  }
}

// More layers than may be in flight end one by one while the receiver is busy elsewhere; then it takes them.
void a_stream_outlasts_its_credit(Kind kind) {
  const Cache from({3 * kSlots}, 1, 5);
  Cache to({3 * kSlots}, 1, 6);
  Pair pair(kind);  // its lanes end before the memory does
  from.memory.register_at(pair.sender);
  to.memory.register_at(pair.receiver);
  auto tables = std::make_shared<PageTables>(from.layers);
  const std::vector<int64_t> ids{3, 1};
  tables->append(0, ids.data(), ids.size());
  const std::vector<PageRuns> selection{PageRuns(0, {{0, 2}})};
  const uint64_t window = open_pages(pair, to, selection, {ids}, 1);
  auto cursor = std::make_shared<PagedCursor>(from.layout, tables, selection);
  const auto target = pair.receiver->describe(window);
  const uint64_t post = post_pages(*pair.sender, pair.to_receiver, target, cursor, 1, 0, false);
  {
    const auto busy = pair.receiver->find_connection(pair.to_sender)->channels().front();
    Step step;
    step.add(tables, {2});
    step.layer(0, 0);
    while (pair.receiver->counters.bytes_landed == 0) std::this_thread::yield();  // the channels are ready
    std::lock_guard lock(busy->mutex);
    for (size_t layer = 1; layer < 3 * kSlots; ++layer) step.layer(0, layer);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // the sender's lane sleeps
  }
  // Nobody waits for the sender's completions, so that its lane goes on only if it is woken.
  const uint64_t deadline = now_ns() + static_cast<uint64_t>(kPatienceS * 1e9);
  while (!pair.sent.find(EventKind::kSent, post) && now_ns() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    pair.sent.take();
  }
  const Event* sent = pair.sent.find(EventKind::kSent, post);
  CHECK(sent && sent->status == Status::kOk);
  pair.received.wait_for(EventKind::kWindowDone, window);
  CHECK(pair.receiver->close_window(window) == cursor->size());
  for (size_t layer = 0; layer < 3 * kSlots; ++layer)
    for (int64_t id : ids) CHECK(to.page(0, layer, id) == from.page(0, layer, id));
}

void places_below_are_counted() {
  std::mt19937 random(13);
  for (int round = 0; round < 200; ++round) {
    Ranges ranges;
    std::vector<bool> taken(60);
    for (uint64_t at = random() % 4; at < 50;) {
      const uint64_t count = 1 + random() % 6;
      ranges.push_back({at, count});
      for (uint64_t i = at; i < at + count; ++i) taken[i] = true;
      at += count + random() % 5;
    }
    const PageRuns runs(0, ranges);
    uint64_t below = 0;
    for (uint64_t end = 0; end < taken.size(); below += taken[end++]) CHECK(runs.below(end) == below);
    CHECK(runs.count() == below);
  }
}

void padding_stands_behind_the_end() {
  const Cache cache({2}, 1, 1);
  auto tables = std::make_shared<PageTables>(cache.layers);
  const std::vector<int64_t> ids{4, 2, 7};
  const int64_t padding = 9;
  tables->set_pages(0, ids.data(), ids.size());
  const auto cut = [](PagedCursor& cursor) {
    uint64_t length = 0, last = 1;
    for (; last > 0; length += last) last = cursor.cut(1 << 30, 1 << 20).length;
    return length;
  };
  PagedCursor cursor(cache.layout, tables, {PageRuns(0, {{0, 4}})}, Padding{padding, {2}});
  const uint64_t page = cursor.size() / 8;  // of a layer
  int pushes = 0;
  tables->advance_all({2}, &pushes);
  CHECK(cut(cursor) == 2 * 2 * page && cursor.waits());
  // The table's third page is not the request's: padding is sent in its place.
  tables->end({2});
  CHECK(cut(cursor) == 2 * 2 * page && cursor.exhausted() && cursor.status() == Status::kOk);
  PagedCursor more(cache.layout, tables, {PageRuns(0, {{0, 4}})}, Padding{padding, {3}});
  CHECK(cut(more) == 0 && more.status() == Status::kBeyondEnd);
  PagedCursor none(cache.layout, tables, {PageRuns(0, {{0, 3}})});
  CHECK(cut(none) == 0 && none.status() == Status::kBeyondEnd);
}

void bad_arguments_are_refused() {
  const Cache cache({2}, 1, 1);
  auto tables = std::make_shared<PageTables>(cache.layers);
  const auto refused = [](const auto& what) {
    try {
      what();
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  CHECK(refused([&] {
    int pushes = 0;
    tables->advance(1, 0, 1, 1, &pushes);
  }));
  CHECK(refused([&] {
    int pushes = 0;
    tables->advance(0, 1, 2, 1, &pushes);
  }));
  CHECK(refused([&] { tables->end({1, 2}); }));
  CHECK(refused([&] { PagedCursor(cache.layout, tables, {PageRuns(1, {{0, 1}})}); }));
  CHECK(refused([&] { PageRuns(0, {{0, 2}, {1, 1}}); }));
  CHECK(refused([&] { PagedCursor(cache.layout, tables, {}); }));
  CHECK(refused([&] { PagedCursor(cache.layout, tables, {PageRuns(0, {{0, 1}})}, Padding{0, {1, 1}}); }));
  CHECK(refused([&] {
    const int64_t id = kPages;
    PagedSpace(cache.layout, {{0, 1}}).know(0, &id, 1);
  }));
}

}  // namespace

int main() {
  places_below_are_counted();
  bad_arguments_are_refused();
  padding_stands_behind_the_end();
  for (Kind kind : kinds()) {
    what_lands_is_what_was_final(kind);
    a_stream_outlasts_its_credit(kind);
    hanging_up_races_with_streams(kind);
  }
}
