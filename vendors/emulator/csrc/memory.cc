// SPDX-License-Identifier: Apache-2.0
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <new>
#include <sstream>

#include "machine.h"

namespace sage_emulator {
namespace {

const uint64_t kPage = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
thread_local std::string last_reason;

uint64_t rounded(uint64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

bool same_machine(const Settings& one, const Settings& other) {
  return one.devices == other.devices && one.memory_bytes == other.memory_bytes &&
         one.dma_alignment_bytes == other.dma_alignment_bytes && one.max_transfer_bytes == other.max_transfer_bytes &&
         one.pinned_only == other.pinned_only && one.ipc == other.ipc && one.peer_access == other.peer_access;
}

void protect(uint64_t address, uint64_t bytes, int protection) {
  if (::mprotect(reinterpret_cast<void*>(address), bytes, protection) == 0) return;
  std::perror("emulator: mprotect of device memory");
  std::abort();
}

template <typename Map>
auto containing(Map& map, uint64_t address) {
  auto found = map.upper_bound(address);
  if (found == map.begin()) return map.end();
  --found;
  return address < found->first + found->second->bytes ? found : map.end();
}

}  // namespace

std::string hex(uint64_t value) {
  std::ostringstream text;
  text << "0x" << std::hex << value;
  return text.str();
}

Machine& Machine::get() {
  static Machine* machine = new Machine;  // never destroyed: threads may run while the process ends
  return *machine;
}

const std::string& Machine::reason() { return last_reason; }

Status Machine::fail(Status status, const std::string& reason) {
  last_reason = "emulated: " + reason;
  return status;
}

std::string Machine::configure(const std::string& text) {
  std::lock_guard guard(mutex_);
  std::lock_guard live_guard(live_mutex_);
  Settings wanted = settings_;
  const std::string wrong = parse_settings(text, &wanted);
  if (!wrong.empty()) return wrong;
  if (configured_) {
    if (!same_machine(wanted, settings_)) return "only rates, latency, held, virtual_memory and faults can change";
    std::copy(std::begin(wanted.bytes_per_second), std::end(wanted.bytes_per_second), settings_.bytes_per_second);
    settings_.latency_seconds = wanted.latency_seconds;
    settings_.held = wanted.held;
    settings_.virtual_memory = wanted.virtual_memory;
    settings_.out_of_memory_after_bytes = wanted.out_of_memory_after_bytes;
    settings_.dma_error_after_copies = wanted.dma_error_after_copies;
    settings_.device_lost_after_copies = wanted.device_lost_after_copies;
  } else {
    settings_ = wanted;
    for (int64_t i = 0; i < wanted.devices; ++i) {
      device_list_.push_back(std::make_unique<Device>());
      device_list_.back()->peers.assign(static_cast<size_t>(wanted.devices), false);
    }
  }
  configured_ = true;
  if (wanted.count_copies_anew) copies_begun_ = 0;
  hold_changed_.notify_all();
  return "";
}

Status Machine::usable(int device) {
  if (device < 0 || device >= devices())
    return fail(Status::kInvalidDevice,
                "device " + std::to_string(device) + " of " + std::to_string(devices()) + " does not exist");
  if (device_list_[static_cast<size_t>(device)]->lost)
    return fail(Status::kDeviceLost, "device " + std::to_string(device) + " is lost");
  return Status::kOk;
}

Status Machine::memory_info(int device, uint64_t* free, uint64_t* total) {
  if (const Status status = usable(device); status != Status::kOk) return status;
  std::lock_guard guard(mutex_);
  *total = static_cast<uint64_t>(settings_.memory_bytes);
  *free = *total - std::min(*total, device_list_[static_cast<size_t>(device)]->used);
  return Status::kOk;
}

Status Machine::alloc(int device, uint64_t bytes, void** address) {
  if (const Status status = usable(device); status != Status::kOk) return status;
  if (bytes == 0) return fail(Status::kInvalidValue, "an allocation of 0 bytes");
  std::lock_guard guard(mutex_);
  Device& at = *device_list_[static_cast<size_t>(device)];
  const uint64_t total = static_cast<uint64_t>(settings_.memory_bytes);
  const int64_t limit = settings_.out_of_memory_after_bytes;
  if (bytes > total || at.used + rounded(bytes) > total ||
      (limit >= 0 && at.allocated + bytes > static_cast<uint64_t>(limit)))
    return fail(Status::kOutOfMemory, std::to_string(bytes) + " bytes wanted, " + std::to_string(at.used) + " of " +
                                          std::to_string(total) + " used");
  auto made = std::make_shared<Allocation>();
  made->bytes = bytes;
  made->mapped = rounded(bytes);
  made->device = device;
  made->virtual_memory = settings_.virtual_memory;
  made->fd = ::memfd_create("sage-emulator-device-memory", MFD_CLOEXEC);
  if (made->fd < 0 || ::ftruncate(made->fd, static_cast<off_t>(made->mapped + kPage)) != 0)
    return fail(Status::kOutOfMemory, std::string("memfd: ") + std::strerror(errno));
  void* seen = ::mmap(nullptr, made->mapped, PROT_NONE, MAP_SHARED, made->fd, 0);
  void* view = ::mmap(nullptr, made->mapped + kPage, PROT_READ | PROT_WRITE, MAP_SHARED, made->fd, 0);
  if (seen != MAP_FAILED) made->base = reinterpret_cast<uint64_t>(seen);
  if (view != MAP_FAILED) made->view = static_cast<uint8_t*>(view);
  if (seen == MAP_FAILED || view == MAP_FAILED)
    return fail(Status::kOutOfMemory, std::string("mmap: ") + std::strerror(errno));
  made->sharing = new (made->view + made->mapped) Sharing{};
  if (::getrandom(&made->sharing->token, sizeof(uint64_t), 0) != sizeof(uint64_t))
    return fail(Status::kOutOfMemory, std::string("getrandom: ") + std::strerror(errno));
  made->sharing->bytes = bytes;
  made->sharing->device = device;
  at.used += made->mapped;
  at.allocated += bytes;
  allocations_[made->base] = made;
  *address = seen;
  return Status::kOk;
}

Allocation::~Allocation() {
  if (base != 0) ::munmap(reinterpret_cast<void*>(base), mapped);
  if (view != nullptr) ::munmap(view, mapped + kPage);
  if (fd >= 0) ::close(fd);
}

void Allocation::open_to_kernel() {
  if (kernels++ == 0) protect(base, mapped, PROT_READ | PROT_WRITE);
}

void Allocation::close_to_kernel() {
  if (--kernels > 0) return;
  // The bytes are the memfd's. Without this, each later launch would pay for all pages that any kernel ever touched.
  ::madvise(reinterpret_cast<void*>(base), mapped, MADV_DONTNEED);
  protect(base, mapped, PROT_NONE);
}

Status Machine::free(void* address) {
  std::lock_guard guard(mutex_);
  const auto found = allocations_.find(reinterpret_cast<uint64_t>(address));
  if (found == allocations_.end() || found->second->imported)
    return fail(Status::kInvalidValue, hex(reinterpret_cast<uint64_t>(address)) + " was not allocated here");
  if (found->second->in_flight > 0) return fail(Status::kInUse, "freed while work that uses it is in flight");
  if (device_list_[static_cast<size_t>(found->second->device)]->lost)
    return fail(Status::kDeviceLost, "the device is lost");
  for (auto& importer : found->second->sharing->importers)
    if (importer != 0 && ::access(("/proc/" + std::to_string(importer)).c_str(), F_OK) == 0)
      return fail(Status::kInUse, "freed while process " + std::to_string(importer) + " has it open");
  device_list_[static_cast<size_t>(found->second->device)]->used -= found->second->mapped;
  allocations_.erase(found);
  return Status::kOk;
}

void Machine::forget_memory() {
  std::map<uint64_t, std::shared_ptr<Allocation>> forgotten;
  std::lock_guard guard(mutex_);
  forgotten.swap(allocations_);
  for (const auto& [base, allocation] : forgotten)
    if (allocation->imported) allocation->leave();
  for (const auto& device : device_list_) device->used = 0;
}

std::shared_ptr<Allocation> Machine::find_allocation(uint64_t address) {
  std::lock_guard guard(mutex_);
  const auto found = containing(allocations_, address);
  return found == allocations_.end() ? nullptr : found->second;
}

std::shared_ptr<HostRange> Machine::find_host(uint64_t address) {
  std::lock_guard guard(mutex_);
  const auto found = containing(host_, address);
  return found == host_.end() ? nullptr : found->second;
}

Status Machine::range_of(const void* address, void** base, uint64_t* bytes) {
  const auto found = find_allocation(reinterpret_cast<uint64_t>(address));
  if (found == nullptr) return fail(Status::kInvalidValue, "the address lies in no device allocation");
  *base = reinterpret_cast<void*>(found->base);
  *bytes = found->bytes;
  return Status::kOk;
}

Status Machine::host_alloc(uint64_t bytes, void** address) {
  if (bytes == 0) return fail(Status::kInvalidValue, "an allocation of 0 bytes");
  void* memory = ::mmap(nullptr, rounded(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return fail(Status::kOutOfMemory, std::string("mmap: ") + std::strerror(errno));
  auto range = std::make_shared<HostRange>();
  range->base = reinterpret_cast<uint64_t>(memory);
  range->bytes = bytes;
  range->owned = true;
  std::lock_guard guard(mutex_);
  host_[range->base] = range;
  *address = memory;
  return Status::kOk;
}

Status Machine::host_free(void* address) {
  std::lock_guard guard(mutex_);
  const auto found = host_.find(reinterpret_cast<uint64_t>(address));
  if (found == host_.end() || !found->second->owned)
    return fail(Status::kInvalidValue, "not pinned memory that was allocated here");
  if (found->second->in_flight > 0) return fail(Status::kInUse, "freed while work that uses it is in flight");
  ::munmap(address, rounded(found->second->bytes));
  host_.erase(found);
  return Status::kOk;
}

Status Machine::host_register(void* address, uint64_t bytes) {
  const uint64_t base = reinterpret_cast<uint64_t>(address);
  if (bytes == 0 || base == 0) return fail(Status::kInvalidValue, "an empty range");
  if (find_allocation(base) != nullptr) return fail(Status::kInvalidValue, "device memory can't be registered");
  const uint64_t first = base / kPage * kPage;
  std::vector<unsigned char> pages((base + bytes - first + kPage - 1) / kPage);
  if (::mincore(reinterpret_cast<void*>(first), base + bytes - first, pages.data()) != 0)
    return fail(Status::kInvalidValue, "the range is not mapped in this process");
  std::lock_guard guard(mutex_);
  const auto after = host_.lower_bound(base + bytes);
  if (after != host_.begin()) {
    const auto& before = *std::prev(after)->second;
    if (before.base + before.bytes > base)
      return fail(Status::kAlreadyRegistered, "a part of the range is pinned already");
  }
  auto range = std::make_shared<HostRange>();
  range->base = base;
  range->bytes = bytes;
  host_[base] = range;
  return Status::kOk;
}

Status Machine::host_unregister(void* address) {
  std::lock_guard guard(mutex_);
  const auto found = host_.find(reinterpret_cast<uint64_t>(address));
  if (found == host_.end() || found->second->owned)
    return fail(Status::kNotRegistered, "the address is not registered");
  if (found->second->in_flight > 0) return fail(Status::kInUse, "unregistered while work that uses it is in flight");
  host_.erase(found);
  return Status::kOk;
}

}  // namespace sage_emulator
