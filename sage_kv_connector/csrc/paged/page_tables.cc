// SPDX-License-Identifier: Apache-2.0
#include "paged/page_tables.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace sage_kvt {

PageTables::PageTables(const std::vector<size_t>& layers) : layers_(layers), tables_(layers.size()) {
  for (size_t count : layers_) finals_.push_back(std::make_unique<std::atomic<uint64_t>[]>(count));
}

void PageTables::check(size_t group, size_t first_layer, size_t layers) const {
  if (group >= layers_.size())
    throw std::invalid_argument("group is " + std::to_string(group) + ", there are " + std::to_string(layers_.size()));
  if (first_layer > layers_[group] || layers > layers_[group] - first_layer)
    throw std::invalid_argument("layers " + std::to_string(first_layer) + ", +" + std::to_string(layers) +
                                " are not among the " + std::to_string(layers_[group]) + " of group " +
                                std::to_string(group));
}

void PageTables::set_pages(size_t group, const int64_t* ids, size_t count) {
  check(group, 0, 0);
  std::lock_guard lock(mutex_);
  tables_[group].assign(ids, ids + count);
}

void PageTables::append(size_t group, const int64_t* ids, size_t count) {
  check(group, 0, 0);
  std::lock_guard lock(mutex_);
  tables_[group].insert(tables_[group].end(), ids, ids + count);
}

void PageTables::raise_to(size_t group, size_t layer, uint64_t pages) {
  auto& final = finals_[group][layer];
  uint64_t known = final.load();
  while (known < pages && !final.compare_exchange_weak(known, pages)) {
  }
}

void PageTables::advance(size_t group, size_t first_layer, size_t layers, uint64_t pages, int* pushes) {
  check(group, first_layer, layers);
  for (size_t l = first_layer; l < first_layer + layers; ++l) raise_to(group, l, pages);
  wake(pushes);
}

void PageTables::advance_all(const std::vector<uint64_t>& pages, int* pushes) {
  if (pages.size() > layers_.size()) check(layers_.size(), 0, 0);
  for (size_t group = 0; group < pages.size(); ++group)
    for (size_t l = 0; l < layers_[group]; ++l) raise_to(group, l, pages[group]);
  wake(pushes);
}

void PageTables::end(const std::vector<uint64_t>& pages) {
  if (pages.size() != layers_.size())
    throw std::invalid_argument("the end names " + std::to_string(pages.size()) + " groups, there are " +
                                std::to_string(layers_.size()));
  {
    std::lock_guard lock(mutex_);
    last_ = pages;
  }
  int pushes = 0;
  wake(&pushes);
}

std::optional<uint64_t> PageTables::last(size_t group) const {
  std::lock_guard lock(mutex_);
  if (!last_) return std::nullopt;
  return last_->at(group);
}

size_t PageTables::length(size_t group) const {
  std::lock_guard lock(mutex_);
  return tables_.at(group).size();
}

std::vector<int64_t> PageTables::page_ids(size_t group, uint64_t first, uint64_t end) const {
  std::lock_guard lock(mutex_);
  const auto& table = tables_.at(group);
  end = std::min<uint64_t>(end, table.size());
  if (first >= end) return {};
  return {table.begin() + static_cast<long>(first), table.begin() + static_cast<long>(end)};
}

void PageTables::attach(const std::shared_ptr<Waiter>& waiter) {
  {
    std::lock_guard lock(waiters_mutex_);
    waiters_.push_back(waiter);
  }
  int pushes = 0;
  waiter->wake(&pushes);  // what became final meanwhile
}

void PageTables::wake(int* pushes) {
  std::lock_guard lock(waiters_mutex_);
  bool any_ended = false;
  for (const auto& weak : waiters_) {
    const auto waiter = weak.lock();
    if (waiter && !waiter->ended())
      waiter->wake(pushes);
    else
      any_ended = true;
  }
  if (!any_ended) return;
  waiters_.erase(std::remove_if(waiters_.begin(), waiters_.end(),
                                [](const auto& weak) {
                                  const auto waiter = weak.lock();
                                  return !waiter || waiter->ended();
                                }),
                 waiters_.end());
}

void Step::add(std::shared_ptr<PageTables> tables, std::vector<uint64_t> pages) {
  if (pages.size() != tables->groups())
    throw std::invalid_argument("the step names " + std::to_string(pages.size()) + " groups, there are " +
                                std::to_string(tables->groups()));
  progress_.push_back({std::move(tables), std::move(pages)});
}

void Step::layer(size_t group, size_t layer) {
  int pushes = kPushes;
  for (const auto& one : progress_) one.tables->advance(group, layer, 1, one.pages.at(group), &pushes);
}

void Step::all() {
  int pushes = kPushes;
  for (const auto& one : progress_) one.tables->advance_all(one.pages, &pushes);
}

}  // namespace sage_kvt
