// SPDX-License-Identifier: Apache-2.0
// Sockets of one backend: listening, dialling, and lanes that join a connection by its token.
#pragma once

#include <sys/socket.h>

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "endpoint.h"
#include "tcp/channel.h"

namespace sage_kvt {

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
