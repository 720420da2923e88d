// SPDX-License-Identifier: Apache-2.0
#include "rdma/rdma_endpoint.h"

#include <stdexcept>

namespace sage_kvt {
namespace {

const Verbs& loaded() {
  std::string why;
  const Verbs* found = verbs(&why);
  if (!found) throw std::runtime_error(why);
  return *found;
}

}  // namespace

RdmaEndpoint::RdmaEndpoint(const EndpointOptions& options, const TcpOptions& tcp, const RdmaOptions& rdma)
    : TcpEndpoint(options, tcp),
      verbs_(loaded()),
      devices_(verbs_),
      paths_(std::make_unique<Paths>(*this, verbs_, devices_, rdma)) {}

RdmaEndpoint::~RdmaEndpoint() { RdmaEndpoint::close(); }

void RdmaEndpoint::close() {
  paths_->stop();
  TcpEndpoint::close();
  paths_->finish();
}

uint64_t RdmaEndpoint::register_memory(uint64_t address, uint64_t length) {
  const uint64_t region = TcpEndpoint::register_memory(address, length);
  for (const auto& device : devices_.all()) {
    std::string why;
    if (device->add(region, address, length, &why)) continue;
    std::lock_guard lock(why_mutex_);
    unregistered_ = why;
  }
  return region;
}

void RdmaEndpoint::deregister_memory(uint64_t region) {
  TcpEndpoint::deregister_memory(region);
  for (const auto& device : devices_.all()) device->remove(region);
}

std::string RdmaEndpoint::unregistered() {
  std::lock_guard lock(why_mutex_);
  return unregistered_;
}

size_t RdmaEndpoint::end_paths(uint64_t id) {
  const auto connection = find_connection(id);
  size_t ended = 0;
  if (!connection) return ended;
  for (const auto& channel : connection->channels()) {
    if (!channel->is_path()) continue;
    std::lock_guard lock(channel->mutex);
    ended += !channel->dead;
    static_cast<PathChannel&>(*channel).end("ended here");
  }
  return ended;
}

void RdmaEndpoint::authorize(uint64_t id) {
  const auto connection = find_connection(id);
  if (!connection || connection->authorized) return;
  // What is sealed can't be read from pages.
  const bool sealed = is_protected(id);
  set_reason(connection, sealed ? "what is protected goes over sockets" : "there is no RDMA path yet");
  TcpEndpoint::authorize(id);
  if (!sealed) paths_->authorized(connection, dialled(id));
}

void RdmaEndpoint::set_reason(const std::shared_ptr<Connection>& connection, const std::string& why) {
  set_way(*connection, why.empty() ? "rdma" : "stream", why);
}

bool RdmaEndpoint::on_note(const std::shared_ptr<Connection>& connection, const std::string& note) {
  return !is_protected(connection->id) && paths_->on_note(connection, note);
}

void RdmaEndpoint::forgotten(uint64_t connection) {
  TcpEndpoint::forgotten(connection);
  paths_->forget(connection);
}

std::string rdma_lacks() {
  std::string why;
  const Verbs* found = verbs(&why);
  if (!found) return why;
  try {
    VerbsDevices devices(*found);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace sage_kvt
