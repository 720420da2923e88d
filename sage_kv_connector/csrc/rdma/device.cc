// SPDX-License-Identifier: Apache-2.0
#include "rdma/device.h"

#include <cerrno>
#include <cstring>
#include <system_error>

namespace sage_kvt {
namespace {

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

}  // namespace

VerbsDevice::VerbsDevice(const Verbs& verbs, ibv_context* context)
    : verbs_(verbs), context_(context), domain_(verbs.alloc_pd(context)) {
  if (!domain_) fail("can't make an RDMA protection domain");
  if (const int error = verbs_.query_device(context_, &attributes_); error != 0) {
    verbs_.dealloc_pd(domain_);
    errno = error;
    fail("can't ask an RDMA device what it can do");
  }
  immediate_ = context_->device->transport_type != IBV_TRANSPORT_IWARP;
}

VerbsDevice::~VerbsDevice() {
  for (const auto& [id, region] : regions_) verbs_.dereg_mr(region);
  verbs_.dealloc_pd(domain_);
}

bool VerbsDevice::add(uint64_t region, uint64_t address, uint64_t length, std::string* why) {
  // iWARP puts what it reads with the rights of a write from outside.
  const int access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ | (immediate_ ? 0 : IBV_ACCESS_REMOTE_WRITE);
  ibv_mr* made = verbs_.reg_mr(domain_, reinterpret_cast<void*>(address), length, access);
  if (!made) {
    *why = name() + " can't register " + std::to_string(length) + " bytes: " + std::strerror(errno) +
           (errno == ENOMEM ? " (ulimit -l unlimited; in a container the capability IPC_LOCK)" : "");
    return false;
  }
  std::lock_guard lock(mutex_);
  regions_[region] = made;
  publish();
  return true;
}

void VerbsDevice::remove(uint64_t region) {
  ibv_mr* gone;
  {
    std::lock_guard lock(mutex_);
    const auto found = regions_.find(region);
    if (found == regions_.end()) return;
    gone = found->second;
    regions_.erase(found);
    publish();
  }
  verbs_.dereg_mr(gone);
}

void VerbsDevice::publish() {
  KeyTable table;
  for (const auto& [id, region] : regions_) {
    const auto address = reinterpret_cast<uint64_t>(region->addr);
    table.push_back({address, address + region->length, region->lkey, region->rkey});
  }
  keys_ = by_address(std::move(table));
}

std::shared_ptr<const KeyTable> VerbsDevice::keys() const {
  std::lock_guard lock(mutex_);
  return keys_;
}

ibv_mr* VerbsDevice::add_written(void* address, size_t length, bool by_peer) {
  return verbs_.reg_mr(domain_, address, length, IBV_ACCESS_LOCAL_WRITE | (by_peer ? IBV_ACCESS_REMOTE_WRITE : 0));
}

VerbsDevices::VerbsDevices(const Verbs& verbs) : verbs_(verbs) {
  int count = 0;
  contexts_ = verbs_.get_devices(&count);
  if (!contexts_) {
    if (errno == ENOENT) errno = ENODEV;
    fail(errno == ENODEV ? "there is no RDMA device" : "can't list RDMA devices");
  }
  try {
    for (int i = 0; i < count; ++i) devices_.push_back(std::make_shared<VerbsDevice>(verbs_, contexts_[i]));
    if (devices_.empty()) {
      errno = ENODEV;
      fail("there is no RDMA device");
    }
  } catch (...) {
    devices_.clear();
    verbs_.free_devices(contexts_);
    throw;
  }
}

VerbsDevices::~VerbsDevices() {
  devices_.clear();
  verbs_.free_devices(contexts_);
}

std::shared_ptr<VerbsDevice> VerbsDevices::of(const ibv_context* context) const {
  for (const auto& device : devices_)
    if (device->context() == context) return device;
  return nullptr;
}

}  // namespace sage_kvt
