// SPDX-License-Identifier: Apache-2.0
// What a peer does over a path: words, notices in cells, bytes anywhere in them; and what its wire tells: reads that
// end or fail, rests, or that it broke. Notes that are no notes.
#include <optional>

#include "../cpp/check.h"
#include "attacked_connection.h"
#include "fake_wire.h"
#include "hostile_notice.h"
#include "path/channel.h"
#include "rdma/notes.h"
#include "system_calls.h"
#include "tcp/tcp_endpoint.h"

namespace sage_kvt::fuzz {
namespace {

// Bits of an input's first byte.
constexpr uint8_t kDialled = 1, kTrusted = 2, kPosts = 4, kSums = 8, kNoKeys = 16, kStaged = 32;
enum Move : uint8_t {
  kWord,
  kNotice,
  kCell,
  kEnd,
  kRead,
  kBreak,
  kOpen,
  kNote,
  kTakeEvents,
  kAuthorize,
  kCloseWindow,
  kCancel,
  kLater,
  kMoves
};

SteppedEndpoint<TcpEndpoint>& endpoint() {
  static auto* made = new SteppedEndpoint<TcpEndpoint>(stepped_options(1), TcpOptions{});
  return *made;
}

// Of a path that ended: its peer may say anything of the chunks that were under way.
struct Owner : PathOwner {
  void path_ended(const PathChannel& channel, Flights flights, const Results& results) override {
    CHECK(fake_wire().destroyed && !left);
    for (const auto& result : results) CHECK(result.status <= UINT8_MAX);
    left = std::move(flights);
    connection = channel.connection;
  }
  void settle(Input& input) {
    if (!left) return;
    for (auto& flight : *left) {
      if (!flight.post) continue;
      if (const uint8_t how = input.byte(); how & 1)
        connection->give_back(flight.post, std::move(flight.chunk));
      else
        end_flight(*connection, std::move(flight), how & 2 ? input.number<uint64_t>() : 0);
    }
    left.reset();
  }
  std::optional<Flights> left;
  std::shared_ptr<Connection> connection;
};

void move(Input& input, AttackedConnection& attacked, Owner& owner) {
  auto& wire = fake_wire();
  const uint8_t what = input.byte();
  switch (static_cast<Move>(what % kMoves)) {
    case kWord:
      wire.completions.push_back(
          {PathWire::Done::What::kTold, 0, PathWord::unpacked(what & 128 ? input.number<uint32_t>() : 1u << 24), ""});
      break;
    case kNotice: {
      const auto [cell, bytes] = notice_from(input, attacked);
      std::memcpy(wire.cells + cell * kCellBytes, bytes.data(), bytes.size());
      wire.completions.push_back({PathWire::Done::What::kTold, 0, {Told::kChunk, cell, 0}, ""});
      break;
    }
    case kCell: {
      const size_t at = input.number<uint32_t>() % (kCells * kCellBytes);
      const auto bytes = input.bytes(std::min<size_t>(input.byte(), kCells * kCellBytes - at));
      if (!bytes.empty()) std::memcpy(wire.cells + at, bytes.data(), bytes.size());
      break;
    }
    case kEnd:
      wire.completions.push_back({PathWire::Done::What::kTold, 0, {Told::kEnded, input.byte() % 2u, input.byte()}, ""});
      break;
    case kRead:
      if (!wire.destroyed) wire.read(1 + what / kMoves, input.byte(), what & 128);
      break;
    case kBreak:
      if (what & 128)
        wire.takes_orders = false;
      else
        wire.completions.push_back({PathWire::Done::What::kBroken, 0, {}, "broken"});
      break;
    case kOpen: {
      const bool rests = what & 128;
      wire.completions.push_back({rests ? PathWire::Done::What::kResting : PathWire::Done::What::kOpen, 0, {}, ""});
      break;
    }
    case kNote: {
      const auto bytes = input.bytes(input.number<uint16_t>());
      const std::string note(bytes.begin(), bytes.end());
      if (const auto invitation = invitation_of(note))
        CHECK(note_of(*invitation).size() == note.size() && invitation->addresses.size() <= kMostAddresses);
      if (const auto ended = path_ended_of(note)) CHECK(note_of(*ended) == note);
      break;
    }
    case kTakeEvents:
      attacked.take_events();
      break;
    case kAuthorize:
      attacked.authorize();
      break;
    case kCloseWindow:
      // It waits for reads that are under way, which the card would end.
      if (!wire.destroyed) wire.read(SIZE_MAX, input.byte());
      attacked.turn();
      if (wire.reads.empty()) attacked.close_window();
      break;
    case kCancel:
      attacked.cancel();
      break;
    case kLater:
      owner.settle(input);
      break;
    case kMoves:
      break;
  }
  if (!(what & 64)) attacked.turn();
}

}  // namespace

int attack(const uint8_t* data, size_t size) {
  Input input(data, size);
  endpoint();
  machine().reset();
  const uint8_t flags = input.byte();
  {
    Owner owner;
    AttackedConnection attacked(endpoint(), !(flags & kDialled));
    if (flags & kTrusted) attacked.authorize();
    auto first = std::make_shared<PathChannel>(attacked.connection(), owner, new_fake_wire(), 1);
    fake_wire().has_keys = !(flags & kNoKeys);
    fake_wire().in_place = !(flags & kStaged);
    endpoint().attach(first);
    if (flags & kPosts) attacked.post(flags & kSums);
    while (!input.empty()) move(input, attacked, owner);
    for (bool moved = true; moved;) {
      moved = attacked.turn();
      if (!fake_wire().destroyed && !fake_wire().reads.empty()) fake_wire().read(SIZE_MAX, 1);
      attacked.take_events();
    }
    owner.settle(input);
    attacked.end();
    owner.settle(input);
  }
  CHECK(machine().open.empty());
  return 0;
}

}  // namespace sage_kvt::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) { return sage_kvt::fuzz::attack(data, size); }
