// SPDX-License-Identifier: Apache-2.0
#include "paged_converter.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace sage_kvt {
namespace {

constexpr int64_t kMaxGroupTokens = 1024;
constexpr int64_t kMaxDim = 4096;
constexpr float kMinTensorScale = 0x1p-40f;
constexpr float kMaxTensorScale = 0x1p40f;

[[noreturn]] void refuse(const std::string& name, int64_t value, const std::string& allowed) {
  throw std::invalid_argument(name + " is " + std::to_string(value) + ", allowed: " + allowed);
}

void within(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) refuse(name, value, std::to_string(low) + " to " + std::to_string(high));
}

void check_scales(const char* name, const std::vector<float>& scales, size_t layers) {
  if (scales.size() != layers) refuse(std::string(name) + " count", scales.size(), std::to_string(layers));
  for (const float scale : scales)
    if (!(scale >= kMinTensorScale && scale <= kMaxTensorScale))
      throw std::invalid_argument(std::string(name) + " is " + std::to_string(scale) + ", allowed: 2^-40 to 2^40");
}

// Working memory that a thread keeps.
struct ThreadScratch {
  std::vector<uint8_t> rows, codes;
  std::vector<float> scale, inverse, zero;
  Scratch fit(int64_t tokens, int64_t dim) {
    const size_t elements = static_cast<size_t>(tokens * dim),
                 factors = static_cast<size_t>(std::max(tokens, dim)) + 16;
    if (rows.size() < 4 * elements) rows.resize(4 * elements);
    if (codes.size() < static_cast<size_t>(dim) + 64) codes.resize(dim + 64);
    for (auto* values : {&scale, &inverse, &zero})
      if (values->size() < factors) values->resize(factors);
    return {rows.data(), codes.data(), scale.data(), inverse.data(), zero.data()};
  }
};

}  // namespace

const TileKernels* tile_kernels_named(const std::string& name) {
  if (name == "portable") return &tile_kernels_portable();
#if defined(__x86_64__)
  if (name == "avx2" && __builtin_cpu_supports("avx2")) return &tile_kernels_avx2();
  if (name == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi"))
    return &tile_kernels_avx512();
#endif
  return nullptr;
}

const TileKernels& chosen_tile_kernels() {
  static const TileKernels& chosen = []() -> const TileKernels& {
    if (const char* wanted = std::getenv("SAGE_KVT_KERNELS"))
      if (const auto* kernels = tile_kernels_named(wanted)) return *kernels;
    for (const char* name : {"avx512", "avx2"})
      if (const auto* kernels = tile_kernels_named(name)) return *kernels;
    return tile_kernels_portable();
  }();
  return chosen;
}

size_t tile_bytes(const WireFormat& format, int64_t tokens, int64_t dim) {
  const Sections size = sections(format, tokens, dim);
  return size.scales + size.zeros + size.codes;
}

PagedConverter::PagedConverter(Dtype dtype, int64_t page_size, int64_t page_count, int64_t heads,
                               std::vector<ConvertedPlane> planes, const TileKernels& kernels)
    : dtype_(dtype),
      page_size_(page_size),
      page_count_(page_count),
      heads_(heads),
      planes_(std::move(planes)),
      kernels_(kernels) {
  if (dtype_ == Dtype::kInt4) throw std::invalid_argument("dtype is int4, which is for the wire only");
  within("page_size", page_size_, 1, 1 << 20);
  within("page_count", page_count_, 1, int64_t{1} << 40);
  within("heads", heads_, 1, 1 << 16);
  within("planes", planes_.size(), 1, 16);
  const size_t layers = planes_.front().bases.size();
  for (const auto& plane : planes_) {
    within("dim", plane.dim, 1, kMaxDim);
    within("group_tokens", plane.format.group_tokens, 1, kMaxGroupTokens);
    within("layout tiles", std::min(plane.layout.token_tile, plane.layout.dim_tile), 1, int64_t{1} << 40);
    if (plane.bases.size() != layers) refuse("bases count", plane.bases.size(), std::to_string(layers));
    check_scales("memory_scales", plane.memory_scales, layers);
    check_scales("wire_scales", plane.wire_scales, layers);
  }
}

void PagedConverter::check(const Span& span) const {
  const auto layers = static_cast<int64_t>(planes_.front().bases.size());
  within("first_layer", span.first_layer, 0, layers - 1);
  within("layers", span.layers, 1, layers - span.first_layer);
  within("first_head", span.first_head, 0, heads_ - 1);
  within("heads", span.heads, 1, heads_ - span.first_head);
  within("first_token", span.first_token, 0, int64_t{1} << 40);
  within("tokens", span.tokens, 1, int64_t{1} << 30);
  const int64_t pages = (span.first_token + span.tokens - 1) / page_size_ - span.first_token / page_size_ + 1;
  if (static_cast<int64_t>(span.pages.size()) != pages) refuse("pages count", span.pages.size(), std::to_string(pages));
  for (const int64_t page : span.pages) within("page", page, 0, page_count_ - 1);
}

size_t PagedConverter::wire_bytes(const Span& span) const {
  size_t total = 0;
  for (const auto& plane : planes_) {
    const int64_t group = plane.format.group_tokens;
    for (int64_t token = span.first_token, end = token + span.tokens; token < end;) {
      const int64_t count = std::min(end - token, group - token % group);
      if (count == group && token + group <= end) {
        const int64_t whole = (end - token) / group;
        total += whole * tile_bytes(plane.format, group, plane.dim);
        token += whole * group;
      } else {
        total += tile_bytes(plane.format, count, plane.dim);
        token += count;
      }
    }
  }
  return total * span.layers * span.heads;
}

template <bool Encode>
void PagedConverter::convert(const Span& span, uint8_t* wire) const {
  thread_local ThreadScratch memory;
  std::vector<Piece> pieces;
  const int64_t end = span.first_token + span.tokens, page_origin = span.first_token / page_size_;
  for (int64_t layer = span.first_layer; layer < span.first_layer + span.layers; ++layer)
    for (const auto& plane : planes_) {
      const Scratch scratch = memory.fit(plane.format.group_tokens, plane.dim);
      const Memory order{dtype_, plane.memory_scales[layer], plane.layout};
      for (int64_t token = span.first_token; token < end;) {
        const int64_t count =
            std::min<int64_t>(end - token, plane.format.group_tokens - token % plane.format.group_tokens);
        const size_t bytes = tile_bytes(plane.format, count, plane.dim);
        pieces.clear();
        for (int64_t t = token; t < token + count;) {
          const int64_t inside = t % page_size_, here = std::min(page_size_ - inside, token + count - t);
          auto* page = reinterpret_cast<uint8_t*>(plane.bases[layer]) +
                       span.pages[t / page_size_ - page_origin] * plane.page_stride;
          pieces.push_back({page + span.first_head * plane.head_stride, inside, here});
          t += here;
        }
        for (int64_t head = 0; head < span.heads; ++head, wire += bytes) {
          if constexpr (Encode)
            kernels_.encode(order, pieces.data(), pieces.size(), plane.dim, plane.format, plane.wire_scales[layer],
                            wire, scratch);
          else
            kernels_.decode(order, pieces.data(), pieces.size(), plane.dim, plane.format, plane.wire_scales[layer],
                            wire, scratch);
          for (auto& piece : pieces) piece.head += plane.head_stride;
        }
        token += count;
      }
    }
}

void PagedConverter::encode(const Span& span, uint8_t* wire) const { convert<true>(span, wire); }

void PagedConverter::decode(const Span& span, const uint8_t* wire) const {
  convert<false>(span, const_cast<uint8_t*>(wire));
}

}  // namespace sage_kvt
