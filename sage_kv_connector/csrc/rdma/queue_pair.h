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

#include "rdma/cell.h"
#include "rdma/device.h"

namespace sage_kvt {

class QueuePair {
 public:
  // Of `id`, which has its device. Throws std::system_error; the id stays the caller's then.
  QueuePair(const Verbs& verbs, std::shared_ptr<VerbsDevice> device, rdma_cm_id* id);
  ~QueuePair();
  QueuePair(const QueuePair&) = delete;
  QueuePair& operator=(const QueuePair&) = delete;

  // No byte of ours is read or written any more when this returns, and the queue pair takes nothing. Idempotent.
  void destroy();
  // The caller's, after `destroy`: events may still come for it.
  rdma_cm_id* id() const { return id_; }
  const VerbsDevice& device() const { return *device_; }

  // What the peer needs to know of our cells; and of its own.
  PathTerms terms(uint32_t path, const std::array<uint8_t, 16>& token) const;
  void meet(const PathTerms& peer) { peer_ = peer; }
  uint64_t most_reads() const { return most_reads_; }

  const uint8_t* cell(size_t i) const { return memory_.get() + i * kCellBytes; }
  uint8_t* outgoing(size_t i) { return memory_.get() + (kCells + i) * kCellBytes; }

  // Room for so many more orders.
  bool room(size_t orders) const { return used_ + orders <= most_; }
  // Orders; false if the queue pair takes none any more.
  bool send_cell(size_t i, uint64_t bytes, const PathWord& word);
  bool tell(const PathWord& word);
  // From the peer's memory into pieces of ours. `last`: its completion is told, as `tag`.
  bool read(uint64_t address, uint32_t key, const std::vector<ibv_sge>& into, bool last, uint64_t tag);
  size_t most_pieces() const { return most_pieces_; }

  struct Done {
    enum class What { kSent, kRead, kTold, kBroken } what;
    uint64_t tag;  // of a read
    PathWord word;
    std::string why;
  };
  // False if nothing ended.
  bool next(Done* done);

  // Something to wait for in epoll: readable once there is a completion after `arm`.
  int fd() const { return events_->fd; }
  // False if a completion is there already.
  bool arm();
  void disarm();

 private:
  struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
  };
  void release();
  bool post(ibv_send_wr* order, bool told);
  bool expect(size_t i);
  Done understood(const ibv_wc& entry);
  uint32_t* words() const;

  const Verbs& verbs_;
  const std::shared_ptr<VerbsDevice> device_;
  rdma_cm_id* const id_;
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
