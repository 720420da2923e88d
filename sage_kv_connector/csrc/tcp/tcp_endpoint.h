// SPDX-License-Identifier: Apache-2.0
// Sockets of one backend: listening, dialling, and lanes that join a connection by its token.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "endpoint.h"
#include "tcp/channel.h"
#include "tcp/links.h"
#include "tcp/socket_address.h"

namespace sage_kvt {

struct TcpOptions {
  int socket_buffer = 0;      // bytes, 0: the kernel's own tuning
  std::string local_address;  // bind outgoing connections to it, "" for any
  // Hosts at which this side is reached by several networks: peers take lanes over each.
  std::vector<std::string> links{};
};

class TcpEndpoint : public Endpoint {
 public:
  TcpEndpoint(const EndpointOptions& options, const TcpOptions& tcp);
  ~TcpEndpoint() override;

  // "host:port" or "[v6]:port", port 0 for any; returns it with the real port.
  std::string listen(const std::string& address) override;
  uint64_t connect(const std::string& address, double timeout_s) override;
  void authorize(uint64_t connection) override;
  // Seal every frame of a connection from now on, but for messages that are queued already, and believe none that is
  // not sealed. Once, before `authorize`. Throws std::invalid_argument, and std::runtime_error without libcrypto.
  void protect(uint64_t connection, bool encrypts, const std::string& send_keys, const std::string& receive_keys,
               std::string last_plain = {});

  // The first frame of an incoming socket: a new connection, or a lane that joins one (false if refused).
  void established(TcpChannel& channel);
  bool adopt(TcpChannel& channel, const FrameStart& preface);
  // What the peer's endpoint says to this one; false if it makes no sense. A channel's mutex is held.
  virtual bool on_note(const std::shared_ptr<Connection>&, const std::string&) { return false; }
  // The acceptor lets us open more lanes: once, and not before we trust it too. Returns how many these are.
  uint64_t join(const std::shared_ptr<Connection>& connection, const Joinable& joinable);
  // Dial one more lane. Throws std::system_error.
  void open_lane(const std::shared_ptr<Connection>& connection, const SocketAddress& address, const Token& token,
                 const LaneId& id, bool linked = false, size_t link = 0);
  Links& links() { return links_; }

 protected:
  void forgotten(uint64_t connection) override;
  bool is_protected(uint64_t connection) { return keys_of(connection) != nullptr; }
  // Whether this side connected.
  bool dialled(uint64_t connection);
  // How chunks go now, and why not better.
  static void set_way(Connection& connection, const std::string& mode, const std::string& reason);

 private:
  void accepted(int fd);
  void set_options(int fd);
  // Begins to connect to the first address that can be tried; `used` says which.
  int open_socket(const std::vector<SocketAddress>& addresses, SocketAddress* used, bool* connecting);
  std::string listen_at(const std::string& address);
  void let_join(const std::shared_ptr<Connection>& connection);
  void open_lanes(const std::shared_ptr<Connection>& connection);
  std::vector<SocketAddress> other_links(const Connection& connection);
  std::shared_ptr<const ConnectionKeys> keys_of(uint64_t connection);
  // The connection whose token lets this lane join, 0 if there is none; and its place there, once.
  uint64_t joins(const Token& token, const LaneId& id);
  bool admit(uint64_t connection, const LaneId& id);

  const TcpOptions tcp_;
  std::mutex mutex_;
  struct Dialled {
    SocketAddress address;
    Joinable may{};  // that is not opened yet
    bool invited = false;
  };
  std::unordered_map<uint64_t, Dialled> dialled_;
  struct Pending {
    uint64_t connection;
    Token token;
    uint64_t lanes;     // that may join yet
    uint32_t used = 0;  // numbers that did, as bits
  };
  std::vector<Pending> joinable_;
  std::unordered_map<uint64_t, std::shared_ptr<const ConnectionKeys>> keys_;  // of protected connections
  std::vector<SocketAddress> listening_;                                      // of `links`
  Links links_;
};

}  // namespace sage_kvt
