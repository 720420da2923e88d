// SPDX-License-Identifier: Apache-2.0
// One reliable connection of two RDMA devices: a queue pair, its completions, and the cells of both directions.
//
// Memory model: one allocation, registered for this device alone. The peer has the key of the cells that it writes, and
// of nothing else; our own writes leave from outgoing cells, each of which is free again once the peer said that its
// chunk ended.
#pragma once

#include <cstdlib>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "path/wire.h"
#include "rdma/device.h"

namespace sage_kvt {

// What the sides of a path tell each other when it is set up.
struct PathTerms {
  uint64_t cells;  // address
  uint32_t key, path;
  std::array<uint8_t, 16> token;
};
static_assert(sizeof(PathTerms) == 32);

class QueuePair : public PathWire {
 public:
  // Of `id`, which has its device. Throws std::system_error; the id stays the caller's then.
  QueuePair(const Verbs& verbs, std::shared_ptr<VerbsDevice> device, rdma_cm_id* id, bool dialled);
  ~QueuePair() override;
  QueuePair(const QueuePair&) = delete;
  QueuePair& operator=(const QueuePair&) = delete;

  void destroy() override;
  // The caller's, after `destroy`: events may still come for it.
  rdma_cm_id* id() const { return id_; }
  const VerbsDevice& device() const { return *device_; }

  // What the peer needs to know of our cells; and of its own.
  PathTerms terms(uint32_t path, const std::array<uint8_t, 16>& token) const;
  void meet(const PathTerms& peer) { peer_ = peer; }
  uint64_t most_reads() const { return most_reads_; }

  const uint8_t* cell(size_t i) const override { return memory_.get() + i * kCellBytes; }
  uint8_t* outgoing(size_t i) override { return memory_.get() + (kCells + i) * kCellBytes; }
  uint64_t most_in_chunk() const override { return UINT64_MAX; }
  bool room(size_t orders) const override { return used_ + orders <= most_; }
  bool room_for_read(uint64_t) override { return room(kKeptForWords); }
  bool send_cell(size_t i, uint64_t bytes, const PathWord& word) override;
  bool tell(const PathWord& word) override;
  bool read(uint64_t address, uint32_t key, const std::vector<LocalPiece>& into, bool last, uint64_t tag) override;
  size_t most_pieces() const override { return most_pieces_; }
  std::shared_ptr<const KeyTable> readable() const override { return device_->keys(); }
  std::shared_ptr<const KeyTable> writable() const override { return device_->keys(); }
  bool in_place() const override { return true; }
  bool next(Done* done) override;
  int fd() const override { return events_->fd; }
  bool arm() override;
  void disarm() override;

 private:
  static constexpr size_t kKeptForWords = 4 * kCells;
  struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
  };
  void release();
  bool post(ibv_send_wr* order, bool told);
  bool expect(size_t i);
  Done understood(const ibv_wc& entry);
  Done told(const PathWord& word);
  uint32_t* words() const;

  const Verbs& verbs_;
  const std::shared_ptr<VerbsDevice> device_;
  rdma_cm_id* const id_;
  // The side that connected speaks first, as iWARP wants it: a hello, after which both may send.
  const bool dialled_;
  bool greeted_ = false;
  std::unique_ptr<uint8_t, Free> memory_;
  ibv_mr *cells_ = nullptr, *own_ = nullptr;
  ibv_comp_channel* events_ = nullptr;
  ibv_cq* completions_ = nullptr;
  ibv_qp* pair_ = nullptr;
  PathTerms peer_{};
  size_t most_ = 0, used_ = 0, untold_ = 0, most_pieces_ = 1, next_word_ = 0;
  uint64_t most_reads_ = 1;
  std::deque<size_t> told_;  // orders that each completion stands for
  std::deque<ibv_wc> found_;
  unsigned unacked_ = 0;
};

}  // namespace sage_kvt
