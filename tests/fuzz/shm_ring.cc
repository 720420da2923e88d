// SPDX-License-Identifier: Apache-2.0
// What a shm peer writes into the shared memory: records of every kind, indices, generations, and bytes anywhere.
#include "../cpp/check.h"
#include "crc32c.h"
#include "shm_peer.h"

namespace sage_kvt::fuzz {
namespace {

// Bits of an input's first byte.
constexpr uint8_t kIncoming = 1, kTrusted = 2, kDirect = 4, kPosts = 8, kSums = 16, kWraps = 96;
enum Move : uint8_t {
  kRecord,
  kNotice,
  kAck,
  kLongMessage,
  kRaw,
  kHead,
  kTail,
  kLive,
  kFlags,
  kTakeEvents,
  kAuthorize,
  kCloseWindow,
  kCancel,
  kSay,
  kMoves
};

template <typename Struct>
void append(std::vector<uint8_t>& record, const Struct& part) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(&part);
  record.insert(record.end(), bytes, bytes + sizeof part);
}

// With pieces that lie in the peer's memory, or say they do.
void write_notice(Input& input, ShmPeer& peer, const AttackedConnection& attacked) {
  Notice notice{};
  notice.header.type = static_cast<uint32_t>(RecordType::kNotice);
  notice.window = attacked.window_named(input.byte());
  notice.offset = input.number<uint16_t>();
  notice.length = input.number<uint16_t>();
  const uint8_t how = input.byte();
  notice.generation = how & 1 ? kGeneration : input.number<uint64_t>();
  notice.flags = how >> 1 & 7;
  if (how & 16) notice.offset = input.number<uint64_t>();
  if (how & 32) notice.length = input.number<uint64_t>();
  notice.slot = input.number<uint16_t>() & (how & 64 ? UINT16_MAX : kSlots - 1);
  notice.arena_offset = how & 64 ? input.number<uint64_t>() : input.number<uint16_t>();
  notice.crc = input.number<uint32_t>();
  auto& memory = machine().peer_memory;
  std::vector<PeerPiece> pieces(input.byte() % 32);
  uint64_t at = reinterpret_cast<uint64_t>(memory.data());
  uint64_t left = notice.length;
  for (auto& piece : pieces) {
    const uint8_t kind = input.byte();
    piece.length = kind & 1 ? input.number<uint64_t>() : std::min<uint64_t>(left, kind * 8);
    if (&piece == &pieces.back() && kind & 2) piece.length = left;
    piece.address = kind & 4 ? input.number<uint64_t>() : at;
    at += kind * 8;
    left -= std::min(left, piece.length);
  }
  notice.pieces = static_cast<uint32_t>(pieces.size());
  if (how & 128) notice.pieces = input.number<uint32_t>();
  std::vector<uint8_t> record;
  notice.header.size = static_cast<uint32_t>(sizeof notice + pieces.size() * sizeof(PeerPiece));
  if (const uint8_t other = input.byte(); other & 1) notice.header.size += other;
  append(record, notice);
  for (const auto& piece : pieces) append(record, piece);
  if (!(how & 128)) peer.live(notice.slot) = notice.generation;
  peer.write_record(record);
}

void move(Input& input, bool wraps, ShmPeer& peer, AttackedConnection& attacked) {
  const uint8_t what = input.byte();
  switch (static_cast<Move>(what % kMoves)) {
    case kRecord: {
      const uint8_t type = input.byte();
      auto body = input.bytes(input.byte());
      RecordHeader header{static_cast<uint32_t>(padded_to_8(sizeof(RecordHeader) + body.size())), type % 8u};
      if (type & 128) header.size = input.number<uint32_t>();
      std::vector<uint8_t> record;
      append(record, header);
      record.insert(record.end(), body.begin(), body.end());
      peer.write_record(record);
      break;
    }
    case kNotice:
      write_notice(input, peer, attacked);
      break;
    case kAck: {
      const Ack ack{{sizeof(Ack), static_cast<uint32_t>(RecordType::kAck)}, input.number<uint16_t>(), input.byte()};
      std::vector<uint8_t> record;
      append(record, ack);
      peer.write_record(record);
      break;
    }
    case kLongMessage: {  // of zeros: a few bring the ring to its end, which takes long
      const uint64_t length = uint64_t{input.number<uint16_t>()} << (wraps ? 5 : 0);
      MessageRecord message{
          {static_cast<uint32_t>(padded_to_8(sizeof message + length)), static_cast<uint32_t>(RecordType::kMessage)},
          length};
      if (what & 16) message.length = input.number<uint64_t>();
      std::vector<uint8_t> record;
      append(record, message);
      peer.write_record(record, message.header.size);
      break;
    }
    case kRaw: {
      const size_t at = input.number<uint32_t>();
      peer.write_raw(at, input.bytes(input.byte()));
      break;
    }
    case kHead:
      if (what & 128)
        peer.their_ring().head = input.number<uint64_t>();
      else
        peer.their_ring().head += input.number<uint16_t>();
      break;
    case kTail:
      peer.our_ring().tail = what & 128 ? input.number<uint64_t>() : peer.our_ring().head.load();
      break;
    case kLive: {
      const uint8_t slot = input.byte();
      peer.live(slot) = input.number<uint64_t>();
      break;
    }
    case kFlags:
      peer.our_ring().sleeping = input.byte();
      peer.their_ring().blocked = input.byte();
      peer.their_ring().pings = input.byte();
      peer.our_ring().answered = input.byte();
      break;
    case kTakeEvents:
      attacked.take_events();
      break;
    case kAuthorize:
      attacked.authorize();
      break;
    case kCloseWindow:
      attacked.close_window();
      break;
    case kCancel:
      attacked.cancel();
      break;
    case kSay:
      attacked.say(input.byte() * 64u);
      break;
    case kMoves:
      break;
  }
  if (!(what & 64)) attacked.turn();
}

}  // namespace

int attack(const uint8_t* data, size_t size) {
  Input input(data, size);
  reset_shm_machine();
  const uint8_t flags = input.byte();
  {
    const bool incoming = flags & kIncoming;
    AttackedConnection attacked(shm_endpoint(), incoming);
    ShmPeer peer(attacked, incoming);
    peer.shake_hands(flags & kDirect);
    while (attacked.turn()) {
    }
    CHECK(!peer.channel()->dead && attacked.connection()->announced);
    if (flags & kTrusted) attacked.authorize();
    if (flags & kPosts) attacked.post(flags & kSums);
    while (!input.empty()) move(input, (flags & kWraps) == kWraps, peer, attacked);
    while (attacked.turn()) attacked.take_events();
    attacked.end();
  }
  CHECK(machine().open.empty() && !machine().mapped);
  return 0;
}

}  // namespace sage_kvt::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) { return sage_kvt::fuzz::attack(data, size); }
