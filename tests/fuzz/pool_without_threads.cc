// SPDX-License-Identifier: Apache-2.0
// Stands for csrc/conversion/pool.cc and paged_converter.cc: the linker takes these definitions, and leaves theirs.
#include "pool_without_threads.h"

#include <utility>

#include "conversion/pool.h"

namespace sage_kvt {
namespace {

std::deque<std::function<uint64_t()>> tasks;

}  // namespace

// One thread that was never started: streams ask how many there are.
ConversionPool::ConversionPool(int) { threads_.emplace_back(); }

ConversionPool::~ConversionPool() = default;

bool ConversionPool::submit(std::function<uint64_t()> task) {
  tasks.push_back(std::move(task));
  return true;
}

void PagedConverter::check(const Span&) const { __builtin_trap(); }
size_t PagedConverter::wire_bytes(const Span&) const { __builtin_trap(); }
void PagedConverter::encode(const Span&, uint8_t*) const { __builtin_trap(); }
void PagedConverter::decode(const Span&, const uint8_t*) const { __builtin_trap(); }

namespace fuzz {

void run_tasks() {
  while (!tasks.empty()) {
    const auto task = std::move(tasks.front());
    tasks.pop_front();
    task();
  }
}

void drop_tasks() { tasks.clear(); }

}  // namespace fuzz
}  // namespace sage_kvt
