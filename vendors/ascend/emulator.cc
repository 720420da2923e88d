// SPDX-License-Identifier: Apache-2.0
// ACL's calls (libascendcl.so) over the emulated machine. Prototypes, types and constants are in
// vendor_abi.h, which is generated from vendors/ascend/abi.py when this is compiled.
#include <unistd.h>

#include <cstring>

#include "machine.h"
#include "vendor_abi.h"

using sage_emulator::Copy;
using sage_emulator::IpcName;
using sage_emulator::Kind;
using sage_emulator::Machine;
using sage_emulator::Status;

namespace {

constexpr size_t kKeyBytes = 65;
thread_local int32_t current_device = -1;
bool initialized = false;

aclError code(Status status) {
  switch (status) {
    case Status::kOk:
      return ACL_SUCCESS;
    case Status::kInvalidDevice:
      return ACL_ERROR_RT_INVALID_DEVICEID;
    case Status::kNoDeviceSet:
      return ACL_ERROR_RT_CONTEXT_NULL;
    case Status::kInvalidHandle:
      return ACL_ERROR_RT_INVALID_HANDLE;
    case Status::kWrongDevice:
      return ACL_ERROR_RT_STREAM_CONTEXT;
    case Status::kOutOfMemory:
      return ACL_ERROR_RT_MEMORY_ALLOCATION;
    case Status::kMisaligned:
      return ACL_ERROR_RT_ADDR_UNALIGNED;
    case Status::kTooLarge:
      return ACL_ERROR_RT_OVER_LIMIT;
    case Status::kAlreadyRegistered:
      return ACL_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    case Status::kNotRegistered:
      return ACL_ERROR_HOST_MEMORY_NOT_REGISTERED;
    case Status::kDmaError:
      return ACL_ERROR_RT_SYS_DMA;
    case Status::kDeviceLost:
      return ACL_ERROR_RT_LOST_HEARTBEAT;
    case Status::kNotSupported:
      return ACL_ERROR_RT_FEATURE_NOT_SUPPORT;
    case Status::kInUse:
      return ACL_ERROR_RT_IPC_ERROR;
    case Status::kNotPermitted:
      return ACL_ERROR_RT_NO_PERMISSION;
    default:
      return ACL_ERROR_RT_PARAM_INVALID;
  }
}

Status ready() {
  if (!initialized) return Machine::fail(Status::kNoDeviceSet, "aclInit was not called");
  if (current_device < 0) return Machine::fail(Status::kNoDeviceSet, "this thread called no aclrtSetDevice");
  return Machine::get().usable(current_device);
}

template <typename Call>
aclError with_device(Call call) {
  const Status status = ready();
  return code(status == Status::kOk ? call(Machine::get()) : status);
}

Kind kind_of(aclrtMemcpyKind kind) {
  switch (kind) {
    case ACL_MEMCPY_HOST_TO_DEVICE:
      return Kind::kHostToDevice;
    case ACL_MEMCPY_DEVICE_TO_HOST:
      return Kind::kDeviceToHost;
    case ACL_MEMCPY_DEVICE_TO_DEVICE:
      return Kind::kDeviceToDevice;
    default:
      return Kind::kHostToHost;  // which no stream takes
  }
}

IpcName name_of(const char* key) {
  IpcName name;
  std::memcpy(&name, key, sizeof name);
  name.token_mask = ~0ull;
  return name;
}

}  // namespace

extern "C" {

aclError aclInit(const char*) {
  if (initialized) return ACL_ERROR_REPEAT_INITIALIZE;
  initialized = true;
  return ACL_SUCCESS;
}

const char* aclGetRecentErrMsg() { return Machine::reason().c_str(); }
const char* aclrtGetSocName() { return "emulated"; }

aclError aclrtGetDeviceCount(uint32_t* count) {
  *count = static_cast<uint32_t>(Machine::get().devices());
  return *count == 0 ? ACL_ERROR_RT_NO_DEVICE : ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t device) {
  const Status status = Machine::get().usable(device);
  if (status == Status::kOk) current_device = device;
  return code(status);
}

aclError aclrtGetMemInfo(aclrtMemAttr attribute, size_t* free, size_t* total) {
  *free = *total = 0;
  if (attribute != ACL_HBM_MEM) return ACL_SUCCESS;  // it has no DDR
  return with_device([&](Machine& machine) { return machine.memory_info(current_device, free, total); });
}

aclError aclrtMalloc(void** address, size_t size, aclrtMemMallocPolicy) {
  return with_device([&](Machine& machine) { return machine.alloc(current_device, size, address); });
}

aclError aclrtFree(void* address) {
  return with_device([&](Machine& machine) { return machine.free(address); });
}

aclError aclrtMallocHost(void** address, size_t size) {
  return with_device([&](Machine& machine) { return machine.host_alloc(size, address); });
}

aclError aclrtFreeHost(void* address) {
  return with_device([&](Machine& machine) { return machine.host_free(address); });
}

aclError aclrtHostRegisterV2(void* address, uint64_t size, uint32_t flag) {
  if ((flag & ACL_HOST_REG_PINNED) == 0) return ACL_ERROR_RT_PARAM_INVALID;
  return with_device([&](Machine& machine) { return machine.host_register(address, size); });
}

aclError aclrtHostRegister(void* address, uint64_t size, aclrtHostRegisterType, void** device_address) {
  *device_address = address;
  return with_device([&](Machine& machine) { return machine.host_register(address, size); });
}

aclError aclrtHostUnregister(void* address) {
  return with_device([&](Machine& machine) { return machine.host_unregister(address); });
}

aclError aclrtMemGetAddressRange(void* address, void** base, size_t* size) {
  return with_device([&](Machine& machine) { return machine.range_of(address, base, size); });
}

aclError aclrtCreateStream(aclrtStream* stream) {
  return with_device([&](Machine& machine) { return machine.stream_create(current_device, stream); });
}

aclError aclrtDestroyStream(aclrtStream stream) {
  return with_device([&](Machine& machine) { return machine.stream_destroy(stream); });
}

aclError aclrtSynchronizeStream(aclrtStream stream) {
  return with_device([&](Machine& machine) { return machine.stream_synchronize(current_device, stream); });
}

aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) {
  return with_device([&](Machine& machine) { return machine.stream_wait(current_device, stream, event); });
}

aclError aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t count, aclrtMemcpyKind kind,
                          aclrtStream stream) {
  if (count > room) return ACL_ERROR_RT_PARAM_INVALID;
  const Copy copy{reinterpret_cast<uint64_t>(to), reinterpret_cast<uint64_t>(from), count};
  return with_device([&](Machine& machine) { return machine.submit(current_device, stream, {copy}, kind_of(kind)); });
}

aclError aclrtMemcpyBatchAsync(void** to, size_t* rooms, void** from, size_t* sizes, size_t count,
                               aclrtMemcpyBatchAttr* attributes, size_t* first, size_t attribute_count, size_t* failed,
                               aclrtStream stream) {
  *failed = SIZE_MAX;
  if (attribute_count != 1 || first[0] != 0 || count == 0) return ACL_ERROR_RT_PARAM_INVALID;
  const bool to_host = attributes->dstLoc.type == ACL_MEM_LOCATION_TYPE_HOST;
  const bool from_host = attributes->srcLoc.type == ACL_MEM_LOCATION_TYPE_HOST;
  const Kind kind = to_host ? (from_host ? Kind::kHostToHost : Kind::kDeviceToHost)
                            : (from_host ? Kind::kHostToDevice : Kind::kDeviceToDevice);
  std::vector<Copy> copies;
  for (size_t i = 0; i < count; ++i) {
    if (sizes[i] > rooms[i]) return *failed = i, ACL_ERROR_RT_PARAM_INVALID;
    copies.push_back({reinterpret_cast<uint64_t>(to[i]), reinterpret_cast<uint64_t>(from[i]), sizes[i]});
  }
  return with_device([&](Machine& machine) { return machine.submit(current_device, stream, copies, kind); });
}

aclError aclrtDeviceCanAccessPeer(int32_t* answer, int32_t device, int32_t peer) {
  Machine& machine = Machine::get();
  if (const Status status = machine.usable(device); status != Status::kOk) return code(status);
  if (const Status status = machine.usable(peer); status != Status::kOk) return code(status);
  *answer = machine.can_access_peer(device, peer);
  return ACL_SUCCESS;
}

aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t flags) {
  if (flags != 0) return ACL_ERROR_RT_PARAM_INVALID;
  return with_device([&](Machine& machine) {
    const Status status = machine.enable_peer(current_device, peer);
    return status == Status::kPeerAlreadyEnabled ? Status::kOk : status;
  });
}

aclError aclrtCreateEvent(aclrtEvent* event) {
  return with_device([&](Machine& machine) { return machine.event_create(current_device, event); });
}

aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t flag) {
  if ((flag & ACL_EVENT_CAPTURE_STREAM_PROGRESS) == 0) return ACL_ERROR_RT_PARAM_INVALID;
  return aclrtCreateEvent(event);
}

aclError aclrtDestroyEvent(aclrtEvent event) {
  return with_device([&](Machine& machine) { return machine.event_destroy(event); });
}

aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
  return with_device([&](Machine& machine) { return machine.event_record(current_device, event, stream); });
}

aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus* answer) {
  return with_device([&](Machine& machine) {
    const Status status = machine.event_query(event);
    *answer = status == Status::kNotReady ? ACL_EVENT_RECORDED_STATUS_NOT_READY : ACL_EVENT_RECORDED_STATUS_COMPLETE;
    return status == Status::kNotReady ? Status::kOk : status;
  });
}

aclError aclrtSynchronizeEvent(aclrtEvent event) {
  return with_device([&](Machine& machine) { return machine.event_synchronize(event); });
}

aclError aclrtDeviceGetBareTgid(int32_t* pid) {
  *pid = static_cast<int32_t>(::getpid());
  return ACL_SUCCESS;
}

aclError aclrtIpcMemGetExportKey(void* address, size_t, char* key, size_t length, uint64_t flags) {
  if (length != kKeyBytes) return ACL_ERROR_RT_PARAM_INVALID;
  return with_device([&](Machine& machine) {
    IpcName name;
    const bool named = (flags & ACL_RT_IPC_MEM_EXPORT_FLAG_DISABLE_PID_VALIDATION) == 0;
    const Status status = machine.ipc_export(address, true, named, &name);
    std::memset(key, 0, length);
    if (status == Status::kOk) std::memcpy(key, &name, sizeof name);
    return status;
  });
}

aclError aclrtIpcMemSetImportPid(const char* key, int32_t* pids, size_t count) {
  return with_device([&](Machine& machine) {
    for (size_t i = 0; i < count; ++i)
      if (const Status status = machine.ipc_allow(name_of(key), pids[i]); status != Status::kOk) return status;
    return Status::kOk;
  });
}

aclError aclrtIpcMemImportByKey(void** address, const char* key, uint64_t) {
  return with_device([&](Machine& machine) { return machine.ipc_import(current_device, name_of(key), address); });
}

aclError aclrtBinaryLoadFromData(const void* data, size_t length, const aclrtBinaryLoadOptions* options,
                                 aclrtBinHandle* binary) {
  if (length == 0) return code(Machine::fail(Status::kInvalidImage, "the binary is empty"));
  for (size_t i = 0; options != nullptr && i < options->numOpt; ++i) {
    const auto& option = static_cast<const aclrtBinaryLoadOption*>(options->options)[i];
    if (option.type == ACL_RT_BINARY_LOAD_OPT_MAGIC && option.value[0] != ACL_RT_BINARY_MAGIC_ELF_VECTOR_CORE)
      return code(Machine::fail(Status::kInvalidValue, "the binary is not for vector cores"));
  }
  return with_device([&](Machine& machine) { return machine.module_load(current_device, data, binary); });
}

aclError aclrtBinaryGetFunction(aclrtBinHandle binary, const char* name, aclrtFuncHandle* function) {
  return with_device([&](Machine& machine) { return machine.module_function(binary, name, function); });
}

// The kernel's one argument is the address of data that stand among the arguments; the machine copies them.
aclError aclrtLaunchKernelWithHostArgs(aclrtFuncHandle function, uint32_t blocks, aclrtStream stream,
                                       aclrtLaunchKernelCfg* settings, void* arguments, size_t size,
                                       aclrtPlaceHolderInfo* places, size_t place_count) {
  if (settings != nullptr || place_count != 1 || places->addrOffset != 0 || places->dataOffset < sizeof(uint64_t) ||
      places->dataOffset >= size)
    return code(Machine::fail(Status::kInvalidValue, "a kernel takes one address, of data behind it"));
  void* parameters[] = {static_cast<uint8_t*>(arguments) + places->dataOffset};
  const size_t bytes = size - places->dataOffset;
  return with_device([&](Machine& machine) {
    if (const Status status = machine.takes(function, bytes); status != Status::kOk) return status;
    return machine.launch(current_device, function, {blocks, 1, 1}, {1, 1, 1}, 0, stream, parameters, nullptr);
  });
}

// One call for both sides of a key: the importer's first, then the exporter's.
aclError aclrtIpcMemClose(const char* key) {
  return with_device([&](Machine& machine) { return machine.ipc_close(name_of(key)); });
}

}  // extern "C"
