// SPDX-License-Identifier: Apache-2.0
#include "wire.h"

#include <algorithm>
#include <utility>

namespace sage_kvt::simulation {

uint64_t Wire::late() {
  return now_ns() + manners.shortest_ns + random_() % (manners.longest_ns - manners.shortest_ns + 1);
}

bool Wire::chance(int out_of_1000) { return out_of_1000 > 0 && static_cast<int>(random_() % 1000) < out_of_1000; }

void Wire::listening(const std::string& host, bool up) {
  if (up)
    hosts_.insert(host);
  else
    hosts_.erase(host);
}

void Wire::call(std::shared_ptr<Link> link, uint64_t joins) {
  std::erase_if(links_, [](const auto& known) { return known.expired(); });
  links_.push_back(link);
  if (silent_hosts.contains(link->to) || silent_hosts.contains(link->from)) {
    link->silent = true;
  } else if (!hosts_.contains(link->to)) {
    Packet refused;
    refused.kind = Packet::Kind::kRefused;
    send(*link, link->to_connector, std::move(refused));
  } else {
    calls_.push_back({late(), std::move(link), joins});
  }
}

void Wire::send(Link& link, Way& way, Packet packet) {
  if (link.silent || way.gone) return;
  packet.due = way.last_due = std::max(way.last_due, late());
  way.packets.push_back(std::move(packet));
}

bool Wire::take_call(const std::string& host, Call* call) {
  const auto now = now_ns();
  const auto found =
      std::find_if(calls_.begin(), calls_.end(), [&](const Call& c) { return c.link->to == host && c.due <= now; });
  if (found == calls_.end()) return false;
  *call = std::move(*found);
  calls_.erase(found);
  return true;
}

uint64_t Wire::next_call(const std::string& host) const {
  uint64_t next = UINT64_MAX;
  for (const auto& call : calls_)
    if (call.link->to == host) next = std::min(next, call.due);
  return next;
}

void Wire::cut(const std::string& host, bool silently) {
  for (const auto& known : links_) {
    const auto link = known.lock();
    if (!link || (link->from != host && link->to != host)) continue;
    if (silently) {
      link->silent = true;
      continue;
    }
    for (Way* way : {&link->to_acceptor, &link->to_connector}) {
      Packet closed;
      closed.kind = Packet::Kind::kClosed;
      send(*link, *way, std::move(closed));
    }
    link->silent = true;
  }
}

uint64_t Wire::links() const {
  return static_cast<uint64_t>(
      std::count_if(links_.begin(), links_.end(), [](const auto& known) { return !known.expired(); }));
}

}  // namespace sage_kvt::simulation
