// SPDX-License-Identifier: Apache-2.0
#include "fake_wire.h"

#include <cstring>

#include "../cpp/check.h"
#include "system_calls.h"

namespace sage_kvt::fuzz {
namespace {

constexpr size_t kMostPieces = 3;
constexpr uint8_t kLate = 0x5a;

void fill(const std::vector<LocalPiece>& pieces, uint8_t byte) {
  for (const auto& piece : pieces) std::memset(reinterpret_cast<void*>(piece.address), byte, piece.length);
}

class FakeWire : public PathWire {
 public:
  FakeWire() : memory_(2 * kCells * kCellBytes), fd_(machine().new_fd()) { fake_wire().cells = memory_.data(); }
  ~FakeWire() override { CHECK(fake_wire().destroyed); }

  void destroy() override {
    auto& state = fake_wire();
    if (!state.destroyed) machine().open.erase(fd_);
    state.destroyed = true;
    state.reads.clear();
  }
  const uint8_t* cell(size_t i) const override { return memory_.data() + i * kCellBytes; }
  uint8_t* outgoing(size_t i) override { return memory_.data() + (kCells + i) * kCellBytes; }
  uint64_t most_in_chunk() const override { return UINT64_MAX; }
  bool room(size_t) const override { return true; }
  bool room_for_read(uint64_t) override { return true; }
  bool send_cell(size_t i, uint64_t bytes, const PathWord& word) override {
    CHECK(i < kCells && bytes <= kCellBytes);
    return tell(word);
  }
  bool tell(const PathWord& word) override {
    CHECK(!fake_wire().destroyed);
    fake_wire().told.push_back(word);
    return fake_wire().takes_orders;
  }
  bool read(uint64_t, uint32_t, const std::vector<LocalPiece>& into, bool last, uint64_t tag) override {
    CHECK(!fake_wire().destroyed && !into.empty() && into.size() <= kMostPieces);
    fake_wire().reads.push_back({into, last, tag});
    return fake_wire().takes_orders;
  }
  size_t most_pieces() const override { return kMostPieces; }
  std::shared_ptr<const KeyTable> readable() const override { return keys(); }
  std::shared_ptr<const KeyTable> writable() const override { return keys(); }
  bool in_place() const override { return fake_wire().in_place; }
  void place() override {
    CHECK(!fake_wire().destroyed);
    fill(fake_wire().brought, kLate);
  }
  bool next(Done* done) override {
    auto& state = fake_wire();
    if (state.completions.empty()) return false;
    *done = state.completions.front();
    state.completions.pop_front();
    if (done->what == Done::What::kRead && !state.in_place) {
      state.brought = std::move(state.waiting.front());
      state.waiting.pop_front();
    }
    return true;
  }
  int fd() const override { return fd_; }
  bool arm() override { return fake_wire().completions.empty(); }
  void disarm() override {}

 private:
  static std::shared_ptr<const KeyTable> keys() {
    static const auto all = std::make_shared<const KeyTable>(KeyTable{{0, UINT64_MAX, 1, 2}});
    static const auto none = std::make_shared<const KeyTable>();
    return fake_wire().has_keys ? all : none;
  }

  std::vector<uint8_t> memory_;
  const int fd_;
};

}  // namespace

FakeState& fake_wire() {
  static FakeState state;
  return state;
}

std::unique_ptr<PathWire> new_fake_wire() {
  fake_wire() = FakeState{};
  return std::make_unique<FakeWire>();
}

void FakeState::read(size_t orders, uint8_t byte, bool fails) {
  CHECK(!destroyed);
  for (; orders > 0 && !reads.empty(); --orders) {
    const auto& order = reads.front();
    if (in_place) fill(order.into, byte);
    begun.insert(begun.end(), order.into.begin(), order.into.end());
    if (order.last) {
      if (!in_place && !fails) waiting.push_back(begun);
      completions.push_back({fails ? PathWire::Done::What::kNotRead : PathWire::Done::What::kRead, order.tag, {}, ""});
      begun.clear();
    }
    reads.pop_front();
  }
}

}  // namespace sage_kvt::fuzz
