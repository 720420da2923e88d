// SPDX-License-Identifier: Apache-2.0
// A converting transfer on both sides, whose peers grant and send what they like: grants of any number for what we
// send, chunks of any place and length for what we receive.
#include "../cpp/check.h"
#include "attacked_connection.h"
#include "parts/part_decoder.h"
#include "parts/part_encoder.h"

namespace sage_kvt::fuzz {
namespace {

constexpr uint64_t kPeersWindow = 99;
constexpr int64_t kPageTokens = 4;
enum Move : uint8_t {
  kGrant,
  kCut,
  kSent,
  kChunk,
  kTorn,
  kAnswer,
  kFail,
  kAdvance,
  kEnd,
  kClose,
  kBack,
  kLost,
  kMoves
};

// The two sides' transports, without a channel: what comes and goes is said here.
struct Machinery {
  Endpoint& endpoint;
  std::shared_ptr<ConversionPool> pool;
};

class Quiet : public Endpoint {
 public:
  Quiet() : Endpoint(stepped_options(1)) {}
  std::string listen(const std::string&) override { return ""; }
  uint64_t connect(const std::string&, double) override { return 0; }
};

Machinery& machinery() {
  static auto* made = new Machinery{*new Quiet, std::make_shared<ConversionPool>(1, true)};
  return *made;
}

std::vector<Part> parts_of(Input& input) {
  std::vector<Part> parts(1 + input.byte() % 12);
  int64_t token = 0;
  for (auto& part : parts) {
    const uint8_t shape = input.byte();
    part = {shape & 1u, 0, 1 + (shape >> 1 & 1), token, 1 + (shape >> 2 & 7), 1u + (shape >> 5) * 37u, 0};
    if (shape & 16) token += part.tokens;
  }
  return parts;
}

PartTerms terms() { return {0, 2, {kPageTokens, kPageTokens}, {}}; }

// Staging memory with nothing to spare behind it.
struct Staging {
  Staging(size_t slots_, uint64_t slot_bytes) : slots(slots_), memory(slots_ * slot_bytes) {
    region = machinery().endpoint.register_memory(reinterpret_cast<uint64_t>(memory.data()), memory.size());
  }
  PartRing ring() const { return {reinterpret_cast<uint64_t>(memory.data()), memory.size() / slots, slots}; }
  size_t slots;
  std::vector<uint8_t> memory;
  uint64_t region;
};

// What Python does with the parts that it is asked to convert. `why`: it can't.
void answer(PartStream& stream, const Staging& staging, std::vector<Event>& asked, const std::string& why) {
  for (const auto& event : asked) {
    if (event.kind != EventKind::kPartToConvert || event.id != stream.id) continue;
    try {
      const PartWork work = stream.asked(event.offset);
      const auto begin = reinterpret_cast<uint64_t>(staging.memory.data());
      const uint64_t bytes = stream.part(event.offset).nbytes;
      CHECK(work.wire >= begin && work.wire - begin + bytes <= staging.memory.size());
      std::memset(reinterpret_cast<void*>(work.wire), 1, bytes);
      stream.answered(event.offset, why);
    } catch (const std::invalid_argument&) {
      // the stream was closed meanwhile
    }
  }
  std::erase_if(asked, [&](const Event& event) { return event.id == stream.id; });
}

}  // namespace

int attack(const uint8_t* data, size_t size) {
  Input input(data, size);
  auto& [endpoint, pool] = machinery();
  const auto connection = endpoint.new_connection(false);
  endpoint.authorize(connection->id);
  const auto parts = parts_of(input);
  int64_t tokens = 0;
  for (const auto& part : parts) tokens = std::max(tokens, part.first_token + part.tokens);
  const auto pages = static_cast<uint64_t>((tokens + kPageTokens - 1) / kPageTokens);
  std::vector<int64_t> ids(pages);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int64_t>(i);
  auto tables = std::make_shared<PageTables>(std::vector<size_t>{2, 2});
  for (size_t group = 0; group < 2; ++group) tables->append(group, ids.data(), ids.size());
  auto encoder = std::make_shared<PartEncoder>(pool, parts, terms(), tables, PromptEnd{tokens, std::nullopt});
  PartEncoder::attach(encoder);
  auto decoder = std::make_shared<PartDecoder>(pool, parts, terms(), std::vector<TargetPages>{{0, ids}, {0, ids}});
  const size_t slots = 1 + input.byte() % 4;
  Staging out(slots, encoder->largest()), in(slots, decoder->largest());
  const uint64_t post = encoder->start(out.ring(), endpoint, connection->id, {kPeersWindow, 1, encoder->size()}, {1});
  const auto window = endpoint.find_window(decoder->start(in.ring(), endpoint, connection->id, 1));
  std::vector<std::pair<std::shared_ptr<Post>, Chunk>> flying;
  std::vector<Event> asked;
  uint64_t granted = 0, cut = 0;
  while (!input.empty()) {
    const uint8_t what = input.byte();
    switch (static_cast<Move>(what % kMoves)) {
      case kGrant: {
        const uint64_t grant = what & 128 ? input.number<uint64_t>() : input.byte();
        granted = std::max(granted, grant);
        connection->granted({what & 64 ? input.number<uint64_t>() : kPeersWindow, grant});
        break;
      }
      case kCut: {
        auto& [found, chunk] = flying.emplace_back();
        if (!connection->take_chunk(false, 1 + input.byte(), kMaxPieces, &found, &chunk)) {
          flying.pop_back();
          break;
        }
        CHECK(chunk.pieces.size() == 1 && chunk.length > 0 && chunk.offset + chunk.length <= encoder->size());
        cut += chunk.length;
        const auto* from = static_cast<const uint8_t*>(chunk.pieces[0].iov_base);
        std::vector<uint8_t> wire(from, from + chunk.pieces[0].iov_len);  // read, as a lane would
        uint64_t allowed = 0;
        for (size_t p = 0; p < parts.size() && p < granted; ++p) allowed += encoder->part(p).nbytes;
        CHECK(cut <= allowed);
        break;
      }
      case kSent:
        if (flying.empty()) break;
        if (what & 128)
          connection->chunk_failed(flying.front().first, Status::kRefused, "");
        else
          connection->chunk_sent(flying.front().first, flying.front().second.offset, flying.front().second.length);
        flying.erase(flying.begin());
        break;
      case kChunk:
      case kTorn: {
        const uint64_t offset = what & 128 ? input.number<uint64_t>() : input.number<uint16_t>();
        const uint64_t length = what & 64 ? input.number<uint64_t>() : input.byte();
        if (window->reserve(offset, length, 1) != Status::kOk) break;
        for (uint64_t done = 0; done < length;) {
          WindowPin pin(*window);
          if (!pin) break;
          std::vector<iovec> pieces;
          const uint64_t covered = window->space().pieces(offset + done, length - done, 1 + what % 3, &pieces);
          CHECK(covered > 0);
          for (const auto& piece : pieces) std::memset(piece.iov_base, what, piece.iov_len);
          done += covered;
        }
        if (what % kMoves == kChunk)
          endpoint.window_landed(*connection, window, offset, length);
        else
          endpoint.window_failed(window, Status::kChecksumMismatch, offset, length, "");
        break;
      }
      case kAnswer:
      case kFail: {
        const std::string why = what % kMoves == kFail ? "no" : "";
        for (auto& event : pool->completions().take(1u << 20)) asked.push_back(std::move(event));
        if (what & 128) answer(*encoder, out, asked, why);
        if (what & 64) answer(*decoder, in, asked, why);
        break;
      }
      case kAdvance: {
        int pushes = 0;
        const uint64_t final_pages = input.byte();
        tables->advance(what >> 7, what >> 6 & 1, 1, final_pages, &pushes);
        break;
      }
      case kEnd:
        tables->end({pages, what & 128 ? pages : pages / 2});
        break;
      case kClose:
        if (what & 64) decoder->close();
        if (what & 128) encoder->close();
        if (what & 32) endpoint.close_window(window->id);
        break;
      case kBack:
        if (flying.empty()) break;
        cut -= flying.front().second.length;
        connection->give_back(flying.front().first, std::move(flying.front().second));
        flying.erase(flying.begin());
        break;
      case kLost: {  // it may come again, once
        const uint64_t offset = input.number<uint16_t>(), length = input.byte();
        if (window->reserve(offset, length, 1) != Status::kOk) break;
        window->release(offset, length);
        CHECK(window->reserve(offset, length, 1) == Status::kOk);
        CHECK(window->reserve(offset, length, 1) == Status::kOverlap);
        window->release(offset, length);
        break;
      }
      case kMoves:
        break;
    }
    while (what & 16 && pool->step()) {
    }
  }
  while (pool->step()) {
  }
  endpoint.cancel(post);
  for (const auto& [found, chunk] : flying) connection->chunk_failed(found, Status::kCancelled, "");
  endpoint.close_connection(connection->id, Status::kCancelled, "");
  endpoint.close_window(window->id);
  encoder->close();
  decoder->close();
  while (pool->step()) {
  }
  int sent = 0, ended = 0;
  for (const auto& event : endpoint.poll(1u << 20)) {
    sent += event.kind == EventKind::kSent;
    ended += event.kind == EventKind::kWindowDone || event.kind == EventKind::kWindowFailed;
  }
  CHECK(sent == 1 && ended <= 1);
  pool->completions().take(1u << 20);
  endpoint.deregister_memory(out.region);  // refused as long as anything holds it
  endpoint.deregister_memory(in.region);
  return 0;
}

}  // namespace sage_kvt::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) { return sage_kvt::fuzz::attack(data, size); }
