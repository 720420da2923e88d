// SPDX-License-Identifier: Apache-2.0
#include "tcp/frame.h"

#include <cstddef>

#include "crc32c.h"

namespace sage_kvt {

bool equal_in_constant_time(const Token& a, const Token& b) {
  unsigned difference = 0;
  for (size_t i = 0; i < a.size(); ++i) difference |= static_cast<unsigned>(a[i] ^ b[i]);
  return difference == 0;
}

uint32_t frame_header_crc(const FrameHeader& header) { return crc32c(0, &header, offsetof(FrameHeader, header_crc)); }

FrameHeader control_frame(FrameType type, const Token& token, uint64_t number, uint64_t window) {
  FrameHeader header{};
  header.magic = kFrameMagic;
  header.type = static_cast<uint8_t>(type);
  header.token = token;
  header.window = window;
  header.offset = number;
  header.header_crc = frame_header_crc(header);
  return header;
}

}  // namespace sage_kvt
