// SPDX-License-Identifier: Apache-2.0
#include "conversion/paged_converter.h"

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
  std::vector<float> scale, inverse, zero, even_odd;
  Scratch fit(int64_t tokens, int64_t dim) {
    const size_t elements = static_cast<size_t>(tokens * dim),
                 factors = static_cast<size_t>(std::max(tokens, dim)) + 16;
    if (rows.size() < 4 * elements) rows.resize(4 * elements);
    if (codes.size() < static_cast<size_t>(dim) + 64) codes.resize(dim + 64);
    for (auto* values : {&scale, &inverse, &zero})
      if (values->size() < factors) values->resize(factors);
    if (even_odd.size() < 2 * static_cast<size_t>(dim)) even_odd.resize(2 * dim);
    return {rows.data(), codes.data(), scale.data(), inverse.data(), zero.data(), even_odd.data()};
  }
};

// A piece's memory as equal rows, whatever their order.
Ahead extent_of(const ElementOrder& order, int64_t dim, int64_t element, const Piece& piece) {
  const int64_t last = piece.first + piece.count - 1;
  const auto at = [&](int64_t token) {
    return (token % order.token_tile) * order.token_inner + (token / order.token_tile) * order.token_outer;
  };
  const uint8_t* base = piece.head + at(piece.first);
  if (order.token_inner >= dim * element) return {base, order.token_inner, piece.count, dim * element};
  if (order.token_outer == order.token_tile * dim * element) return {base, 0, 1, piece.count * dim * element};
  // Runs of tokens, one for each outer step of the channels (or each channel, where they have one stride).
  const bool columns = order.dim_outer == order.dim_tile * order.dim_inner;
  const int64_t step = columns ? order.dim_inner : order.dim_outer;
  const int64_t rows = columns ? dim : (dim + order.dim_tile - 1) / order.dim_tile;
  const int64_t run = at(last) - at(piece.first) + (columns ? element : order.dim_tile * order.dim_inner);
  return {base, step, rows, run < step ? run : step};
}

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
    within("order of elements: tiles", std::min(plane.order.token_tile, plane.order.dim_tile), 1, int64_t{1} << 40);
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

// One step of a conversion: a token group of a plane of a layer, all heads.
struct PagedConverter::Step {
  int64_t layer, plane, token, count;
};

void PagedConverter::pieces_of(const Span& span, const Step& step, std::vector<Piece>& pieces) const {
  const auto& plane = planes_[step.plane];
  const int64_t page_origin = span.first_token / page_size_;
  pieces.clear();
  for (int64_t t = step.token; t < step.token + step.count;) {
    const int64_t inside = t % page_size_, here = std::min(page_size_ - inside, step.token + step.count - t);
    auto* page = reinterpret_cast<uint8_t*>(plane.bases[step.layer]) +
                 span.pages[t / page_size_ - page_origin] * plane.page_stride;
    pieces.push_back({page + span.first_head * plane.head_stride, inside, here});
    t += here;
  }
}

PagedConverter::Step PagedConverter::step_at(const Span& span, int64_t layer, int64_t plane, int64_t token) const {
  const int64_t group = planes_[plane].format.group_tokens;
  return {layer, plane, token, std::min(span.first_token + span.tokens - token, group - token % group)};
}

bool PagedConverter::advance(const Span& span, Step& step) const {
  if (step.token + step.count < span.first_token + span.tokens)
    step = step_at(span, step.layer, step.plane, step.token + step.count);
  else if (step.plane + 1 < static_cast<int64_t>(planes_.size()))
    step = step_at(span, step.layer, step.plane + 1, span.first_token);
  else if (step.layer + 1 < span.first_layer + span.layers)
    step = step_at(span, step.layer + 1, 0, span.first_token);
  else
    return false;
  return true;
}

template <bool Encode>
void PagedConverter::convert(const Span& span, uint8_t* wire) const {
  thread_local ThreadScratch memory;
  std::vector<Piece> pieces, next_pieces;
  std::vector<Ahead> ahead;
  Step step = step_at(span, span.first_layer, 0, span.first_token), next = step;
  pieces_of(span, step, next_pieces);
  for (bool more = true; more; step = next) {
    pieces.swap(next_pieces);
    more = advance(span, next);
    if (more) pieces_of(span, next, next_pieces);
    const auto& plane = planes_[step.plane];
    const Scratch scratch = memory.fit(plane.format.group_tokens, plane.dim);
    const Memory order{dtype_, plane.memory_scales[step.layer], plane.order};
    const size_t bytes = tile_bytes(plane.format, step.count, plane.dim);
    for (int64_t head = 0; head < span.heads; ++head, wire += bytes) {
      ahead.clear();
      if (head + 1 < span.heads)
        for (const auto& piece : pieces)
          ahead.push_back(extent_of(plane.order, plane.dim, element_bits(dtype_) / 8,
                                    {piece.head + plane.head_stride, piece.first, piece.count}));
      else if (more)
        for (const auto& piece : next_pieces)
          ahead.push_back(
              extent_of(planes_[next.plane].order, planes_[next.plane].dim, element_bits(dtype_) / 8, piece));
      const TilePieces where{pieces.data(), static_cast<int64_t>(pieces.size()), ahead.data(),
                             static_cast<int64_t>(ahead.size())};
      if constexpr (Encode)
        kernels_.encode(order, where, plane.dim, plane.format, plane.wire_scales[step.layer], wire, scratch);
      else
        kernels_.decode(order, where, plane.dim, plane.format, plane.wire_scales[step.layer], wire, scratch);
      for (auto& piece : pieces) piece.head += plane.head_stride;
    }
  }
}

void PagedConverter::encode(const Span& span, uint8_t* wire) const { convert<true>(span, wire); }

void PagedConverter::decode(const Span& span, const uint8_t* wire) const {
  convert<false>(span, const_cast<uint8_t*>(wire));
}

}  // namespace sage_kvt
