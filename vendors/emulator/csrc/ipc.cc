// SPDX-License-Identifier: Apache-2.0
// Device memory in another process: its memfd, opened through the exporter's /proc entry.
// Works between processes of one user in one pid namespace, while the exporter lives.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "machine.h"

namespace sage_emulator {
namespace {

const uint64_t kPage = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));

bool same(const Sharing& sharing, const IpcName& name) { return ((sharing.token ^ name.token) & name.token_mask) == 0; }

bool alive(int32_t pid) { return ::access(("/proc/" + std::to_string(pid)).c_str(), F_OK) == 0; }

}  // namespace

bool Machine::can_access_peer(int device, int peer) const {
  return device != peer && settings_.peer_access[static_cast<size_t>(device)][static_cast<size_t>(peer)] == '1';
}

bool Machine::reaches(int device, const Allocation& allocation) const {
  return allocation.device == device ||
         device_list_[static_cast<size_t>(device)]->peers[static_cast<size_t>(allocation.device)] ||
         // Imported memory came with the right to reach it.
         (allocation.imported && can_access_peer(device, allocation.device));
}

Status Machine::enable_peer(int device, int peer) {
  if (const Status status = usable(device); status != Status::kOk) return status;
  if (const Status status = usable(peer); status != Status::kOk) return status;
  if (!can_access_peer(device, peer))
    return fail(Status::kNotSupported,
                "device " + std::to_string(device) + " has no way to peer " + std::to_string(peer));
  std::lock_guard guard(mutex_);
  std::vector<bool>::reference enabled = device_list_[static_cast<size_t>(device)]->peers[static_cast<size_t>(peer)];
  if (enabled) return fail(Status::kPeerAlreadyEnabled, "peer access is enabled already");
  enabled = true;
  return Status::kOk;
}

Status Machine::ipc_export(const void* address, bool base_only, bool named_importers_only, IpcName* name) {
  if (!settings_.ipc) return fail(Status::kNotSupported, "this machine is set to have no IPC");
  const auto found = find_allocation(reinterpret_cast<uint64_t>(address));
  if (found == nullptr || (base_only && found->base != reinterpret_cast<uint64_t>(address)))
    return fail(Status::kInvalidValue, "not the base of a device allocation");
  if (found->imported) return fail(Status::kInvalidValue, "imported memory can't be exported again");
  if (found->virtual_memory) return fail(Status::kInvalidValue, "memory of a virtual pool has no IPC handle");
  if (const Status status = usable(found->device); status != Status::kOk) return status;
  found->exported = true;
  found->sharing->only_named = named_importers_only;
  *name = {static_cast<uint32_t>(::getpid()), static_cast<uint32_t>(found->fd), found->sharing->token, ~0ull};
  return Status::kOk;
}

std::shared_ptr<Allocation> Machine::find_export(const IpcName& name) {
  std::lock_guard guard(mutex_);
  for (const auto& [base, allocation] : allocations_)
    if (allocation->exported && same(*allocation->sharing, name)) return allocation;
  return nullptr;
}

Status Machine::ipc_allow(const IpcName& name, int32_t pid) {
  const auto found = find_export(name);
  if (found == nullptr) return fail(Status::kInvalidHandle, "no export of this process has that name");
  for (auto& place : found->sharing->allowed) {
    int32_t none = 0;
    if (place == pid || place.compare_exchange_strong(none, pid)) return Status::kOk;
  }
  return fail(Status::kInvalidValue, "no more than " + std::to_string(Sharing::kAllowed) + " importers can be named");
}

Status Machine::ipc_import(int device, const IpcName& name, void** address) {
  if (!settings_.ipc) return fail(Status::kNotSupported, "this machine is set to have no IPC");
  if (const Status status = usable(device); status != Status::kOk) return status;
  if (name.pid == static_cast<uint32_t>(::getpid()))
    return fail(Status::kInvalidHandle, "a process can't import what it exported itself");
  const std::string path = "/proc/" + std::to_string(name.pid) + "/fd/" + std::to_string(name.fd);
  auto made = std::make_shared<Allocation>();
  made->imported = true;
  char target[64] = {};
  if (::readlink(path.c_str(), target, sizeof target - 1) < 0 ||
      std::string(target).rfind("/memfd:sage-emulator-device-memory", 0) != 0)
    return fail(Status::kInvalidHandle, "the exporter is gone or its memory is freed");
  made->fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  struct stat found = {};
  if (made->fd < 0 || ::fstat(made->fd, &found) != 0 || found.st_size <= static_cast<off_t>(kPage))
    return fail(Status::kInvalidHandle, std::string("the exporter's memory: ") + std::strerror(errno));
  made->mapped = static_cast<uint64_t>(found.st_size) - kPage;
  void* view = ::mmap(nullptr, made->mapped + kPage, PROT_READ | PROT_WRITE, MAP_SHARED, made->fd, 0);
  if (view == MAP_FAILED) return fail(Status::kOutOfMemory, std::string("mmap: ") + std::strerror(errno));
  made->view = static_cast<uint8_t*>(view);
  made->sharing = reinterpret_cast<Sharing*>(made->view + made->mapped);
  if (!same(*made->sharing, name)) return fail(Status::kInvalidHandle, "the memory behind the handle is freed");
  made->bytes = made->sharing->bytes;
  made->device = made->sharing->device;
  if (made->device >= devices() || (made->device != device && !can_access_peer(device, made->device)))
    return fail(Status::kNotSupported, "the exporter's device is out of this device's reach");
  const int32_t self = static_cast<int32_t>(::getpid());
  bool allowed = made->sharing->only_named == 0;
  for (auto& place : made->sharing->allowed) allowed = allowed || place == self;
  if (!allowed) return fail(Status::kNotPermitted, "the exporter did not name this process");
  void* seen = ::mmap(nullptr, made->mapped, PROT_NONE, MAP_SHARED, made->fd, 0);
  if (seen == MAP_FAILED) return fail(Status::kOutOfMemory, std::string("mmap: ") + std::strerror(errno));
  made->base = reinterpret_cast<uint64_t>(seen);
  std::lock_guard guard(mutex_);
  for (const auto& [base, allocation] : allocations_)
    if (allocation->imported && allocation->sharing->token == made->sharing->token)
      return fail(Status::kInUse, "this process has it open already");
  bool counted = false;
  for (auto& place : made->sharing->importers) {
    int32_t holder = place;
    if ((holder == 0 || !alive(holder)) && place.compare_exchange_strong(holder, self)) {
      counted = true;
      break;
    }
  }
  if (!counted) return fail(Status::kInvalidValue, "too many importers");
  allocations_[made->base] = made;
  *address = seen;
  return Status::kOk;
}

void Allocation::leave() {
  for (auto& place : sharing->importers) {
    int32_t self = static_cast<int32_t>(::getpid());
    if (place.compare_exchange_strong(self, 0)) break;
  }
}

Status Machine::ipc_close_import(void* address) {
  std::lock_guard guard(mutex_);
  const auto found = allocations_.find(reinterpret_cast<uint64_t>(address));
  if (found == allocations_.end() || !found->second->imported)
    return fail(Status::kInvalidValue, "not memory that was imported here");
  if (found->second->in_flight > 0) return fail(Status::kInUse, "closed while work that uses it is in flight");
  found->second->leave();
  allocations_.erase(found);
  return Status::kOk;
}

Status Machine::ipc_close(const IpcName& name) {
  void* imported = nullptr;
  {
    std::lock_guard guard(mutex_);
    for (const auto& [base, allocation] : allocations_)
      if (allocation->imported && same(*allocation->sharing, name)) imported = reinterpret_cast<void*>(base);
  }
  if (imported != nullptr) return ipc_close_import(imported);
  const auto found = find_export(name);
  if (found == nullptr) return fail(Status::kInvalidHandle, "no export or import of this process has that name");
  for (auto& importer : found->sharing->importers)
    if (importer != 0 && alive(importer))
      return fail(Status::kInUse, "process " + std::to_string(importer) + " has to close it first");
  found->exported = false;
  return Status::kOk;
}

}  // namespace sage_emulator
