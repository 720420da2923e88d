// SPDX-License-Identifier: Apache-2.0
#include "rdma/queue_pair.h"

#include <endian.h>
#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

namespace sage_kvt {
namespace {
// Orders that wait or run: reads of scattered pages are many.
constexpr uint32_t kMostOrders = 2048;
// Words of the peer that may come at once: a chunk and an end for each cell, the hello, and some more.
constexpr size_t kExpected = 2 * kCells + 8;
constexpr uint32_t kMostPieces = 16;
// Each order that is told costs a completion; words and writes are counted in groups.
constexpr size_t kUntold = 16;
constexpr int kCompletionsATurn = 32;
constexpr size_t kMostWords = kMostOrders;

enum Kind : uint64_t { kOut = 0, kRead = uint64_t{1} << 62, kIn = uint64_t{2} << 62 };
constexpr uint64_t kKindBits = uint64_t{3} << 62;

}  // namespace

QueuePair::QueuePair(const Verbs& verbs, std::shared_ptr<VerbsDevice> device, rdma_cm_id* id, bool dialled)
    : verbs_(verbs), device_(std::move(device)), id_(id), dialled_(dialled) {
  // Cells of both directions, the words that go out, and those that come in where they have no immediate data.
  const size_t bytes = 2 * kCells * kCellBytes + (kMostWords + kExpected) * sizeof(uint32_t);
  memory_.reset(
      static_cast<uint8_t*>(std::aligned_alloc(kCellBytes, (bytes + kCellBytes - 1) / kCellBytes * kCellBytes)));
  const auto fail = [&](const char* what) {
    const int error = errno;
    release();
    throw std::system_error(error, std::generic_category(), what);
  };
  if (!memory_) fail("no memory for the cells of an RDMA path");
  std::memset(memory_.get(), 0, bytes);
  constexpr size_t kCellsEnd = kCells * kCellBytes;
  cells_ = device_->add_written(memory_.get(), kCellsEnd, true);
  own_ = cells_ ? device_->add_written(memory_.get() + kCellsEnd, bytes - kCellsEnd, false) : nullptr;
  if (!own_) fail("can't register the cells of an RDMA path (ulimit -l?)");
  events_ = verbs_.create_comp_channel(device_->context());
  if (!events_) fail("can't make an RDMA completion channel");
  ::fcntl(events_->fd, F_SETFL, ::fcntl(events_->fd, F_GETFL) | O_NONBLOCK);
  const auto& can = device_->attributes();
  const auto orders = std::min<uint32_t>(kMostOrders, static_cast<uint32_t>(can.max_qp_wr));
  const int entries = static_cast<int>(orders + kExpected);
  completions_ = verbs_.create_cq(device_->context(), std::min(entries, can.max_cqe), nullptr, events_, 0);
  if (!completions_) fail("can't make an RDMA completion queue");
  ibv_qp_init_attr wanted{};
  wanted.send_cq = wanted.recv_cq = completions_;
  wanted.qp_type = IBV_QPT_RC;
  wanted.cap.max_send_wr = orders;
  wanted.cap.max_recv_wr = kExpected;
  wanted.cap.max_send_sge = std::min<uint32_t>(
      kMostPieces, static_cast<uint32_t>(std::min(can.max_sge, can.max_sge_rd > 0 ? can.max_sge_rd : can.max_sge)));
  wanted.cap.max_recv_sge = 1;
  if (verbs_.create_qp(id_, device_->domain(), &wanted) != 0) fail("can't make an RDMA queue pair");
  pair_ = id_->qp;
  most_ = orders;
  most_pieces_ = wanted.cap.max_send_sge;
  most_reads_ = static_cast<uint64_t>(std::clamp(std::min(can.max_qp_rd_atom, can.max_qp_init_rd_atom), 1, 255));
  for (size_t i = 0; i < kExpected; ++i)
    if (!expect(i)) fail("can't post to an RDMA queue pair");
}

QueuePair::~QueuePair() { release(); }

void QueuePair::destroy() {
  if (pair_) verbs_.destroy_qp(id_);
  pair_ = nullptr;
}

void QueuePair::release() {
  destroy();
  if (completions_) {
    if (unacked_ > 0) verbs_.ack_cq_events(completions_, unacked_);
    verbs_.destroy_cq(completions_);
  }
  if (events_) verbs_.destroy_comp_channel(events_);
  for (auto* region : {cells_, own_})
    if (region) verbs_.dereg_mr(region);
  completions_ = nullptr;
  events_ = nullptr;
  cells_ = own_ = nullptr;
}

uint32_t* QueuePair::words() const { return reinterpret_cast<uint32_t*>(memory_.get() + 2 * kCells * kCellBytes); }

PathTerms QueuePair::terms(uint32_t path, const std::array<uint8_t, 16>& token) const {
  return {reinterpret_cast<uint64_t>(memory_.get()), cells_->rkey, path, token};
}

bool QueuePair::expect(size_t i) {
  ibv_sge where{reinterpret_cast<uint64_t>(words() + kMostWords + i), sizeof(uint32_t), own_->lkey};
  ibv_recv_wr order{}, *bad = nullptr;
  order.wr_id = kIn | i;
  order.sg_list = &where;
  order.num_sge = 1;
  return ibv_post_recv(pair_, &order, &bad) == 0;
}

bool QueuePair::post(ibv_send_wr* order, bool told) {
  if (!pair_) return false;
  // The last one that fits is told, too: else nothing would ever make room.
  told |= untold_ + 1 >= kUntold;
  order->send_flags |= told ? IBV_SEND_SIGNALED : 0;
  ibv_send_wr* bad = nullptr;
  if (ibv_post_send(pair_, order, &bad) != 0) return false;
  ++used_;
  ++untold_;
  if (told) told_.push_back(std::exchange(untold_, 0));
  return true;
}

bool QueuePair::tell(const PathWord& word) {
  ibv_sge what{};
  ibv_send_wr order{};
  order.wr_id = kOut;
  if (device_->immediate()) {
    order.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
    order.imm_data = htobe32(word.packed());
    order.wr.rdma.remote_addr = peer_.cells;
    order.wr.rdma.rkey = peer_.key;
  } else {
    auto* from = words() + next_word_++ % kMostWords;
    *from = word.packed();
    what = {reinterpret_cast<uint64_t>(from), sizeof *from, own_->lkey};
    order.opcode = IBV_WR_SEND;
    order.sg_list = &what;
    order.num_sge = 1;
  }
  return post(&order, false);
}

bool QueuePair::send_cell(size_t i, uint64_t bytes, const PathWord& word) {
  ibv_sge what{reinterpret_cast<uint64_t>(outgoing(i)), static_cast<uint32_t>(bytes), own_->lkey};
  ibv_send_wr order{};
  order.wr_id = kOut;
  order.sg_list = &what;
  order.num_sge = 1;
  order.wr.rdma.remote_addr = peer_.cells + i * kCellBytes;
  order.wr.rdma.rkey = peer_.key;
  if (device_->immediate()) {
    order.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
    order.imm_data = htobe32(word.packed());
    return post(&order, false);
  }
  // Messages come in order, and after what was written before them.
  order.opcode = IBV_WR_RDMA_WRITE;
  return post(&order, false) && tell(word);
}

bool QueuePair::read(uint64_t address, uint32_t key, const std::vector<LocalPiece>& into, bool last, uint64_t tag) {
  std::array<ibv_sge, kMostPieces> list;
  std::transform(into.begin(), into.end(), list.begin(),
                 [](const LocalPiece& piece) { return ibv_sge{piece.address, piece.length, piece.key}; });
  ibv_send_wr order{};
  order.wr_id = last ? kRead | tag : uint64_t{kOut};
  order.sg_list = list.data();
  order.num_sge = static_cast<int>(into.size());
  order.opcode = IBV_WR_RDMA_READ;
  order.wr.rdma.remote_addr = address;
  order.wr.rdma.rkey = key;
  return post(&order, last);
}

QueuePair::Done QueuePair::understood(const ibv_wc& entry) {
  if (entry.status != IBV_WC_SUCCESS) return {Done::What::kBroken, 0, {}, verbs_.wc_status_str(entry.status)};
  const uint64_t kind = entry.wr_id & kKindBits;
  if (kind != kIn) {
    used_ -= told_.front();
    told_.pop_front();
    return {kind == kRead ? Done::What::kRead : Done::What::kSent, entry.wr_id & ~kKindBits, {}, ""};
  }
  const size_t i = entry.wr_id & ~kKindBits;
  const uint32_t word = entry.opcode == IBV_WC_RECV_RDMA_WITH_IMM ? be32toh(entry.imm_data) : words()[kMostWords + i];
  if (!expect(i)) return {Done::What::kBroken, 0, {}, "it takes no orders any more"};
  return told(PathWord::unpacked(word));
}

QueuePair::Done QueuePair::told(const PathWord& word) {
  if (word.what != Told::kHello) return {Done::What::kTold, 0, word, ""};
  if (std::exchange(greeted_, true)) return {Done::What::kBroken, 0, {}, "the peer said hello again"};
  return {Done::What::kOpen, 0, {}, ""};
}

bool QueuePair::next(Done* done) {
  if (dialled_ && !greeted_ && pair_) {
    greeted_ = true;
    const bool said = tell({Told::kHello});
    *done = {said ? Done::What::kOpen : Done::What::kBroken, 0, {}, said ? "" : "the hello can't be sent"};
    return true;
  }
  if (found_.empty()) {
    ibv_wc entries[kCompletionsATurn];
    const int count = pair_ ? ibv_poll_cq(completions_, kCompletionsATurn, entries) : 0;
    if (count < 0) {
      *done = {Done::What::kBroken, 0, {}, "its completions can't be read"};
      return true;
    }
    found_.assign(entries, entries + count);
  }
  if (found_.empty()) return false;
  *done = understood(found_.front());
  found_.pop_front();
  return true;
}

bool QueuePair::arm() {
  if (!found_.empty() || (dialled_ && !greeted_)) return false;
  if (!pair_ || ibv_req_notify_cq(completions_, 0) != 0) return true;
  // One that came before does not tell of itself.
  ibv_wc entries[kCompletionsATurn];
  const int count = ibv_poll_cq(completions_, kCompletionsATurn, entries);
  if (count > 0) found_.assign(entries, entries + count);
  return count == 0;
}

void QueuePair::disarm() {
  ibv_cq* of = nullptr;
  void* context = nullptr;
  while (events_ && verbs_.get_cq_event(events_, &of, &context) == 0) ++unacked_;
}

}  // namespace sage_kvt
