// SPDX-License-Identifier: Apache-2.0
// RDMA devices of this machine, and the keys of our memory on them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "path/memory_keys.h"
#include "rdma/verbs.h"

namespace sage_kvt {

// One device, with one protection domain for everything of ours. Peers may read all memory of an endpoint that is
// registered, and write only what `add_written` registers.
class VerbsDevice {
 public:
  // Throws std::system_error.
  VerbsDevice(const Verbs& verbs, ibv_context* context);
  ~VerbsDevice();
  VerbsDevice(const VerbsDevice&) = delete;
  VerbsDevice& operator=(const VerbsDevice&) = delete;

  ibv_context* context() const { return context_; }
  ibv_pd* domain() const { return domain_; }
  // Whether a write can tell the other side of itself. iWARP has no immediate data.
  bool immediate() const { return immediate_; }
  const ibv_device_attr& attributes() const { return attributes_; }
  std::string name() const { return context_->device->name; }

  // False, and why, where the device or a limit of the process refuses; the memory is then without keys here.
  bool add(uint64_t region, uint64_t address, uint64_t length, std::string* why);
  void remove(uint64_t region);
  std::shared_ptr<const KeyTable> keys() const;
  // Memory of a path's own, which its peer may write or this device alone, until `dereg_mr`; nullptr and errno.
  ibv_mr* add_written(void* address, size_t length, bool by_peer);

 private:
  void publish();

  const Verbs& verbs_;
  ibv_context* const context_;
  ibv_pd* domain_;
  ibv_device_attr attributes_{};
  bool immediate_ = true;
  mutable std::mutex mutex_;
  std::map<uint64_t, ibv_mr*> regions_;
  std::shared_ptr<const KeyTable> keys_ = std::make_shared<const KeyTable>();
};

// All that rdma-core knows of. Throws std::system_error where there is none.
class VerbsDevices {
 public:
  explicit VerbsDevices(const Verbs& verbs);
  ~VerbsDevices();
  VerbsDevices(const VerbsDevices&) = delete;
  VerbsDevices& operator=(const VerbsDevices&) = delete;

  const std::vector<std::shared_ptr<VerbsDevice>>& all() const { return devices_; }
  // nullptr for one that came later.
  std::shared_ptr<VerbsDevice> of(const ibv_context* context) const;

 private:
  const Verbs& verbs_;
  ibv_context** contexts_;
  std::vector<std::shared_ptr<VerbsDevice>> devices_;
};

}  // namespace sage_kvt
