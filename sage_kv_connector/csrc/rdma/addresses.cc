// SPDX-License-Identifier: Apache-2.0
#include "rdma/addresses.h"

#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>

#include <cstring>
#include <set>

namespace sage_kvt {

std::vector<SocketAddress> rdma_addresses(const Verbs& verbs, const VerbsDevices& devices, rdma_event_channel* events) {
  std::vector<SocketAddress> found;
  std::set<std::pair<ibv_context*, int>> ports;
  ifaddrs* first = nullptr;
  if (::getifaddrs(&first) != 0) return found;
  for (auto* one = first; one && found.size() < kMostAddresses; one = one->ifa_next) {
    if (!one->ifa_addr || (one->ifa_flags & IFF_LOOPBACK) || !(one->ifa_flags & IFF_UP)) continue;
    const int family = one->ifa_addr->sa_family;
    if (family != AF_INET && family != AF_INET6) continue;
    SocketAddress address{{}, static_cast<socklen_t>(family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6))};
    std::memcpy(&address.storage, one->ifa_addr, address.size);
    if (family == AF_INET6 && IN6_IS_ADDR_LINKLOCAL(&reinterpret_cast<sockaddr_in6*>(one->ifa_addr)->sin6_addr))
      continue;
    rdma_cm_id* id = nullptr;
    if (verbs.create_id(events, &id, nullptr, RDMA_PS_TCP) != 0) continue;
    // It has a device where the interface is one. An address is as good as another: one of each port is enough.
    if (verbs.bind_addr(id, reinterpret_cast<sockaddr*>(&address.storage)) == 0 && id->verbs && devices.of(id->verbs) &&
        ports.emplace(id->verbs, id->port_num).second)
      found.push_back(address);
    verbs.destroy_id(id);
  }
  ::freeifaddrs(first);
  return found;
}

}  // namespace sage_kvt
