// SPDX-License-Identifier: Apache-2.0
// What the channels of every backend do alike: they break, and look after their peer.
#include <algorithm>
#include <cstdio>

#include "endpoint.h"
#include "lane.h"

namespace sage_kvt {

uint64_t Channel::due() const {
  if (const uint64_t until = deadline; until != 0) return until;
  const uint64_t peer = first ? connection->liveness.due() : 0, own = alarm;
  return peer == 0 || own == 0 ? peer | own : std::min(peer, own);
}

void Channel::on_time(uint64_t now) {
  if (const uint64_t until = deadline; until != 0) {
    if (now >= until) expire();
    return;
  }
  if (const uint64_t own = alarm; own != 0 && now >= own) {
    alarm = 0;
    alarmed(now);
    if (dead) return;
  }
  if (!first) return;
  // What is not read can't be a sign of life.
  if (connection->inbox_full()) connection->liveness.heard();
  switch (connection->liveness.look(now)) {
    case Liveness::Verdict::kWait:
      return;
    case Liveness::Verdict::kPing:
      ping();
      return;
    case Liveness::Verdict::kSilent: {
      char detail[64];
      const double seconds = static_cast<double>(connection->liveness.timeout_ns()) / 1e9;
      std::snprintf(detail, sizeof detail, "the peer is silent for %g s", seconds);
      broken(Status::kSilent, detail);
      return;
    }
  }
}

bool Channel::rest() {
  resting = arm();
  if (!resting) woken = true;
  return resting;
}

void Channel::rouse(bool lane_sleeps) {
  resting = false;
  disarm(lane_sleeps);
}

void Channel::broken(Status status, const std::string& detail) {
  if (dead.exchange(true)) return;
  broke_with_ = status;
  shut();
  if (!expendable() || !connection->drop_channel(*this)) connection->endpoint.doom(connection, status, detail);
}

}  // namespace sage_kvt
