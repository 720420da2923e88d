// SPDX-License-Identifier: Apache-2.0
// An endpoint whose connections carry chunks over RDMA where they can: sockets for messages, and for what no path
// takes.
#pragma once

#include "rdma/paths.h"

namespace sage_kvt {

class RdmaEndpoint : public TcpEndpoint {
 public:
  // Throws std::system_error without a device, std::runtime_error without rdma-core.
  RdmaEndpoint(const EndpointOptions& options, const TcpOptions& tcp, const RdmaOptions& rdma);
  ~RdmaEndpoint() override;

  uint64_t register_memory(uint64_t address, uint64_t length) override;
  void deregister_memory(uint64_t region) override;
  void authorize(uint64_t connection) override;
  bool on_note(const std::shared_ptr<Connection>& connection, const std::string& note) override;
  void close() override;

  // As if each path of a connection had broken now: what is under way goes another way. Returns how many there were.
  size_t end_paths(uint64_t connection);
  // Why a connection has no path, "" if it has one.
  void set_reason(const std::shared_ptr<Connection>& connection, const std::string& why);
  // Why some memory goes by sockets; "" if all is registered.
  std::string unregistered();

 private:
  void forgotten(uint64_t connection) override;

  const Verbs& verbs_;
  VerbsDevices devices_;
  std::unique_ptr<Paths> paths_;
  std::mutex why_mutex_;
  std::string unregistered_;
};

// Why there can be none here; "" if there can.
std::string rdma_lacks();

}  // namespace sage_kvt
