// SPDX-License-Identifier: Apache-2.0
#include "rdma/channel.h"

#include "endpoint.h"

namespace sage_kvt {

RdmaChannel::RdmaChannel(std::shared_ptr<Connection> of, PathOwner& owner, std::unique_ptr<QueuePair> pair,
                         uint32_t path_, bool dialled_)
    : Channel(std::move(of)),
      path(path_),
      dialled(dialled_),
      endpoint_(connection->endpoint),
      owner_(owner),
      pair_(std::move(pair)) {}

RdmaChannel::~RdmaChannel() = default;

void RdmaChannel::shut() {
  lane->forget(pair_->fd());
  pair_->destroy();
  // No device touches our memory any more: windows may close, and what did not land may come another way.
  for (auto& arrival : arrivals_) arrival.window->release(arrival.notice.offset, arrival.notice.length);
  arrivals_.clear();
  told_.clear();
  if (open_) connection->path_closed();
  open_ = false;
  owner_.path_ended(*this, pair_->id(), std::move(flights_), results_);
}

void RdmaChannel::end(const std::string& why) {
  if (!dead) why_ = why;
  broken(Status::kConnectionLost, why);
}

void RdmaChannel::open() {
  if (open_) return;
  open_ = true;
  connection->path_opened();
}

bool RdmaChannel::progress() {
  bool moved = false;
  // iWARP: the side that connected speaks first.
  if (dialled && !greeted_) {
    greeted_ = moved = true;
    if (!pair_->tell({Told::kHello})) {
      end("the hello can't be sent");
      return true;
    }
    open();
  }
  moved |= take_completions();
  if (dead) return true;
  moved |= receive_some();
  if (dead) return true;
  return send_some() || moved;
}

bool RdmaChannel::take_completions() {
  bool moved = false;
  QueuePair::Done done;
  while (pair_->next(&done)) {
    moved = true;
    switch (done.what) {
      case QueuePair::Done::What::kSent:
        break;
      case QueuePair::Done::What::kRead: {
        auto& first = arrivals_.front();  // they end in the order in which they were ordered
        connection->liveness.heard();
        std::string detail;
        const Status status = held(first, &detail);
        finish(first, status, detail);
        arrivals_.pop_front();
        break;
      }
      case QueuePair::Done::What::kTold:
        connection->liveness.heard();
        on_told(done.word);
        break;
      case QueuePair::Done::What::kBroken:
        end(done.why);
        break;
    }
    if (dead) return true;
  }
  return moved;
}

void RdmaChannel::on_told(const PathWord& word) {
  switch (word.what) {
    case Told::kHello:
      if (dialled || greeted_) break;
      greeted_ = true;
      open();
      connection->kick();
      return;
    case Told::kChunk:
      if (word.cell >= kCells || told_.size() >= kCells || !connection->authorized) break;
      told_.push_back(word.cell);
      return;
    case Told::kEnded:
      if (word.cell >= kCells || !flights_[word.cell].post) break;
      on_ended(word);
      return;
  }
  end("the peer said what makes no sense");
}

bool RdmaChannel::arm() {
  if (!acks_.empty() && pair_->room(1)) return false;
  if (!told_.empty() && !connection->inbox_full()) return false;
  if (can_send() && connection->has_work_for(*this)) return false;
  if (dialled && !greeted_) return false;
  return pair_->arm();
}

void RdmaChannel::disarm(bool) { pair_->disarm(); }

}  // namespace sage_kvt
