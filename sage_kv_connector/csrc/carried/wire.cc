// SPDX-License-Identifier: Apache-2.0
#include "carried/wire.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <new>
#include <system_error>
#include <utility>

namespace sage_kvt {
namespace {

int new_event() {
  const int event = ::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (event < 0) throw std::system_error(errno, std::generic_category(), "can't make an eventfd");
  return event;
}

}  // namespace

WireEnd::WireEnd(Slots& slots) : slots_(slots), event_(new_event()) {}

WireEnd::~WireEnd() { ::close(event_); }

bool WireEnd::heard(CarriedNote note) {
  std::lock_guard lock(mutex_);
  if (heard_.size() >= kMostHeard) return false;
  if (destroyed_) return true;
  heard_.push_back(std::move(note));
  wake();
  return true;
}

void WireEnd::ended(CarriedRead& read, bool failed) {
  {
    std::lock_guard lock(mutex_);
    read.ended = true;
    read.failed = failed;
    if (!destroyed_) return wake();
  }
  slots_.give_back(read.slot);
}

void WireEnd::look_again() {
  std::lock_guard lock(mutex_);
  starved_ = false;
  wake();
}

void WireEnd::wake() {
  const uint64_t one = 1;
  if (!std::exchange(armed_, false)) return;
  signalled_ = true;
  (void)!::write(event_, &one, sizeof one);
}

// Also of one who was not seen: who arms it may be another thread than the one that was woken.
void WireEnd::calm() {
  uint64_t value;
  if (std::exchange(signalled_, false)) (void)!::read(event_, &value, sizeof value);
}

CarriedWire::CarriedWire(Connection& connection, Reader& reader, Slots& slots, std::shared_ptr<WireEnd> end)
    : connection_(connection),
      reader_(reader),
      slots_(slots),
      end_(std::move(end)),
      cells_(static_cast<uint8_t*>(std::calloc(2 * kCells, kCellBytes))) {
  if (!cells_) throw std::bad_alloc();
}

CarriedWire::~CarriedWire() { destroy(); }

void CarriedWire::destroy() {
  forget_brought();
  if (ordered_ && ordered_->slot) slots_.give_back(ordered_->slot);
  ordered_ = nullptr;
  std::vector<uint64_t> free;
  {
    std::lock_guard lock(end_->mutex_);
    end_->destroyed_ = true;
    end_->heard_.clear();
    // Slots that the library still works on are given back when that ends.
    for (const auto& read : end_->reads_)
      if (read->ended) free.push_back(read->slot);
    end_->reads_.clear();
  }
  for (const uint64_t slot : free) slots_.give_back(slot);
}

std::shared_ptr<const KeyTable> CarriedWire::writable() const {
  // Slots are what is written; pages are copied to.
  static const auto all = std::make_shared<const KeyTable>(KeyTable{{0, UINT64_MAX, 0, 0}});
  return all;
}

bool CarriedWire::tell(const PathWord& word) {
  connection_.queue_note(note_of({CarriedNote::Kind::kWord, word.packed()}));
  return true;
}

bool CarriedWire::send_cell(size_t i, uint64_t bytes, const PathWord& word) {
  const auto* body = reinterpret_cast<const char*>(outgoing(i));
  connection_.queue_note(note_of({CarriedNote::Kind::kWord, word.packed(), 0, {body, bytes}}));
  return true;
}

bool CarriedWire::room_for_read(uint64_t bytes) {
  if (ordered_) return true;
  if (bytes > slots_.bytes()) {  // longer than was told: it fails when it is read
    ordered_ = std::make_shared<CarriedRead>();
    return true;
  }
  {
    std::lock_guard lock(end_->mutex_);
    wants_slot_ = true;
    if (end_->starved_) return false;
    end_->starved_ = true;
  }
  const uint64_t slot = slots_.take(end_);
  if (!slot) return false;
  wants_slot_ = false;
  {
    std::lock_guard lock(end_->mutex_);
    end_->starved_ = false;
  }
  ordered_ = std::make_shared<CarriedRead>();
  ordered_->slot = slot;
  filled_ = 0;
  return true;
}

bool CarriedWire::read(uint64_t address, uint32_t, const std::vector<LocalPiece>& into, bool last, uint64_t tag) {
  auto& read = *ordered_;
  uint64_t length = 0;
  for (const auto& piece : into) length += piece.length;
  if (!read.slot) return false;
  auto& rows = read.rows;
  if (!rows.empty() && rows.back().remote + rows.back().length == address)
    rows.back().length += length;
  else
    rows.push_back({read.slot + filled_, address, length});
  filled_ += length;
  read.into.insert(read.into.end(), into.begin(), into.end());
  if (!last) return true;
  read.tag = tag;
  read.connection = connection_.id;
  const auto whole = std::exchange(ordered_, nullptr);
  {
    std::lock_guard lock(end_->mutex_);
    end_->reads_.push_back(whole);
  }
  reader_.submit(whole, end_);
  return true;
}

bool CarriedWire::take(CarriedNote* note) {
  std::lock_guard lock(end_->mutex_);
  if (end_->heard_.empty()) return false;
  *note = std::move(end_->heard_.front());
  end_->heard_.pop_front();
  return true;
}

std::shared_ptr<CarriedRead> CarriedWire::take_ended() {
  std::lock_guard lock(end_->mutex_);
  if (end_->reads_.empty() || !end_->reads_.front()->ended) return nullptr;
  const auto read = end_->reads_.front();
  end_->reads_.pop_front();
  return read;
}

bool CarriedWire::next(Done* done) {
  forget_brought();
  if (const auto read = take_ended()) {
    if (read->failed) {
      slots_.give_back(read->slot);
      *done = {Done::What::kNotRead, read->tag, {}, ""};
    } else {
      brought_ = read;
      *done = {Done::What::kRead, read->tag, {}, ""};
    }
    return true;
  }
  CarriedNote note{};
  if (!take(&note)) return false;
  *done = understood(note);
  return true;
}

PathWire::Done CarriedWire::understood(CarriedNote& note) {
  switch (note.kind) {
    case CarriedNote::Kind::kAble:
      most_in_chunk_ = note.total;
      return {Done::What::kOpen, 0, {}, ""};
    case CarriedNote::Kind::kUnable:
      return {Done::What::kResting, 0, {}, std::move(note.body)};
    default:
      break;
  }
  const auto word = PathWord::unpacked(static_cast<uint32_t>(note.total));
  const bool has_cell = word.what == Told::kChunk && word.cell < kCells && note.body.size() >= sizeof(CellNotice);
  if (word.what == Told::kChunk ? !has_cell : !note.body.empty())
    return {Done::What::kBroken, 0, {}, "a note is not valid"};
  if (has_cell) {
    uint8_t* to = cells_.get() + word.cell * kCellBytes;
    std::memcpy(to, note.body.data(), note.body.size());
  }
  return {Done::What::kTold, 0, word, ""};
}

void CarriedWire::place() {
  const auto* from = reinterpret_cast<const uint8_t*>(brought_->slot);
  for (const auto& piece : brought_->into) {
    std::memcpy(reinterpret_cast<void*>(piece.address), from, piece.length);
    from += piece.length;
  }
}

void CarriedWire::forget_brought() {
  if (brought_) slots_.give_back(std::exchange(brought_, nullptr)->slot);
}

bool CarriedWire::arm() {
  std::lock_guard lock(end_->mutex_);
  if (brought_ || !end_->heard_.empty() || (!end_->reads_.empty() && end_->reads_.front()->ended)) return false;
  if (wants_slot_ && !end_->starved_) return false;  // one may have come back since
  end_->calm();
  end_->armed_ = true;
  return true;
}

void CarriedWire::disarm() {
  std::lock_guard lock(end_->mutex_);
  end_->armed_ = false;
  end_->calm();
}

}  // namespace sage_kvt
