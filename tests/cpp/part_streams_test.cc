// SPDX-License-Identifier: Apache-2.0
// Converting transfers whose pages become final one after the other, against a model of what must land.
#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "pair.h"
#include "parts/part_decoder.h"
#include "parts/part_encoder.h"

using namespace sage_kvt;

namespace {

constexpr int64_t kHeads = 2, kDim = 16, kTokenBytes = kDim * 2, kPartTokens = 16;
constexpr WireFormat kWire{Dtype::kBf16, Granularity::kNone, 64, 0};
const std::vector<size_t> kLayers{3, 2};

// One side's pages: in a page of a layer head after head, token after token; one plane.
struct Cache {
  int64_t page_tokens, pages;
  Bytes memory;
  std::vector<std::shared_ptr<const PagedConverter>> converters;

  Cache(int64_t page_tokens_, int64_t pages_, unsigned seed) : page_tokens(page_tokens_), pages(pages_) {
    std::mt19937 random(seed);
    memory.resize(5 * static_cast<size_t>(pages * page_bytes()));
    for (size_t i = 0; i < memory.size(); i += 2) {  // finite numbers
      const auto raw = static_cast<uint16_t>((random() & 0x807F) | ((115 + random() % 16) << 7));
      std::memcpy(memory.data() + i, &raw, 2);
    }
    const int64_t head = page_tokens * kTokenBytes;
    const ElementOrder rows{1 << 20, kTokenBytes, int64_t{kTokenBytes} << 20, 1 << 20, 2, 2 << 20};
    uint64_t at = address_of(memory);
    for (size_t layers : kLayers) {
      ConvertedPlane plane{rows, head, page_bytes(), kDim, kWire, {}, {}, {}};
      for (size_t l = 0; l < layers; ++l, at += static_cast<uint64_t>(pages * page_bytes())) plane.bases.push_back(at);
      plane.memory_scales = plane.wire_scales = std::vector<float>(layers, 1.0f);
      converters.push_back(std::make_shared<PagedConverter>(Dtype::kBf16, page_tokens, pages, kHeads,
                                                            std::vector<ConvertedPlane>{plane}, chosen_tile_kernels()));
    }
  }

  int64_t page_bytes() const { return kHeads * page_tokens * kTokenBytes; }
  // Of an element's row, in `memory`.
  size_t at(size_t group, size_t layer, const std::vector<int64_t>& ids, int64_t head, int64_t token) const {
    const size_t nth = layer + (group == 0 ? 0 : kLayers[0]);
    const int64_t page = ids[static_cast<size_t>(token / page_tokens)];
    return static_cast<size_t>((static_cast<int64_t>(nth) * pages + page) * page_bytes() +
                               head * page_tokens * kTokenBytes + token % page_tokens * kTokenBytes);
  }
  std::vector<int64_t> some_pages(std::mt19937& random, int64_t tokens) const {
    std::vector<int64_t> ids(static_cast<size_t>(pages));
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int64_t>(i);
    std::shuffle(ids.begin(), ids.end(), random);
    ids.resize(static_cast<size_t>((tokens + page_tokens - 1) / page_tokens));
    return ids;
  }
  PartTerms terms() const { return {0, kHeads, {page_tokens, page_tokens}, converters}; }
};

std::vector<Part> parts_of(const Cache& cache, int64_t tokens) {
  std::vector<Part> parts;
  for (int64_t first = 0; first < tokens; first += kPartTokens)
    for (size_t group = 0; group < kLayers.size(); ++group)
      for (size_t l = 0; l < kLayers[group]; l += 2) {
        Part part{group,
                  static_cast<int64_t>(l),
                  static_cast<int64_t>(std::min<size_t>(2, kLayers[group] - l)),
                  first,
                  std::min(kPartTokens, tokens - first),
                  0,
                  0};
        part.nbytes = cache.converters[group]->wire_bytes(
            {part.first_layer, part.layers, 0, kHeads, part.first_token, part.tokens, {}});
        parts.push_back(part);
      }
  return parts;
}

Bytes ring_memory(const std::vector<Part>& parts, size_t slots) {
  uint64_t largest = 0;
  for (const auto& part : parts) largest = std::max(largest, part.nbytes);
  return Bytes(slots * largest);
}

PartRing ring_of(const Bytes& memory, size_t slots) { return {address_of(memory), memory.size() / slots, slots}; }

// The first event of a stream in a pool's queue; a pool has one stream here.
const Event& wait_for(ConversionPool& pool, EventKind kind, std::vector<Event>& seen) {
  while (true) {
    for (const auto& event : seen)
      if (event.kind == kind) return event;
    CHECK(pool.completions().wait(now_ns() + static_cast<uint64_t>(kPatienceS * 1e9)));
    for (auto& event : pool.completions().take(64)) seen.push_back(std::move(event));
  }
}

// Tables that grow, layers that become final in any order, rings of every size; some transfers are cancelled, some ask
// for what is not there, some lose their window, or what converts them.
void what_lands_is_what_was_final(Kind kind) {
  std::mt19937 random(17);
  for (int round = 0; round < 40; ++round) {
    const auto seed = static_cast<unsigned>(round);
    Cache from(4, 40, 1 + seed), to(8, 24, 1000 + seed);
    const Bytes before = to.memory;
    const int64_t prompt = 20 + static_cast<int64_t>(random() % 60);
    std::vector<std::vector<int64_t>> source{from.some_pages(random, prompt), from.some_pages(random, prompt)};
    const std::vector<std::vector<int64_t>> table = source;
    // A consumer with larger pages may ask for more than the prompt: it gets padding, not what lies behind.
    const bool padded = random() % 3 == 0;
    const int64_t padding = from.pages - 1;
    const int64_t tokens = padded ? (prompt + 23) / 8 * 8 : prompt;
    for (auto& ids : source) ids.resize(static_cast<size_t>((tokens + 3) / 4), padding);
    std::vector<TargetPages> target{{0, to.some_pages(random, tokens)}, {0, to.some_pages(random, tokens)}};
    enum class Fate { kRuns, kCancelled, kBeyond, kWindowClosed, kNoPage, kBadPage, kDecoderClosed };
    Fate fate = static_cast<Fate>(random() % 12);
    if (static_cast<int>(fate) > 6) fate = Fate::kRuns;
    const auto parts = parts_of(from, tokens);
    const size_t there = 1 + random() % 5, here = 1 + random() % 5;
    Bytes out = ring_memory(parts, there), in = ring_memory(parts, here);
    auto pool_there = std::make_shared<ConversionPool>(2), pool_here = std::make_shared<ConversionPool>(2);
    Pair pair(kind, round % 3 == 0 ? 4096 : 64u << 10);  // its lanes end before the memory does
    out.register_at(pair.sender);
    in.register_at(pair.receiver);
    auto tables = std::make_shared<PageTables>(kLayers);
    PromptEnd end{fate == Fate::kBeyond ? prompt + 8 : prompt, std::nullopt};
    if (padded) end.padding_page = padding;
    auto encoder = std::make_shared<PartEncoder>(pool_there, parts, from.terms(), tables, end);
    PartEncoder::attach(encoder);
    auto decoder = std::make_shared<PartDecoder>(pool_here, parts_of(to, tokens), to.terms(), target);
    CHECK(encoder->size() == decoder->size());
    const uint64_t generation = 1 + seed;
    const uint64_t window = decoder->start(ring_of(in, here), *pair.receiver, pair.to_sender, generation);
    encoder->grant(decoder->granted());

    const auto pages = static_cast<uint64_t>(table[0].size());
    std::thread engine([&] {
      std::mt19937 engine_random(seed);
      if (fate == Fate::kBeyond) tables->end({pages, pages});
      for (uint64_t until : {pages / 2, pages}) {
        for (size_t group = 0; group < 2; ++group) {
          const size_t known = tables->length(group);
          std::vector<int64_t> ids(table[group].begin() + static_cast<long>(known),
                                   table[group].begin() + static_cast<long>(until));
          if (fate == Fate::kNoPage && group == 1 && until == pages) ids.back() = kNullPage;
          if (fate == Fate::kBadPage && group == 1 && until == pages) ids.back() = from.pages;
          if (until == pages && round % 4 == 0) ids.push_back(0);  // for what comes after the prompt
          tables->append(group, ids.data(), ids.size());
        }
        Step step;
        step.add(tables, {until, until});
        std::vector<std::pair<size_t, size_t>> order{{0, 0}, {0, 1}, {0, 2}, {1, 0}, {1, 1}};
        if (round % 2) std::shuffle(order.begin(), order.end(), engine_random);
        for (const auto& [group, layer] : order) {
          step.layer(group, layer);
          if (engine_random() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(engine_random() % 200));
        }
      }
      tables->end({pages, pages});
    });
    std::vector<Event> told_there, told_here;
    const Event ready = wait_for(*pool_there, EventKind::kPartsReady, told_there);
    uint64_t post = 0;
    if (ready.status == Status::kOk)
      post = encoder->start(ring_of(out, there), *pair.sender, pair.to_receiver, pair.receiver->describe(window),
                            {generation, 0, round % 2 == 0});
    if (fate == Fate::kCancelled) {
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
      pair.sender->cancel(post);
    }
    if (fate == Fate::kWindowClosed) {
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
      pair.receiver->close_window(window);
      decoder->close();
    }
    if (fate == Fate::kDecoderClosed) decoder->close();  // what comes then is refused
    if (fate == Fate::kRuns) {
      CHECK(wait_for(*pool_here, EventKind::kPartsDone, told_here).status == Status::kOk);
      const Event& sent = pair.sent.wait_for(EventKind::kSent, post);
      CHECK(sent.status == Status::kOk && sent.length == encoder->size());
      CHECK(decoder->granted() == decoder->count());
    } else if (fate == Fate::kNoPage || fate == Fate::kBadPage) {
      CHECK(pair.sent.wait_for(EventKind::kSent, post).status == Status::kOutOfBounds);
    } else if (fate == Fate::kBeyond && ready.status == Status::kOk) {
      CHECK(pair.sent.wait_for(EventKind::kSent, post).status == Status::kBeyondEnd);
    } else if (fate == Fate::kBeyond) {
      CHECK(ready.status == Status::kBeyondEnd);
    }
    engine.join();
    if (post != 0) pair.sender->cancel(post);
    encoder->close();
    pair.receiver->close_window(window);
    decoder->close();
    const Bytes after = to.memory;
    // A row holds what it held, or what prefill has; nothing else was touched.
    Bytes model = before;
    size_t wrong = 0, rows = 0, arrived = 0;
    for (size_t group = 0; group < 2; ++group)
      for (size_t layer = 0; layer < kLayers[group]; ++layer)
        for (int64_t head = 0; head < kHeads; ++head)
          for (int64_t token = 0; token < tokens; ++token, ++rows) {
            const auto* sent = from.memory.data() + from.at(group, layer, source[group], head, token);
            const size_t at = to.at(group, layer, target[group].ids, head, token);
            if (std::memcmp(after.data() + at, sent, kTokenBytes) != 0) continue;
            ++arrived;
            std::memcpy(model.data() + at, sent, kTokenBytes);
          }
    for (size_t b = 0; b < model.size(); ++b) wrong += model[b] != after[b];
    CHECK(wrong == 0);
    if (fate == Fate::kRuns) CHECK(arrived == rows);
    // Nothing goes on once both sides were closed.
    std::fill(in.begin(), in.end(), uint8_t{0});
    CHECK(to.memory == after);
    pool_there->close();
    pool_here->close();
  }
}

// The engine goes on while sessions are lost and transfers closed.
void hanging_up_races_with_parts(Kind kind) {
  std::mt19937 random(23);
  for (int round = 0; round < 6; ++round) {
    Cache from(4, 16, 3), to(8, 8, 4);
    const int64_t tokens = 64;
    const auto parts = parts_of(from, tokens);
    auto pool = std::make_shared<ConversionPool>(2), pool_here = std::make_shared<ConversionPool>(2);
    std::vector<Bytes> rings;
    Pair pair(kind);  // its lanes end before the memory does
    auto tables = std::make_shared<PageTables>(kLayers);
    for (size_t group = 0; group < 2; ++group) {
      const auto ids = from.some_pages(random, tokens);
      tables->append(group, ids.data(), ids.size());
    }
    std::vector<std::shared_ptr<PartEncoder>> encoders;
    std::vector<std::shared_ptr<PartDecoder>> decoders;
    std::vector<uint64_t> windows, posts;
    for (uint64_t i = 0; i < 4; ++i) {
      rings.push_back(ring_memory(parts, 2));
      rings.push_back(ring_memory(parts, 2));
      rings[2 * i].register_at(pair.sender);
      rings[2 * i + 1].register_at(pair.receiver);
      // All write into the same pages, one after the other at most: what lands is of no interest here.
      decoders.push_back(std::make_shared<PartDecoder>(
          pool_here, parts_of(to, tokens), to.terms(),
          std::vector<TargetPages>{{0, to.some_pages(random, tokens)}, {0, to.some_pages(random, tokens)}}));
      windows.push_back(decoders[i]->start(ring_of(rings[2 * i + 1], 2), *pair.receiver, pair.to_sender, i + 1));
      encoders.push_back(
          std::make_shared<PartEncoder>(pool, parts, from.terms(), tables, PromptEnd{tokens, std::nullopt}));
      PartEncoder::attach(encoders[i]);
      encoders[i]->grant(2);
      posts.push_back(encoders[i]->start(ring_of(rings[2 * i], 2), *pair.sender, pair.to_receiver,
                                         pair.receiver->describe(windows[i]), {i + 1, 0, true}));
      if (i > 0) decoders[i]->close();
    }
    std::atomic<bool> over{false};
    std::thread engine([&] {
      Step step;
      step.add(tables, {16, 16});
      for (size_t layer = 0; layer < 3 && !over; ++layer) {
        step.layer(0, layer);
        if (layer < 2) step.layer(1, layer);
      }
    });
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
    if (round % 2)
      pair.receiver->close_connection(pair.to_sender, Status::kCancelled, "test");
    else
      pair.sender->close_connection(pair.to_receiver, Status::kCancelled, "test");
    for (uint64_t post : posts) pair.sent.wait_for(EventKind::kSent, post);
    for (size_t i = 0; i < encoders.size(); ++i) {
      encoders[i]->close();
      pair.receiver->close_window(windows[i]);
      decoders[i]->close();
    }
    over = true;
    engine.join();
    pool->close();
    pool_here->close();
  }
}

// A producer that sends what it was not granted does not get at a slot that is in use.
void what_was_not_granted_is_refused(Kind kind) {
  Cache from(4, 16, 3), to(8, 8, 4);
  const Bytes before = to.memory;
  std::mt19937 random(5);
  const auto parts = parts_of(from, 64);
  uint64_t size = 0;
  for (const auto& part : parts) size += part.nbytes;
  const Bytes noise = random_bytes(size, 9);
  Bytes in = ring_memory(parts, 2);
  auto pool = std::make_shared<ConversionPool>(1);
  Pair pair(kind);  // its lanes end before the memory does
  in.register_at(pair.receiver);
  auto decoder = std::make_shared<PartDecoder>(
      pool, parts_of(to, 64), to.terms(),
      std::vector<TargetPages>{{0, to.some_pages(random, 64)}, {0, to.some_pages(random, 64)}});
  const uint64_t window = decoder->start(ring_of(in, 2), *pair.receiver, pair.to_sender, 1);
  noise.register_at(pair.sender);
  const uint64_t at = parts[0].nbytes + parts[1].nbytes;  // of the third part
  pair.sender->post(pair.to_receiver, pair.receiver->describe(window), {{address_of(noise), at, parts[2].nbytes}}, 1, 0,
                    true);
  CHECK(pair.received.wait_for(EventKind::kWindowFailed, window).status == Status::kOutOfBounds);
  pair.receiver->close_window(window);
  decoder->close();
  pool->close();
  CHECK(to.memory == before);
}

void bad_arguments_are_refused() {
  Cache cache(4, 16, 1);
  auto pool = std::make_shared<ConversionPool>(1);
  auto tables = std::make_shared<PageTables>(kLayers);
  const auto refused = [](const auto& what) {
    try {
      what();
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  const auto parts = parts_of(cache, 16);
  CHECK(refused([&] { PartEncoder(pool, {}, cache.terms(), tables, {}); }));
  CHECK(refused([&] {
    auto wrong = parts;
    wrong[0].layers = 4;
    PartEncoder(pool, wrong, cache.terms(), tables, {});
  }));
  CHECK(refused([&] {
    auto wrong = parts;
    wrong[0].group = 2;
    PartEncoder(pool, wrong, cache.terms(), tables, {});
  }));
  CHECK(refused([&] { PartDecoder(pool, parts, cache.terms(), {{0, {1, 2}}, {0, {1, 2, 3, 4}}}); }));
  CHECK(refused([&] { PartDecoder(pool, parts, cache.terms(), {{1, {1, 2, 3, 4}}, {0, {1, 2, 3, 4}}}); }));
  Pair pair(Kind::kTcp);
  auto decoder = std::make_shared<PartDecoder>(pool, parts, cache.terms(),
                                               std::vector<TargetPages>{{0, {1, 2, 3, 4}}, {0, {1, 2, 3, 4}}});
  CHECK(refused([&] { decoder->start({4096, decoder->largest() - 1, 2}, *pair.receiver, pair.to_sender, 1); }));
  CHECK(refused([&] { decoder->start({4096, decoder->largest(), 0}, *pair.receiver, pair.to_sender, 1); }));
  CHECK(refused([&] { decoder->asked(0); }));
  pool->close();
}

}  // namespace

int main() {
  bad_arguments_are_refused();
  for (Kind kind : kinds()) {
    RUN(what_was_not_granted_is_refused, kind);
    RUN(what_lands_is_what_was_final, kind);
    RUN(hanging_up_races_with_parts, kind);
  }
}
