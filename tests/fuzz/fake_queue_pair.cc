// SPDX-License-Identifier: Apache-2.0
#include "fake_queue_pair.h"

#include <cstring>

#include "../cpp/check.h"
#include "system_calls.h"

namespace sage_kvt {
namespace {

constexpr size_t kMemory = 2 * kCells * kCellBytes;
const Verbs kNoVerbs{};
ibv_comp_channel no_events{};

}  // namespace

fuzz::FakePair& fuzz::fake_pair() {
  static FakePair pair;
  return pair;
}

std::unique_ptr<QueuePair> fuzz::new_fake_pair() {
  fake_pair() = FakePair{};
  static const auto device = std::make_shared<VerbsDevice>(kNoVerbs, nullptr);
  return std::make_unique<QueuePair>(kNoVerbs, device, nullptr);
}

void fuzz::FakePair::read(size_t orders, uint8_t byte) {
  CHECK(!destroyed);
  for (; orders > 0 && !reads.empty(); --orders) {
    const auto& order = reads.front();
    for (const auto& piece : order.into) std::memset(reinterpret_cast<void*>(piece.addr), byte, piece.length);
    if (order.last) completions.push_back({QueuePair::Done::What::kRead, order.tag, {}, ""});
    reads.pop_front();
  }
}

const MemoryKeys* find_keys(const KeyTable& table, uint64_t, uint64_t) { return table.empty() ? nullptr : &table[0]; }

VerbsDevice::VerbsDevice(const Verbs& verbs, ibv_context* context)
    : verbs_(verbs), context_(context), domain_(nullptr) {}
VerbsDevice::~VerbsDevice() = default;
std::shared_ptr<const KeyTable> VerbsDevice::keys() const {
  static const auto all = std::make_shared<const KeyTable>(KeyTable{{0, UINT64_MAX, 1, 2}});
  static const auto none = std::make_shared<const KeyTable>();
  return fuzz::fake_pair().has_keys ? all : none;
}

QueuePair::QueuePair(const Verbs& verbs, std::shared_ptr<VerbsDevice> device, rdma_cm_id* id)
    : verbs_(verbs), device_(std::move(device)), id_(id) {
  memory_.reset(static_cast<uint8_t*>(std::calloc(1, kMemory)));
  no_events.fd = fuzz::machine().new_fd();
  events_ = &no_events;
  most_ = 1u << 20;
  most_pieces_ = 3;
  fuzz::fake_pair().cells = memory_.get();
}
QueuePair::~QueuePair() { CHECK(fuzz::fake_pair().destroyed); }
void QueuePair::destroy() {
  auto& pair = fuzz::fake_pair();
  if (!pair.destroyed) fuzz::machine().open.erase(events_->fd);
  pair.destroyed = true;
  pair.reads.clear();
}
bool QueuePair::send_cell(size_t i, uint64_t bytes, const PathWord& word) {
  CHECK(i < kCells && bytes <= kCellBytes);
  return tell(word);
}
bool QueuePair::tell(const PathWord& word) {
  CHECK(!fuzz::fake_pair().destroyed);
  fuzz::fake_pair().told.push_back(word);
  return fuzz::fake_pair().takes_orders;
}
bool QueuePair::read(uint64_t, uint32_t, const std::vector<ibv_sge>& into, bool last, uint64_t tag) {
  CHECK(!fuzz::fake_pair().destroyed && !into.empty() && into.size() <= most_pieces_);
  fuzz::fake_pair().reads.push_back({into, last, tag});
  return fuzz::fake_pair().takes_orders;
}
bool QueuePair::next(Done* done) {
  auto& completions = fuzz::fake_pair().completions;
  if (completions.empty()) return false;
  *done = completions.front();
  completions.pop_front();
  return true;
}
bool QueuePair::arm() { return fuzz::fake_pair().completions.empty(); }
void QueuePair::disarm() {}

}  // namespace sage_kvt
