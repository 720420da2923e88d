// SPDX-License-Identifier: Apache-2.0
#include "tcp/lane_cipher.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "event.h"

namespace sage_kvt {
namespace {
// OpenSSL's names for `control`.
constexpr int kGetTag = 0x10, kSetTag = 0x11;
constexpr size_t kMostAtOnce = 1u << 30;  // lengths are int there
// One turn of a lane seals fewer messages than two to the power of this: each counts a byte, and `kMaxBytes` ends it.
constexpr int kTurnBits = 50;
static_assert(LaneCipher::kMaxBytes <= uint64_t{1} << kTurnBits && uint64_t{kMostTurns} << kTurnBits < UINT64_MAX / 2);

const LibCrypto& needed() {
  std::string why;
  const auto* found = libcrypto(&why);
  if (!found) throw std::runtime_error(why);
  return *found;
}

void copy_keys(const char* name, const std::string& from, std::array<LaneKey, kMaxLanes>* to) {
  if (from.size() != kLaneKeysBytes)
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(from.size()) + " bytes, must have " +
                                std::to_string(kLaneKeysBytes));
  std::memcpy(to->data(), from.data(), kLaneKeysBytes);
}
}  // namespace

ConnectionKeys::ConnectionKeys(bool encrypts, const std::string& send_keys, const std::string& receive_keys)
    : crypto(needed()), encrypts(encrypts) {
  copy_keys("send_keys", send_keys, &send);
  copy_keys("receive_keys", receive_keys, &receive);
}

ConnectionKeys::~ConnectionKeys() {
  crypto.cleanse(send.data(), kLaneKeysBytes);
  crypto.cleanse(receive.data(), kLaneKeysBytes);
}

LaneCipher::LaneCipher(const std::shared_ptr<const ConnectionKeys>& keys, Direction direction, const LaneId& lane)
    : crypto_(keys->crypto),
      seals_(direction == Direction::kSeal),
      encrypts_(keys->encrypts),
      context_(crypto_.new_context()),
      number_(uint64_t{lane.turn} << kTurnBits) {
  const LaneKey& key = (seals_ ? keys->send : keys->receive).at(lane.lane);
  iv_ = key.iv;
  if (!context_ || crypto_.init(context_, crypto_.aes_128_gcm(), nullptr, key.key.data(), nullptr, seals_) != 1)
    throw std::runtime_error("libcrypto does not offer AES-128-GCM");
}

LaneCipher::~LaneCipher() {
  crypto_.free_context(context_);  // wipes the key
  crypto_.cleanse(iv_.data(), iv_.size());
}

bool LaneCipher::next_nonce() {
  if (worn()) return false;
  auto nonce = iv_;
  for (size_t i = 0; i < sizeof number_; ++i) nonce[4 + i] ^= static_cast<uint8_t>(number_ >> (8 * i));
  ++number_;
  return crypto_.init(context_, nullptr, nullptr, nullptr, nonce.data(), seals_) == 1;
}

bool LaneCipher::authenticate(const void* data, size_t length) {
  int written = 0;
  return crypto_.update(context_, nullptr, &written, static_cast<const uint8_t*>(data), static_cast<int>(length)) == 1;
}

bool LaneCipher::header(const FrameHeader& header, Tag* tag) { return begin(header) && end(tag); }

bool LaneCipher::begin(const FrameHeader& header) {
  bytes_ += sizeof header;
  return next_nonce() && authenticate(&header, sizeof header);
}

bool LaneCipher::pass(const void* in, void* out, size_t length) {
  bytes_ += length;
  auto from = static_cast<const uint8_t*>(in);
  auto to = static_cast<uint8_t*>(out);
  while (length > 0) {
    const size_t n = std::min(length, kMostAtOnce);
    int written = 0;
    if (encrypts_ ? crypto_.update(context_, to, &written, from, static_cast<int>(n)) != 1 : !authenticate(from, n))
      return false;
    from += n;
    if (encrypts_) to += n;
    length -= n;
  }
  return true;
}

bool LaneCipher::end(Tag* tag) {
  uint8_t none[16];
  int written = 0;
  const int size = static_cast<int>(tag->size());
  if (!seals_ && crypto_.control(context_, kSetTag, size, tag->data()) != 1) return false;
  if (crypto_.finish(context_, none, &written) != 1) return false;
  return !seals_ || crypto_.control(context_, kGetTag, size, tag->data()) == 1;
}

double measure_cipher(bool encrypts, uint64_t bytes, uint64_t slice) {
  const std::string any(kLaneKeysBytes, '\1');
  LaneCipher cipher(std::make_shared<const ConnectionKeys>(encrypts, any, any), LaneCipher::Direction::kSeal, LaneId{});
  std::vector<char> from(slice, 1), to(slice);
  FrameHeader header{};
  Tag tag;
  const uint64_t begun = now_ns();
  bool good = cipher.begin(header);
  for (uint64_t done = 0; done < bytes; done += slice) good = good && cipher.pass(from.data(), to.data(), slice);
  if (!good || !cipher.end(&tag)) throw std::runtime_error("libcrypto did not seal");
  return static_cast<double>(now_ns() - begun) / 1e9;
}

}  // namespace sage_kvt
