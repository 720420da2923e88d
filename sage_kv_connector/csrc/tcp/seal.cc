// SPDX-License-Identifier: Apache-2.0
// What a protected frame's body becomes on its way out: slices, sealed just before they leave, and a tag.
#include <algorithm>
#include <cstring>

#include "tcp/channel.h"
#include "tcp/tcp_endpoint.h"

namespace sage_kvt {
namespace {
// Stays in the cache between its cipher and its send, and is a whole chunk as they are by default.
constexpr size_t kSliceBytes = 512u << 10;
const char zeros[64u << 10] = {};
}  // namespace

void TcpChannel::seal_failed() {
  broken(Status::kIoError, seal_->worn() ? "the keys of this lane are used up" : "libcrypto did not seal a frame");
}

// Puts the next slice behind what is to be sent, or the end. A chunk's trailer leaves by itself, so that until then the
// chunk can be revoked.
void TcpChannel::seal_more() {
  const bool data = out_header_.type == static_cast<uint8_t>(FrameType::kData);
  const size_t slices_end = body_.size() - (data ? 1 : 0);
  if (seal_->encrypts() && sealed_.size() < kSliceBytes)
    sealed_.resize(std::min<uint64_t>(kSliceBytes, std::max<uint64_t>(sealed_.size(), out_header_.length)));
  Stopwatch watch(endpoint_.options().measures, endpoint_.counters.verify_ns);
  size_t filled = 0;
  while (body_next_ < slices_end && filled < kSliceBytes) {
    auto& piece = body_[body_next_];
    const size_t n = std::min(piece.iov_len, kSliceBytes - filled);
    char* to = seal_->encrypts() ? sealed_.data() + filled : nullptr;
    if (!seal_->pass(piece.iov_base, to, n)) return seal_failed();
    if (!to) out_.push_back({piece.iov_base, n});
    filled += n;
    piece.iov_base = static_cast<char*>(piece.iov_base) + n;
    piece.iov_len -= n;
    if (piece.iov_len == 0) ++body_next_;
  }
  if (filled > 0 && seal_->encrypts()) out_.push_back({sealed_.data(), filled});
  if (body_next_ < slices_end || (data && filled > 0)) return;
  if (data) {
    if (!seal_->pass(&out_trailer_, &out_trailer_, sizeof out_trailer_)) return seal_failed();
    out_.push_back({&out_trailer_, sizeof out_trailer_});
  }
  if (!seal_->end(&out_end_tag_)) return seal_failed();
  out_.push_back({&out_end_tag_, sizeof out_end_tag_});
  sealing_ = false;
}

// The frame keeps its length. What is sealed already leaves as it is, from a copy where it still lies in the pages; the
// rest becomes zeros, and the trailer says so. A chunk whose trailer is sealed has left.
void TcpChannel::revoke_sealed() {
  if (sealing_) {
    if (!seal_->encrypts()) {
      sealed_.resize(kSliceBytes);
      size_t kept = 0;
      for (size_t i = out_next_; i < out_.size(); ++i) {
        auto& piece = out_[i];
        if (!in_pages(piece)) continue;
        std::memcpy(sealed_.data() + kept, piece.iov_base, piece.iov_len);
        piece.iov_base = sealed_.data() + kept;
        kept += piece.iov_len;
      }
    }
    uint64_t left = 0;
    for (size_t i = body_next_; i + 1 < body_.size(); ++i) left += body_[i].iov_len;
    std::vector<iovec> rest;
    for (; left > 0;) {
      const uint64_t n = std::min<uint64_t>(left, sizeof zeros);
      rest.push_back({const_cast<char*>(zeros), n});
      left -= n;
    }
    rest.push_back(body_.back());
    body_ = std::move(rest);
    body_next_ = 0;
    out_trailer_.aborted = 1;
  }
  void_chunk();
}

// Not of the frame's own fields, which this channel holds.
bool TcpChannel::in_pages(const iovec& piece) const {
  const auto* at = static_cast<const char*>(piece.iov_base);
  const auto* self = reinterpret_cast<const char*>(this);
  return at < self || at >= self + sizeof *this;
}

}  // namespace sage_kvt
