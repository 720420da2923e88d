// SPDX-License-Identifier: Apache-2.0
// Between the pages of one KV cache group and canonical wire bytes (docs/format.md).
//
// A span of the wire is: layer after layer, in a layer plane after plane, in a plane token group
// after token group, in a token group head after head, each a tile. Both sides compute every
// tile's place from (layers, heads, tokens) alone. Nothing here knows whose memory a span lies in.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tile.h"

namespace sage_kvt {

// The kernels for this CPU; SAGE_KVT_KERNELS=avx512|avx2|portable in the environment overrides the choice.
const TileKernels& chosen_tile_kernels();
// By name; nullptr if this build or this CPU hasn't them.
const TileKernels* tile_kernels_named(const std::string& name);

size_t tile_bytes(const WireFormat& format, int64_t tokens, int64_t dim);

// One plane of every layer of a group.
struct ConvertedPlane {
  ElementOrder order;
  int64_t head_stride, page_stride;  // bytes
  int64_t dim;                       // channels of a head
  WireFormat format;
  std::vector<uint64_t> bases;       // by layer: address of page 0, head 0
  std::vector<float> memory_scales;  // by layer: value = code * scale, for fp8 caches
  std::vector<float> wire_scales;    // by layer, for Granularity::kTensor
};

// What to convert. `pages[i]` is the page id of page `first_token / page_size + i` of the request.
struct Span {
  int64_t first_layer, layers;
  int64_t first_head, heads;
  int64_t first_token, tokens;
  std::vector<int64_t> pages;
};

class PagedConverter : public std::enable_shared_from_this<PagedConverter> {
 public:
  // Throws std::invalid_argument naming the argument, its value and what is allowed.
  PagedConverter(Dtype dtype, int64_t page_size, int64_t page_count, int64_t heads, std::vector<ConvertedPlane> planes,
                 const TileKernels& kernels);

  // Throws std::invalid_argument if `span` is not inside this group.
  void check(const Span& span) const;
  size_t wire_bytes(const Span& span) const;
  void encode(const Span& span, uint8_t* wire) const;
  void decode(const Span& span, const uint8_t* wire) const;
  const char* kernels() const { return kernels_.name; }

 private:
  struct Step;
  Step step_at(const Span& span, int64_t layer, int64_t plane, int64_t token) const;
  bool advance(const Span& span, Step& step) const;  // false at the end
  void pieces_of(const Span& span, const Step& step, std::vector<Piece>& pieces) const;
  template <bool Encode>
  void convert(const Span& span, uint8_t* wire) const;

  Dtype dtype_;
  int64_t page_size_, page_count_, heads_;
  std::vector<ConvertedPlane> planes_;
  const TileKernels& kernels_;
};

}  // namespace sage_kvt
