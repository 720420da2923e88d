// SPDX-License-Identifier: Apache-2.0
#include "path/channel.h"

#include "endpoint.h"

namespace sage_kvt {

PathChannel::PathChannel(std::shared_ptr<Connection> of, PathOwner& owner, std::unique_ptr<PathWire> wire,
                         uint32_t path_)
    : Channel(std::move(of)), path(path_), endpoint_(connection->endpoint), owner_(owner), wire_(std::move(wire)) {}

PathChannel::~PathChannel() = default;

void PathChannel::shut() {
  lane->forget(wire_->fd());
  wire_->destroy();
  // Nothing touches our memory any more: windows may close, and what did not land may come another way.
  for (auto& arrival : arrivals_) arrival.window->release(arrival.notice.offset, arrival.notice.length);
  arrivals_.clear();
  told_.clear();
  set_open(false);
  owner_.path_ended(*this, std::move(flights_), results_);
}

void PathChannel::end(const std::string& why) {
  if (!dead) why_ = why;
  broken(Status::kConnectionLost, why);
}

void PathChannel::set_open(bool open) {
  if (open_ == open) return;
  open_ = open;
  open ? connection->path_opened() : connection->path_closed();
}

bool PathChannel::progress() {
  bool moved = take_completions();
  if (dead) return true;
  moved |= receive_some();
  if (dead) return true;
  return send_some() || moved;
}

bool PathChannel::take_completions() {
  using What = PathWire::Done::What;
  bool moved = false;
  PathWire::Done done;
  while (wire_->next(&done)) {
    moved = true;
    switch (done.what) {
      case What::kOpen:
      case What::kResting:
        set_open(done.what == What::kOpen);
        connection->kick();  // what waits leaves by other channels, or by this one
        break;
      case What::kSent:
        break;
      case What::kRead:
        connection->liveness.heard();
        take_read();
        break;
      case What::kNotRead: {
        const auto& first = arrivals_.front();
        first.window->release(first.notice.offset, first.notice.length);
        tell_end(first, kElsewhere);
        arrivals_.pop_front();
        break;
      }
      case What::kTold:
        connection->liveness.heard();
        on_told(done.word);
        break;
      case What::kBroken:
        end(done.why);
        break;
    }
    if (dead) return true;
  }
  return moved;
}

void PathChannel::on_told(const PathWord& word) {
  switch (word.what) {
    case Told::kHello:
      break;  // a wire's own
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

bool PathChannel::arm() {
  if (!acks_.empty() && wire_->room(1)) return false;
  if (!told_.empty() && !connection->inbox_full()) return false;
  if (can_send() && connection->has_work_for(*this)) return false;
  return wire_->arm();
}

void PathChannel::disarm(bool) { wire_->disarm(); }

}  // namespace sage_kvt
