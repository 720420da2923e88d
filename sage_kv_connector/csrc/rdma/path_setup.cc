// SPDX-License-Identifier: Apache-2.0
// How a path is set up, on both sides: what rdma-core tells, step by step.
#include <algorithm>
#include <cerrno>
#include <cstring>

#include "rdma/paths.h"
#include "rdma/rdma_endpoint.h"

namespace sage_kvt {

bool Paths::take_event(Happened* happened) {
  rdma_cm_event* event = nullptr;
  if (verbs_.get_cm_event(events_, &event) != 0) return false;
  *happened = {event->id, event->event, event->status, {}};
  const auto& conn = event->param.conn;
  const bool has_data = event->event == RDMA_CM_EVENT_CONNECT_REQUEST || event->event == RDMA_CM_EVENT_ESTABLISHED;
  if (const auto* data = static_cast<const uint8_t*>(conn.private_data); has_data && data)
    happened->data.assign(data, data + conn.private_data_len);
  verbs_.ack_cm_event(event);
  return true;
}

void Paths::on_event(const Happened& happened) {
  const auto found = setups_.find(happened.id);
  switch (happened.what) {
    case RDMA_CM_EVENT_CONNECT_REQUEST:
      return on_request(happened);
    case RDMA_CM_EVENT_ADDR_RESOLVED:
      if (found != setups_.end()) on_resolved(happened.id, found->second);
      return;
    case RDMA_CM_EVENT_ROUTE_RESOLVED:
      if (found != setups_.end()) connect(happened.id, found->second);
      return;
    case RDMA_CM_EVENT_ESTABLISHED:
      return established(happened);
    case RDMA_CM_EVENT_DISCONNECTED:
    case RDMA_CM_EVENT_DEVICE_REMOVAL:
    case RDMA_CM_EVENT_ADDR_CHANGE:
      if (const auto live = live_.find(happened.id); live != live_.end()) {
        if (const auto channel = live->second.channel.lock()) {
          std::lock_guard lock(channel->mutex);
          channel->end(verbs_.event_str(happened.what));
        }
        return;
      }
      break;
    case RDMA_CM_EVENT_TIMEWAIT_EXIT:
      return;
    default:
      break;
  }
  if (found != setups_.end())
    failed(happened.id, std::string(verbs_.event_str(happened.what)) + ", " + std::to_string(happened.status));
}

void Paths::set_options(rdma_cm_id* id) {
  uint8_t traffic_class = options_.traffic_class, ack_timeout = options_.ack_timeout;
  verbs_.set_option(id, RDMA_OPTION_ID, RDMA_OPTION_ID_TOS, &traffic_class, sizeof traffic_class);
  verbs_.set_option(id, RDMA_OPTION_ID, RDMA_OPTION_ID_ACK_TIMEOUT, &ack_timeout, sizeof ack_timeout);
}

void Paths::on_resolved(rdma_cm_id* id, Setup& setup) {
  set_options(id);
  const auto device = devices_.of(id->verbs);
  if (!device) return failed(id, "its device came after this process began");
  try {
    setup.pair = std::make_unique<QueuePair>(verbs_, device, id, true);
  } catch (const std::exception& error) {
    return failed(id, error.what());
  }
  if (verbs_.resolve_route(id, kResolveMs) != 0) failed(id, std::strerror(errno));
}

// Lies in `setup`, which has its queue pair. The number of retries is that of the side that dials.
rdma_conn_param Paths::offered(Setup& setup, const Token& token) const {
  setup.terms = setup.pair->terms(setup.path, token);
  rdma_conn_param param{};
  param.private_data = &setup.terms;
  param.private_data_len = sizeof setup.terms;
  param.initiator_depth = param.responder_resources = static_cast<uint8_t>(setup.pair->most_reads());
  param.retry_count = options_.retries;
  param.rnr_retry_count = 7;
  return param;
}

void Paths::connect(rdma_cm_id* id, Setup& setup) {
  const auto dial = dials_.find(setup.connection->id);
  if (dial == dials_.end()) return failed(id, "its connection is gone");
  auto param = offered(setup, dial->second.token);
  if (verbs_.connect(id, &param) != 0) failed(id, std::strerror(errno));
}

void Paths::on_request(const Happened& happened) {
  const auto turn_away = [&](const char* why) {
    endpoint_.turned_away("an RDMA peer", Status::kRefused, why);
    verbs_.reject(happened.id, nullptr, 0);
    verbs_.destroy_id(happened.id);
  };
  PathTerms peer;
  if (happened.data.size() < sizeof peer) return turn_away("it does not say to which connection it belongs");
  std::memcpy(&peer, happened.data.data(), sizeof peer);
  const auto token = std::find_if(invited_.begin(), invited_.end(), [&](const auto& entry) {
    return equal_in_constant_time(entry.second.token, peer.token);
  });
  const auto connection = token == invited_.end() ? nullptr : endpoint_.find_connection(token->first);
  if (!connection) return turn_away("its token is not known");
  const auto lives = [&](const auto& entry) { return entry.second.key.first == connection->id; };
  const auto begins = [&](const auto& entry) { return entry.second.connection == connection; };
  const auto paths =
      std::count_if(live_.begin(), live_.end(), lives) + std::count_if(setups_.begin(), setups_.end(), begins);
  if (static_cast<size_t>(paths) >= kMostAddresses)
    return turn_away("its connection has as many paths as one may have");
  if (peer.path <= token->second.last_path) return turn_away("its number was used before");
  token->second.last_path = peer.path;
  const auto device = devices_.of(happened.id->verbs);
  if (!device) return turn_away("its device came after this process began");
  set_options(happened.id);
  Setup setup{connection, nullptr, peer.path, false, {}};
  try {
    setup.pair = std::make_unique<QueuePair>(verbs_, device, happened.id, false);
  } catch (const std::exception& error) {
    return turn_away(error.what());
  }
  setup.pair->meet(peer);
  auto param = offered(setup, peer.token);
  if (verbs_.accept(happened.id, &param) != 0) {
    setup.pair.reset();
    return turn_away("it could not be accepted");
  }
  setups_[happened.id] = std::move(setup);
}

void Paths::established(const Happened& happened) {
  const auto found = setups_.find(happened.id);
  if (found == setups_.end()) return;
  if (found->second.dialled) {
    PathTerms peer;
    if (happened.data.size() < sizeof peer) return failed(happened.id, "the peer did not say where its cells are");
    std::memcpy(&peer, happened.data.data(), sizeof peer);
    found->second.pair->meet(peer);
  }
  auto setup = std::move(found->second);
  setups_.erase(found);
  const Key key{setup.connection->id, setup.path};
  if (const auto route = routes_.find(key); setup.dialled && route != routes_.end())
    if (const auto dial = dials_.find(key.first); dial != dials_.end())
      dial->second.routes[route->second].backoff_ns = 0;
  auto channel = std::make_shared<PathChannel>(setup.connection, *this, std::move(setup.pair), setup.path);
  live_[happened.id] = {channel, key};
  endpoint_.set_reason(setup.connection, "");
  endpoint_.attach(channel);
  if (told_.count(key) == 0) return;
  std::lock_guard lock(channel->mutex);
  channel->end("the peer ended it");
}

void Paths::failed(rdma_cm_id* id, const std::string& why) {
  const auto found = setups_.find(id);
  const Key key{found->second.connection->id, found->second.path};
  const bool dialled = found->second.dialled;
  // It may be there for the peer, which would wait for what became of its chunks.
  if (found->second.pair) found->second.connection->queue_note(note_of(PathEnded{key.second, {}}));
  told_.erase(key);
  found->second.pair.reset();
  setups_.erase(found);
  verbs_.destroy_id(id);
  if (dialled) again(key, why);
}

}  // namespace sage_kvt
