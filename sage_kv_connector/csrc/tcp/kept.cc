// SPDX-License-Identifier: Apache-2.0
#include "tcp/kept.h"

#include <utility>

namespace sage_kvt {

bool Kept::taken(Connection& connection, uint64_t count) {
  if (count < taken_ || count > sent()) return false;
  for (; taken_ < count; ++taken_) {
    const auto* flight = std::get_if<Flight>(&frames_.front());
    if (flight && flight->post) connection.chunk_sent(flight->post, flight->chunk.offset, flight->chunk.length);
    frames_.pop_front();
  }
  return true;
}

void Kept::revoke(Connection& connection, const Post& post) {
  for (auto& frame : frames_) {
    auto* flight = std::get_if<Flight>(&frame);
    if (!flight || !flight->post || flight->post->id != post.id) continue;
    const auto ended = std::exchange(flight->post, nullptr);
    connection.chunk_failed(ended, Status::kCancelled, "");
  }
}

void Kept::send_again(Connection& connection) {
  std::deque<std::string> messages, notes;
  for (auto& frame : frames_) {
    if (auto* flight = std::get_if<Flight>(&frame)) {
      if (flight->post) connection.give_back(flight->post, std::move(flight->chunk));
    } else if (auto* message = std::get_if<std::string>(&frame)) {
      messages.push_back(std::move(*message));
    } else if (auto* note = std::get_if<Note>(&frame)) {
      notes.push_back(std::move(note->text));
    } else {
      connection.queue_grant(std::get<Grant>(frame));
    }
  }
  taken_ += frames_.size();
  frames_.clear();
  connection.send_again(std::move(messages), std::move(notes));
}

}  // namespace sage_kvt
