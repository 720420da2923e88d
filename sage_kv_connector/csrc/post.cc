// SPDX-License-Identifier: Apache-2.0
#include "post.h"

#include <algorithm>

namespace sage_kvt {

std::vector<Descriptor> merge_descriptors(const std::vector<Descriptor>& descriptors) {
  std::vector<Descriptor> merged;
  merged.reserve(descriptors.size());
  for (const auto& d : descriptors) {
    if (d.length == 0) continue;
    if (!merged.empty()) {
      auto& last = merged.back();
      if (last.local + last.length == d.local && last.remote + last.length == d.remote) {
        last.length += d.length;
        continue;
      }
    }
    merged.push_back(d);
  }
  return merged;
}

DescriptorPost::DescriptorPost(const std::vector<Descriptor>& all) : descriptors(merge_descriptors(all)) {
  for (const auto& d : descriptors) total += d.length;
}

Chunk DescriptorPost::cut(uint64_t max_bytes, size_t max_pieces) {
  Chunk chunk;
  while (next < descriptors.size() && chunk.length < max_bytes && chunk.pieces.size() < max_pieces) {
    const auto& d = descriptors[next];
    if (chunk.length == 0) chunk.offset = d.remote + within;
    if (d.remote + within != chunk.offset + chunk.length) break;
    const uint64_t n = std::min(max_bytes - chunk.length, d.length - within);
    chunk.pieces.push_back({reinterpret_cast<void*>(d.local + within), n});
    chunk.length += n;
    within += n;
    if (within == d.length) {
      ++next;
      within = 0;
    }
  }
  return chunk;
}

}  // namespace sage_kvt
