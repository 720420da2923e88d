// SPDX-License-Identifier: Apache-2.0
// What a tcp peer sends: any bytes, in any pieces, before and after the layer above trusts it.
#include "../cpp/check.h"
#include "attacked_connection.h"
#include "crc32c.h"
#include "system_calls.h"
#include "tcp/tcp_endpoint.h"

namespace sage_kvt::fuzz {
namespace {

// Bits of an input's first byte.
constexpr uint8_t kIncoming = 1, kTrusted = 2, kJoins = 4, kSealed = 8, kTrueSums = 16, kReset = 32, kSecondLane = 64,
                  kComposed = 128;
constexpr size_t kMaxSteps = 24, kMaxComposed = 16u << 10;
// Of the second: the connection has several links.
constexpr uint8_t kLinked = 128;

SteppedEndpoint<TcpEndpoint>& endpoint() {
  static auto* made = new SteppedEndpoint<TcpEndpoint>(stepped_options(3), TcpOptions{});
  return *made;
}

// Headers get the magic, window and checksum that only somebody who reads our memory could choose, so that what
// stands in them is looked at. Payloads and what is no frame stay as they are.
void seal(std::vector<uint8_t>& stream, uint8_t flags, const AttackedConnection& attacked) {
  size_t at = 0;
  while (stream.size() - at >= sizeof(FrameHeader)) {
    FrameHeader header;
    std::memcpy(&header, stream.data() + at, sizeof header);
    header.magic = kFrameMagic;
    header.window = attacked.window_named(header.window);
    header.header_crc = frame_header_crc(header);
    std::memcpy(stream.data() + at, &header, sizeof header);
    at += sizeof header;
    const auto type = static_cast<FrameType>(header.type);
    if (type != FrameType::kMessage && type != FrameType::kData) continue;
    const size_t payload = std::min<uint64_t>(header.length, stream.size() - at);
    const uint32_t crc = crc32c(0, stream.data() + at, payload);
    at += payload;
    if (type == FrameType::kMessage) continue;
    if (flags & kTrueSums && stream.size() - at >= sizeof crc) std::memcpy(stream.data() + at, &crc, sizeof crc);
    at += std::min(sizeof(FrameTrailer), stream.size() - at);
  }
}

template <typename Struct>
void append(std::vector<uint8_t>& stream, const Struct& part) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(&part);
  stream.insert(stream.end(), bytes, bytes + sizeof part);
}

// Whole frames, each of a few bytes of the input, so that several that belong together are soon found.
std::vector<uint8_t> composed(const std::vector<uint8_t>& bytes, const AttackedConnection& attacked) {
  Input input(bytes.data(), bytes.size());
  std::vector<uint8_t> stream;
  while (!input.empty() && stream.size() < kMaxComposed) {
    FrameHeader header{};
    header.magic = kFrameMagic;
    header.type = input.byte() % 11;
    const uint8_t how = input.byte();
    header.window = how & 1 ? input.number<uint64_t>() : attacked.window_named(input.byte() % 4);
    header.offset = how & 2 ? input.number<uint64_t>() : input.number<uint16_t>();
    header.length = how & 4 ? input.number<uint64_t>() : input.byte() * (how & 8 ? 64u : 1u);
    header.generation = how & 16 ? input.number<uint64_t>() : kGeneration;
    header.flags = how & 32 ? kFlagChecksum : 0;
    if (how & 64)
      for (auto& byte : header.token) byte = input.byte();
    const auto type = static_cast<FrameType>(header.type);
    const bool data = type == FrameType::kData;
    if (!data && type != FrameType::kMessage && !(how & 128)) header.length = 0;
    header.header_crc = frame_header_crc(header);
    append(stream, header);
    std::vector<uint8_t> payload(std::min<uint64_t>(header.length, kMaxComposed), how);
    stream.insert(stream.end(), payload.begin(), payload.end());
    if (!data) continue;
    const FrameTrailer trailer{crc32c(0, payload.data(), payload.size()), how & 128u, header.generation};
    append(stream, trailer);
  }
  return stream;
}

std::shared_ptr<TcpChannel> channel_of(const std::shared_ptr<Connection>& connection, bool incoming,
                                       const Token& preface, std::vector<uint8_t> stream, bool reset, int* fd,
                                       bool linked = false) {
  *fd = machine().new_fd();
  auto& socket = machine().sockets[*fd];
  socket.stream = std::move(stream);
  socket.reset = reset;
  auto channel = std::make_shared<TcpChannel>(connection, endpoint(), *fd, false, incoming, preface, LaneId{}, linked);
  channel->deadline = now_ns() + kSetUpNs;
  endpoint().attach(channel);
  return channel;
}

// The token of the join frame that we sent; zero if there was none.
Token token_sent(const std::vector<uint8_t>& sent) {
  for (size_t at = 0; at + sizeof(FrameHeader) <= sent.size(); ++at) {
    FrameHeader header;
    std::memcpy(&header, sent.data() + at, sizeof header);
    if (header.magic == kFrameMagic && header.type == static_cast<uint8_t>(FrameType::kJoin)) return header.token;
  }
  return {};
}

}  // namespace

int attack(const uint8_t* data, size_t size) {
  Input input(data, size);
  endpoint();  // whose own descriptors are not the run's
  machine().reset();
  const uint8_t flags = input.byte();
  const bool incoming = flags & kIncoming;
  const uint8_t second_byte = input.byte();
  const bool linked = second_byte & kLinked;
  const auto steps = input.bytes((second_byte & ~kLinked) % kMaxSteps);
  const size_t for_second_lane = flags & kSecondLane ? input.number<uint16_t>() : 0;
  AttackedConnection attacked(endpoint(), incoming);
  if (flags & kTrusted) attacked.authorize();
  auto second = input.bytes(for_second_lane);
  auto stream = input.rest();
  if (flags & kComposed) {
    stream = composed(stream, attacked);
    second = composed(second, attacked);
  } else if (flags & kSealed) {
    seal(stream, flags, attacked);
    seal(second, flags, attacked);
  }
  Token joining{};
  if (!incoming && flags & kJoins) joining.fill(9);
  int fd = -1, second_fd = -1;
  std::shared_ptr<Connection> joins;
  channel_of(attacked.connection(), incoming, joining, std::move(stream), flags & kReset, &fd, linked);
  Token link_token{};
  link_token.fill(9);
  if (linked) endpoint().links().accepted(attacked.connection(), {link_token, 2});
  const auto turn = [&] {
    if (joins)
      for (const auto& channel : joins->channels()) channel->woken = true;
    return attacked.turn();
  };
  for (const uint8_t step : steps) {
    auto& socket = machine().sockets[fd];
    socket.allowed += step & 31;
    socket.room = step & 32 ? 3 : SIZE_MAX;
    if (second_fd >= 0) machine().sockets[second_fd].allowed += step & 31;
    turn();
    switch (step >> 6) {
      case 0:
        attacked.authorize();
        break;
      case 1:
        attacked.take_events();
        attacked.post(step & 16);
        break;
      case 2:
        attacked.say(step);
        if (flags & kSecondLane && second_fd < 0) {
          // A lane that joins, or a stranger that tries to.
          const Token token = linked ? link_token : token_sent(socket.sent);
          FrameHeader preface = control_frame(FrameType::kPreface, token, linked ? 1 : 0);
          std::vector<uint8_t> bytes(sizeof preface);
          std::memcpy(bytes.data(), &preface, sizeof preface);
          bytes.insert(bytes.end(), second.begin(), second.end());
          joins = endpoint().new_connection(true);
          CHECK(joins != nullptr);
          channel_of(joins, true, Token{}, std::move(bytes), false, &second_fd);
        }
        break;
      default:
        step & 16 ? attacked.cancel() : attacked.close_window();
    }
  }
  for (auto& [number, socket] : machine().sockets) {
    socket.allowed = socket.stream.size();
    socket.room = SIZE_MAX;
  }
  while (turn()) attacked.take_events();
  attacked.end();
  if (joins) {
    endpoint().close_connection(joins->id, Status::kCancelled, "");
    endpoint().step();
    endpoint().poll(1u << 20);
  }
  CHECK(machine().open.empty());  // every descriptor was closed, once
  return 0;
}

}  // namespace sage_kvt::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) { return sage_kvt::fuzz::attack(data, size); }
