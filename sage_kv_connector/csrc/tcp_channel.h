// SPDX-License-Identifier: Apache-2.0
// One socket of a tcp connection. docs/protocol.md, "tcp", is the format.
//
// Sending gathers straight from the pages, receiving scatters straight into the window; a
// chunk's CRC is computed just before it is sent and just after each piece arrived, while its
// bytes are in the cache.
#pragma once

#include <sys/socket.h>

#include <array>

#include "endpoint.h"

namespace sage_kvt {

enum class FrameType : uint8_t { kPreface = 1, kMessage = 2, kData = 3, kJoin = 4 };

struct FrameHeader {
  uint32_t magic;
  uint8_t type;
  uint8_t flags;
  uint16_t reserved;
  uint64_t length;
  uint64_t window;
  uint64_t offset;
  uint64_t generation;
  std::array<uint8_t, 16> token;
  uint32_t zero;
  uint32_t header_crc;
};
static_assert(sizeof(FrameHeader) == 64);

struct FrameTrailer {
  uint32_t crc;
  uint32_t aborted;
  uint64_t generation;
};
static_assert(sizeof(FrameTrailer) == 16);

constexpr uint32_t kFrameMagic = 0x54564B53;  // "SKVT"
constexpr uint8_t kFlagChecksum = 1;

using Token = std::array<uint8_t, 16>;

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
  bool stuck() const override { return out_active_ || !control_.empty(); }
  void expire() override;
  std::vector<int> fds() const override { return {fd_}; }

  // Queue a frame without payload (mutex held).
  void queue_control(FrameType type, const Token& token, uint64_t number);
  // Give the socket up to another connection's channel (a joining lane). The caller owns it then.
  int release_fd();
  void mark_established() { established_ = true; }

 private:
  bool send_some();
  bool begin_frame();
  void end_frame();
  bool receive_some();
  bool on_header();
  bool on_payload(size_t received);
  bool finish_data();
  void broken(Status status, const std::string& detail);

  TcpEndpoint& endpoint_;
  int fd_;
  bool connecting_, incoming_;
  bool established_ = false;
  bool announce_;  // CONNECTED is still to be said
  uint32_t armed_events_;

  // sending
  std::vector<FrameHeader> control_;
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

struct SocketAddress {
  sockaddr_storage storage;
  socklen_t size;
};

struct TcpOptions {
  int socket_buffer = 0;      // bytes, 0: the kernel's own tuning
  std::string local_address;  // bind outgoing connections to it, "" for any
};

class TcpEndpoint : public Endpoint {
 public:
  TcpEndpoint(const EndpointOptions& options, const TcpOptions& tcp);
  ~TcpEndpoint() override;

  // "host:port" or "[v6]:port", port 0 for any; returns it with the real port.
  std::string listen(const std::string& address) override;
  uint64_t connect(const std::string& address, double timeout_s) override;
  void authorize(uint64_t connection) override;

  // The first frame of an incoming socket: a new connection, or a lane that joins one (false if refused).
  void established(TcpChannel& channel);
  bool adopt(TcpChannel& channel, const Token& token);
  // The acceptor lets us open more lanes with this token: once, and not before we trust it too.
  void join(const std::shared_ptr<Connection>& connection, const Token& token, uint64_t lanes);

 private:
  void forgotten(uint64_t connection) override;
  void accepted(int fd);
  void set_options(int fd);
  // Begins to connect to the first address that can be tried; `used` says which.
  int open_socket(const std::vector<SocketAddress>& addresses, SocketAddress* used, bool* connecting);
  void open_lanes(const std::shared_ptr<Connection>& connection);

  const TcpOptions tcp_;
  std::mutex mutex_;
  struct Dialled {
    SocketAddress address;
    Token token;
    uint64_t lanes = 0;  // still to be opened
    bool invited = false;
  };
  std::unordered_map<uint64_t, Dialled> dialled_;
  struct Pending {
    uint64_t connection;
    Token token;
    uint64_t lanes;
  };
  std::vector<Pending> joinable_;
};

}  // namespace sage_kvt
