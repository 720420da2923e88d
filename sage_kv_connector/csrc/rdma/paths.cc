// SPDX-License-Identifier: Apache-2.0
#include "rdma/paths.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

#include "rdma/addresses.h"
#include "rdma/rdma_endpoint.h"

namespace sage_kvt {
namespace {

constexpr int kBacklog = 64;
constexpr size_t kMostTasks = 4096;
constexpr uint64_t kFirstBackoffNs = 250000000, kLongestBackoffNs = 30000000000;

sockaddr* raw(SocketAddress& address) { return reinterpret_cast<sockaddr*>(&address.storage); }

}  // namespace

Paths::Paths(RdmaEndpoint& endpoint, const Verbs& verbs, VerbsDevices& devices, const RdmaOptions& options)
    : endpoint_(endpoint), verbs_(verbs), devices_(devices), options_(options) {
  events_ = verbs_.create_event_channel();
  if (!events_) throw std::system_error(errno, std::generic_category(), "can't hear of RDMA connections");
  wake_ = ::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  ::fcntl(events_->fd, F_SETFL, ::fcntl(events_->fd, F_GETFL) | O_NONBLOCK);
  listen();
  thread_ = std::thread([this] { run(); });
}

Paths::~Paths() {
  stop();
  finish();
  for (auto* id : listeners_) verbs_.destroy_id(id);
  verbs_.destroy_event_channel(events_);
  ::close(wake_);
}

void Paths::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  const uint64_t one = 1;
  (void)!::write(wake_, &one, sizeof one);
  if (thread_.joinable()) thread_.join();
}

void Paths::finish() {
  while (run_tasks()) {
  }
  for (auto& [id, setup] : std::exchange(setups_, {})) {
    setup.pair.reset();
    verbs_.destroy_id(id);
  }
  dials_.clear();
  left_.clear();
}

void Paths::submit(std::function<void()> task) {
  std::lock_guard lock(mutex_);
  tasks_.push_back(std::move(task));
  const uint64_t one = 1;
  (void)!::write(wake_, &one, sizeof one);
}

bool Paths::run_tasks() {
  std::vector<std::function<void()>> tasks;
  {
    std::lock_guard lock(mutex_);
    tasks.swap(tasks_);
  }
  for (const auto& task : tasks) task();
  return !tasks.empty();
}

int Paths::timeout_ms() const {
  uint64_t nearest = UINT64_MAX;
  for (const auto& [id, dial] : dials_) {
    if (dial.connection->closed()) continue;  // it is forgotten in a moment
    for (const auto& route : dial.routes)
      if (!route.busy) nearest = std::min(nearest, route.due);
  }
  if (nearest == UINT64_MAX) return -1;
  const uint64_t now = now_ns();
  return nearest <= now ? 0 : static_cast<int>((nearest - now) / 1000000 + 1);
}

void Paths::run() {
  ::pthread_setname_np(::pthread_self(), "sage-kvt-paths");
  while (true) {
    pollfd fds[] = {{events_->fd, POLLIN, 0}, {wake_, POLLIN, 0}};
    ::poll(fds, 2, timeout_ms());
    uint64_t value;
    (void)!::read(wake_, &value, sizeof value);
    {
      std::lock_guard lock(mutex_);
      if (stopping_) return;
    }
    run_tasks();
    for (Happened happened; take_event(&happened);) on_event(happened);
    dial_due();
  }
}

void Paths::listen() {
  for (auto address : rdma_addresses(verbs_, devices_, events_)) {
    rdma_cm_id* id = nullptr;
    if (verbs_.create_id(events_, &id, nullptr, RDMA_PS_TCP) != 0) continue;
    if (verbs_.bind_addr(id, raw(address)) != 0 || verbs_.listen(id, kBacklog) != 0) {
      verbs_.destroy_id(id);
      continue;
    }
    const uint16_t port = verbs_.get_src_port(id);
    if (address.storage.ss_family == AF_INET)
      reinterpret_cast<sockaddr_in&>(address.storage).sin_port = port;
    else
      reinterpret_cast<sockaddr_in6&>(address.storage).sin6_port = port;
    listeners_.push_back(id);
    listening_.push_back(address);
  }
}

void Paths::authorized(const std::shared_ptr<Connection>& connection, bool dialled) {
  if (!dialled)
    submit([this, connection] { invite(connection); });
  else
    submit([this, connection] {  // an invitation that came before waits for this
      if (auto found = dials_.find(connection->id); found != dials_.end())
        for (auto& route : found->second.routes) route.due = 0;
    });
}

void Paths::invite(const std::shared_ptr<Connection>& connection) {
  if (listening_.empty() || connection->closed()) return;
  Invitation invitation{{}, listening_};
  if (::getrandom(invitation.token.data(), invitation.token.size(), 0) != static_cast<ssize_t>(invitation.token.size()))
    return;
  invited_[connection->id] = {invitation.token};
  connection->queue_note(note_of(invitation));
}

bool Paths::on_note(const std::shared_ptr<Connection>& connection, const std::string& note) {
  {
    std::lock_guard lock(mutex_);
    if (tasks_.size() > kMostTasks) return false;  // nobody who means well says so much
  }
  if (const auto ended = path_ended_of(note))
    submit([this, connection, ended = *ended] { peer_ended(connection, ended); });
  else if (const auto invitation = invitation_of(note))
    submit([this, connection, invitation = *invitation] { invited(connection, invitation); });
  else
    return false;
  return true;
}

void Paths::invited(const std::shared_ptr<Connection>& connection, const Invitation& invitation) {
  if (connection->closed() || dials_.count(connection->id) > 0) return;
  const auto& to = invitation.addresses;
  const auto from = rdma_addresses(verbs_, devices_, events_);
  if (from.empty()) return;
  Dial dial{connection, invitation.token, {}};
  for (size_t i = 0; i < std::max(from.size(), to.size()); ++i)
    dial.routes.push_back({from[i % from.size()], to[i % to.size()]});
  dials_[connection->id] = std::move(dial);
}

void Paths::dial_due() {
  const uint64_t now = now_ns();
  for (auto& [id, dial] : dials_) {
    if (dial.connection->closed()) continue;
    if (!dial.connection->authorized) {
      for (auto& route : dial.routes) route.due = std::max(route.due, now + kFirstBackoffNs);
      continue;
    }
    for (size_t i = 0; i < dial.routes.size(); ++i)
      if (!dial.routes[i].busy && dial.routes[i].due <= now) this->dial(dial, i);
  }
}

void Paths::dial(Dial& dial, size_t number) {
  auto& route = dial.routes[number];
  const Key key{dial.connection->id, dial.next_path++};
  routes_[key] = number;
  route.busy = true;
  rdma_cm_id* id = nullptr;
  if (verbs_.create_id(events_, &id, nullptr, RDMA_PS_TCP) != 0) return again(key, std::strerror(errno));
  setups_[id] = {dial.connection, nullptr, key.second, true, {}};
  if (verbs_.resolve_addr(id, raw(route.from), raw(route.to), kResolveMs) != 0) failed(id, std::strerror(errno));
}

// Its route is dialled once more, each time later.
void Paths::again(const Key& key, const std::string& why) {
  const auto known = routes_.find(key);
  if (known == routes_.end()) return;
  const size_t number = known->second;
  routes_.erase(known);
  const auto dial = dials_.find(key.first);
  if (dial == dials_.end()) return;
  auto& route = dial->second.routes[number];
  route.busy = false;
  route.backoff_ns = std::clamp(2 * route.backoff_ns, kFirstBackoffNs, kLongestBackoffNs);
  route.due = now_ns() + route.backoff_ns;
  const bool other =
      std::any_of(live_.begin(), live_.end(), [&](const auto& l) { return l.second.key.first == key.first; });
  if (!other) endpoint_.set_reason(dial->second.connection, "no RDMA path: " + why);
}

void Paths::path_ended(const PathChannel& channel, Flights flights, const Results& results) {
  rdma_cm_id* id = static_cast<const QueuePair&>(channel.wire()).id();
  const Key key{channel.connection->id, channel.path};
  auto left = std::make_shared<Left>(Left{channel.connection, std::move(flights)});
  submit([this, key, id, left, results, why = channel.why()] {
    live_.erase(id);
    verbs_.destroy_id(id);
    again(key, why);
    if (left->connection->closed()) return;
    left->connection->queue_note(note_of(PathEnded{key.second, results}));
    left_[key] = std::move(*left);
    settle(key);
  });
}

void Paths::peer_ended(const std::shared_ptr<Connection>& connection, const PathEnded& ended) {
  const Key key{connection->id, ended.path};
  // What this side thinks of it comes by `path_ended`, then; it may be only about to begin here.
  bool known = left_.count(key) > 0 || std::any_of(setups_.begin(), setups_.end(), [&](const auto& entry) {
                 return entry.second.connection == connection && entry.second.path == ended.path;
               });
  for (const auto& [id, live] : live_)
    if (live.key == key) {
      known = true;
      if (const auto channel = live.channel.lock()) {
        std::lock_guard lock(channel->mutex);
        channel->end("the peer ended it");
      }
    }
  if (!known) return;
  told_[key] = ended.results;
  settle(key);
}

// Both sides are done with a path: what the peer has is sent, the rest is to be taken another way.
void Paths::settle(const Key& key) {
  const auto left = left_.find(key);
  const auto told = told_.find(key);
  if (left == left_.end() || told == told_.end()) return;
  const auto connection = left->second.connection;
  for (size_t cell = 0; cell < kCells; ++cell) {
    auto& flight = left->second.flights[cell];
    if (!flight.post) continue;
    const auto& result = told->second[cell];
    if (result.number == flight.number)
      end_flight(*connection, std::move(flight), result.status);
    else
      connection->give_back(flight.post, std::move(flight.chunk));
  }
  left_.erase(left);
  told_.erase(told);
  connection->kick();
}

void Paths::forget(uint64_t connection) {
  submit([this, connection] {
    dials_.erase(connection);
    invited_.erase(connection);
    std::erase_if(routes_, [&](const auto& entry) { return entry.first.first == connection; });
    std::erase_if(left_, [&](const auto& entry) { return entry.first.first == connection; });
    std::erase_if(told_, [&](const auto& entry) { return entry.first.first == connection; });
  });
}

}  // namespace sage_kvt
