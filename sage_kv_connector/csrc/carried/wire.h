// SPDX-License-Identifier: Apache-2.0
// A path over a library that reads a peer's memory: words and notices are notes on the connection's sockets, and reads
// are jobs for the thread that calls the library.
//
// Memory model: a chunk is read into a slot, and copied into its window once all of it came. So a window may close, or
// a connection end, while the library still writes.
#pragma once

#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "carried/notes.h"
#include "carried/slots.h"
#include "connection.h"
#include "path/wire.h"

namespace sage_kvt {

// From the peer's memory to ours.
struct CarriedRow {
  uint64_t local, remote, length;
};

// A chunk on its way: the library's, its wire's, and done with when both are.
struct CarriedRead {
  uint64_t number = 0, connection = 0, slot = 0, tag = 0;
  std::vector<CarriedRow> rows;
  std::vector<LocalPiece> into;
  bool ended = false, failed = false;  // with the mutex of the wire's end held
};

// What others say to a wire, from any thread; it lives as long as one of them may.
class WireEnd : public SlotWaiter {
 public:
  explicit WireEnd(Slots& slots);
  ~WireEnd() override;
  WireEnd(const WireEnd&) = delete;
  WireEnd& operator=(const WireEnd&) = delete;

  // False if the peer says more than it may.
  bool heard(CarriedNote note);
  void ended(CarriedRead& read, bool failed);
  void look_again() override;

 private:
  friend class CarriedWire;
  // So much may be under way of one who keeps to the protocol.
  static constexpr size_t kMostHeard = 4 * kCells;
  void wake();
  void calm();

  Slots& slots_;
  const int event_;
  std::mutex mutex_;
  std::deque<CarriedNote> heard_;
  std::deque<std::shared_ptr<CarriedRead>> reads_;  // in the order in which they were ordered
  bool armed_ = false, signalled_ = false, destroyed_ = false;
  bool starved_ = false;  // it waits for a slot
};

// Who gives reads to the library.
class Reader {
 public:
  virtual ~Reader() = default;
  virtual void submit(const std::shared_ptr<CarriedRead>& read, const std::shared_ptr<WireEnd>& from) = 0;
  virtual std::shared_ptr<const KeyTable> readable() const = 0;
};

class CarriedWire : public PathWire {
 public:
  CarriedWire(Connection& connection, Reader& reader, Slots& slots, std::shared_ptr<WireEnd> end);
  ~CarriedWire() override;

  void destroy() override;
  const uint8_t* cell(size_t i) const override { return cells_.get() + i * kCellBytes; }
  uint8_t* outgoing(size_t i) override { return cells_.get() + (kCells + i) * kCellBytes; }
  uint64_t most_in_chunk() const override { return most_in_chunk_; }
  bool room(size_t) const override { return true; }
  bool room_for_read(uint64_t bytes) override;
  bool send_cell(size_t i, uint64_t bytes, const PathWord& word) override;
  bool tell(const PathWord& word) override;
  bool read(uint64_t address, uint32_t key, const std::vector<LocalPiece>& into, bool last, uint64_t tag) override;
  size_t most_pieces() const override { return SIZE_MAX; }
  std::shared_ptr<const KeyTable> readable() const override { return reader_.readable(); }
  std::shared_ptr<const KeyTable> writable() const override;
  bool in_place() const override { return false; }
  void place() override;
  bool next(Done* done) override;
  int fd() const override { return end_->event_; }
  bool arm() override;
  void disarm() override;

 private:
  bool take(CarriedNote* note);
  std::shared_ptr<CarriedRead> take_ended();
  Done understood(CarriedNote& note);
  void forget_brought();

  Connection& connection_;
  Reader& reader_;
  Slots& slots_;
  const std::shared_ptr<WireEnd> end_;
  struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
  };
  const std::unique_ptr<uint8_t, Free> cells_;  // touched as far as they are used
  uint64_t most_in_chunk_ = 0;
  std::shared_ptr<CarriedRead> ordered_;  // its chunk is not ordered whole
  uint64_t filled_ = 0;                   // bytes of its slot
  bool wants_slot_ = false;               // there was none for it
  std::shared_ptr<CarriedRead> brought_;  // by the read that was told of last
};

}  // namespace sage_kvt
