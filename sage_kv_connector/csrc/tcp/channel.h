// SPDX-License-Identifier: Apache-2.0
// One socket of a tcp connection: its life (channel.cc), what it sends (send.cc, seal.cc) and receives (receive.cc).
//
// Where the connection has several links, both sides count what goes over a lane, the receiver says how far it is, and
// the sender keeps what it was not told of yet: so a lane may end alone (links.h).
//
// Sending gathers straight from the pages, receiving scatters straight into the window; a
// chunk's CRC is computed just before it is sent and just after each piece arrived, while its
// bytes are in the cache. So is its tag, where the connection is protected; what is encrypted leaves from a slice
// of memory beside the pages, and is decrypted where it arrived.
#pragma once

#include <sys/uio.h>

#include <memory>
#include <string>
#include <vector>

#include "connection.h"
#include "lane.h"
#include "tcp/frame.h"
#include "tcp/kept.h"
#include "tcp/lane_cipher.h"
#include "tcp/socket_address.h"
#include "tcp/socket_progress.h"
#include "window.h"

namespace sage_kvt {

class TcpEndpoint;

// What the acceptor of a connection lets the other side do.
struct Joinable {
  Token token{};
  uint64_t lanes = 0;  // more than the first
  // Of links besides the one that was dialled; empty: the connection has one.
  std::vector<SocketAddress> addresses{};
};

class TcpChannel : public Channel {
 public:
  // `preface`: the connecting side's token, zero but for a lane that joins as `id`. `linked`: a connection with several
  // links, of which it goes by number `link`.
  TcpChannel(std::shared_ptr<Connection> connection, TcpEndpoint& endpoint, int fd, bool connecting, bool incoming,
             const Token& preface, const LaneId& id = {}, bool linked = false, size_t link = 0);
  ~TcpChannel() override;

  bool progress() override;
  bool arm() override;
  void disarm(bool lane_sleeps) override;
  void revoke(const Post& post) override;
  void shut() override;
  bool stuck() const override { return out_active_ || owes_control(); }
  void expire() override;
  void ping() override;
  void alarmed(uint64_t now) override;
  bool expendable() const override { return ends_alone_ || (joins_ && !established_); }
  // It sends more than control frames.
  bool carries_messages() const override { return established_ || !(incoming_ || joins_); }
  size_t link() const override { return link_; }
  std::vector<int> fds() const override { return {fd_}; }
  const LaneId& id() const { return id_; }
  // When bytes came last, of a connection with several links (now_ns); and let some come soon. Without its mutex.
  uint64_t heard() const { return heard_; }
  void show_life();

  // Queue a frame without payload (mutex held).
  void queue_control(FrameType type, const Token& token, uint64_t number, uint64_t window = 0);
  // Tell the other side (mutex held).
  void queue_join(const Joinable& joinable);
  // Its connection has other lanes, or is to end (mutex held).
  void end(const std::string& why) { broken(Status::kConnectionLost, why); }
  // Give the socket up to another connection's channel (a joining lane). The caller owns it then.
  int release_fd();
  // From the next frame that comes, and behind the messages that are queued (mutex held, or before it is attached).
  // `open`: one that opened frames of this lane already.
  void protect(const std::shared_ptr<const ConnectionKeys>& keys, std::unique_ptr<LaneCipher> open = {});
  // It joined its connection: the peer is told that it may use it.
  void welcome() { established_ = owes_pong_ = true; }

 private:
  bool send_some();
  bool begin_frame();
  void begin_control();
  void begin_join();
  void keep(Kept::Frame frame);
  void void_chunk();
  void start_frame(const std::vector<iovec>& body, bool sealed);
  void end_frame();
  void seal_more();
  void seal_failed();
  void revoke_sealed();
  bool in_pages(const iovec& piece) const;
  bool receive_some();
  bool on_header();
  bool on_first_header();
  bool on_data_header();
  bool on_payload(size_t received);
  bool open_body(size_t received);
  bool finish_body();
  void took();
  void say_taken();
  bool on_join(const FrameHeader& header);
  bool on_join_answer(uint64_t lanes);
  bool on_join_body();
  bool on_taken(uint64_t count);
  bool on_note();
  bool forged();
  size_t start_bytes() const;
  size_t end_bytes() const { return sizeof(FrameTrailer) + (open_ ? sizeof(Tag) : 0); }
  bool seals() const { return seal_ && plain_messages_ == 0; }
  bool linked() const { return kept_ && counts_; }
  bool owes_control() const {
    return !control_.empty() || !joins_told_.empty() || owes_ping_ || owes_pong_ || owes_taken_;
  }

  // One turn of a direction moves about this much before the other gets its own.
  static constexpr uint64_t kTurnBytes = 4u << 20;

  TcpEndpoint& endpoint_;
  int fd_;
  bool connecting_, incoming_;
  const bool joins_;  // as another lane of its connection, once the acceptor answered
  const LaneId id_;
  const size_t link_;
  std::atomic<bool> established_{false};
  bool noted_ = false;  // a note came before the connection was authorized
  bool announce_;       // CONNECTED is still to be said
  uint32_t armed_events_;

  // sending
  std::vector<FrameHeader> control_;
  std::vector<Joinable> joins_told_;
  bool owes_ping_ = false, owes_pong_ = false;  // however many pings came, one answer is for all of them
  FrameHeader out_header_{};
  FrameTrailer out_trailer_{};
  std::string out_message_;
  std::shared_ptr<Post> out_post_;
  std::vector<iovec> out_;
  size_t out_next_ = 0;
  uint64_t out_length_ = 0;
  bool out_active_ = false, want_write_ = false;
  // Of a protected frame: its body is sealed slice by slice, as it leaves.
  std::unique_ptr<LaneCipher> seal_;
  size_t plain_messages_ = 0;  // queued before it was protected
  Tag out_tag_{}, out_end_tag_{};
  std::vector<iovec> body_;
  size_t body_next_ = 0;
  bool sealing_ = false;      // the body has no tag yet
  std::vector<char> sealed_;  // a slice
  // Where the peer counts what comes: what it may not have taken. The frame that leaves is the last, if `out_kept_`.
  std::unique_ptr<Kept> kept_;
  bool out_kept_ = false;
  SocketProgress progress_;
  bool stalled_ = false, ends_alone_ = false;
  std::atomic<uint64_t> heard_{0};
  std::atomic<bool> asked_for_life_{false};

  // receiving
  enum class Receive { kHeader, kMessage, kData, kDiscard, kEnd };
  Receive state_ = Receive::kHeader;
  FrameStart in_start_{};
  FrameEnd in_end_{};
  std::unique_ptr<LaneCipher> open_;
  size_t in_have_ = 0;
  std::string in_message_;
  std::shared_ptr<Window> in_window_;
  uint64_t in_done_ = 0;
  uint32_t in_crc_ = 0;
  std::vector<iovec> in_;
  // Where the peer keeps what it sends: so many came, of which it was not told all.
  bool counts_, answered_ = false, owes_taken_ = false;
  uint64_t taken_ = 0, taken_told_ = 0, bytes_untold_ = 0;
  std::vector<char> discarded_;  // where unwanted payload goes
};

}  // namespace sage_kvt
