// SPDX-License-Identifier: Apache-2.0
// One socket of a tcp connection: its life (channel.cc), what it sends (send.cc) and receives (receive.cc).
//
// Sending gathers straight from the pages, receiving scatters straight into the window; a
// chunk's CRC is computed just before it is sent and just after each piece arrived, while its
// bytes are in the cache.
#pragma once

#include <sys/uio.h>

#include <memory>
#include <string>
#include <vector>

#include "connection.h"
#include "lane.h"
#include "tcp/frame.h"
#include "window.h"

namespace sage_kvt {

class TcpEndpoint;

class TcpChannel : public Channel {
 public:
  // `first` is sent before anything else (the connecting side's preface).
  TcpChannel(std::shared_ptr<Connection> connection, TcpEndpoint& endpoint, int fd, bool connecting, bool incoming,
             const Token& preface);
  ~TcpChannel() override;

  bool progress() override;
  bool arm() override;
  void disarm(bool lane_sleeps) override;
  void revoke(const Post& post) override;
  void shut() override;
  bool stuck() const override { return out_active_ || owes_control(); }
  void expire() override;
  void ping() override;
  bool expendable() const override { return joins_ && !established_; }
  std::vector<int> fds() const override { return {fd_}; }

  // Queue a frame without payload (mutex held).
  void queue_control(FrameType type, const Token& token, uint64_t number);
  // Give the socket up to another connection's channel (a joining lane). The caller owns it then.
  int release_fd();
  // It joined its connection: the peer is told that it may use it.
  void welcome() { established_ = owes_pong_ = true; }

 private:
  bool send_some();
  bool begin_frame();
  void end_frame();
  bool receive_some();
  bool on_header();
  bool on_payload(size_t received);
  bool finish_data();
  // More than control frames.
  bool may_send() const { return established_ || !(incoming_ || joins_); }
  bool owes_control() const { return !control_.empty() || owes_ping_ || owes_pong_; }

  // One turn of a direction moves about this much before the other gets its own.
  static constexpr uint64_t kTurnBytes = 4u << 20;

  TcpEndpoint& endpoint_;
  int fd_;
  bool connecting_, incoming_;
  const bool joins_;  // as another lane of its connection, once the acceptor answered
  bool established_ = false;
  bool announce_;  // CONNECTED is still to be said
  uint32_t armed_events_;

  // sending
  std::vector<FrameHeader> control_;
  bool owes_ping_ = false, owes_pong_ = false;  // however many pings came, one answer is for all of them
  FrameHeader out_header_{};
  FrameTrailer out_trailer_{};
  std::string out_message_;
  std::shared_ptr<Post> out_post_;
  std::vector<iovec> out_;
  size_t out_next_ = 0;
  uint64_t out_length_ = 0;
  bool out_active_ = false, want_write_ = false;

  // receiving
  enum class Receive { kHeader, kMessage, kData, kDiscard, kTrailer };
  Receive state_ = Receive::kHeader;
  FrameHeader in_header_{};
  FrameTrailer in_trailer_{};
  size_t in_have_ = 0;
  std::string in_message_;
  std::shared_ptr<Window> in_window_;
  uint64_t in_done_ = 0;
  uint32_t in_crc_ = 0;
  std::vector<iovec> in_;
  std::vector<char> discarded_;  // where unwanted payload goes
};

}  // namespace sage_kvt
