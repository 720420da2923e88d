// SPDX-License-Identifier: Apache-2.0
// HIP's calls (libgalaxyhip.so.5) over the emulated machine. Prototypes, types and constants are in
// vendor_abi.h, which is generated from vendors/hygon/abi.py when this is compiled.
#include <cstdio>
#include <cstring>

#include "machine.h"
#include "vendor_abi.h"

using sage_emulator::Copy;
using sage_emulator::IpcName;
using sage_emulator::Kind;
using sage_emulator::Machine;
using sage_emulator::Status;

namespace {

thread_local int current_device = 0;

hipError_t code(Status status) {
  switch (status) {
    case Status::kOk:
      return hipSuccess;
    case Status::kNotReady:
      return hipErrorNotReady;
    case Status::kInvalidDevice:
      return hipErrorInvalidDevice;
    case Status::kInvalidHandle:
    case Status::kWrongDevice:
      return hipErrorInvalidHandle;
    case Status::kOutOfMemory:
      return hipErrorOutOfMemory;
    case Status::kWrongKind:
      return hipErrorInvalidMemcpyDirection;
    case Status::kAlreadyRegistered:
      return hipErrorHostMemoryAlreadyRegistered;
    case Status::kNotRegistered:
      return hipErrorHostMemoryNotRegistered;
    case Status::kDmaError:
      return hipErrorIllegalAddress;
    case Status::kDeviceLost:
      return hipErrorRuntimeOther;
    case Status::kNotSupported:
      return hipErrorNotSupported;
    case Status::kPeerNotEnabled:
      return hipErrorPeerAccessNotEnabled;
    case Status::kPeerAlreadyEnabled:
      return hipErrorPeerAccessAlreadyEnabled;
    case Status::kInUse:
      return hipErrorIllegalState;
    default:
      return hipErrorInvalidValue;
  }
}

template <typename Call>
hipError_t with_device(Call call) {
  Machine& machine = Machine::get();
  const Status status = machine.usable(current_device);
  return code(status == Status::kOk ? call(machine) : status);
}

Kind kind_of(hipMemcpyKind kind) {
  switch (kind) {
    case hipMemcpyHostToDevice:
      return Kind::kHostToDevice;
    case hipMemcpyDeviceToHost:
      return Kind::kDeviceToHost;
    case hipMemcpyDeviceToDevice:
      return Kind::kDeviceToDevice;
    default:
      return Kind::kHostToHost;
  }
}

}  // namespace

extern "C" {

const char* hipGetErrorString(hipError_t) { return Machine::reason().c_str(); }

hipError_t hipGetDeviceCount(int* count) {
  *count = Machine::get().devices();
  return *count == 0 ? hipErrorNoDevice : hipSuccess;
}

hipError_t hipSetDevice(int device) {
  const Status status = Machine::get().usable(device);
  if (status == Status::kOk) current_device = device;
  return code(status);
}

hipError_t hipDeviceGetName(char* name, int length, hipDevice_t device) {
  std::snprintf(name, static_cast<size_t>(length), "emulated DCU");
  return code(Machine::get().usable(device));
}

hipError_t hipDeviceGetPCIBusId(char* id, int length, int device) {
  std::snprintf(id, static_cast<size_t>(length), "0000:%02x:00.0", 0xe0 + device);
  return code(Machine::get().usable(device));
}

hipError_t hipMemGetInfo(size_t* free, size_t* total) {
  return with_device([&](Machine& machine) { return machine.memory_info(current_device, free, total); });
}

hipError_t hipMalloc(void** address, size_t size) {
  return with_device([&](Machine& machine) { return machine.alloc(current_device, size, address); });
}

hipError_t hipFree(void* address) {
  return with_device([&](Machine& machine) { return machine.free(address); });
}

hipError_t hipHostMalloc(void** address, size_t size, unsigned int) {
  return with_device([&](Machine& machine) { return machine.host_alloc(size, address); });
}

hipError_t hipHostFree(void* address) {
  return with_device([&](Machine& machine) { return machine.host_free(address); });
}

hipError_t hipHostRegister(void* address, size_t size, unsigned int) {
  return with_device([&](Machine& machine) { return machine.host_register(address, size); });
}

hipError_t hipHostUnregister(void* address) {
  return with_device([&](Machine& machine) { return machine.host_unregister(address); });
}

hipError_t hipMemGetAddressRange(hipDeviceptr_t* base, size_t* size, hipDeviceptr_t address) {
  return with_device([&](Machine& machine) { return machine.range_of(address, base, size); });
}

hipError_t hipStreamCreateWithFlags(hipStream_t* stream, unsigned int) {
  return with_device([&](Machine& machine) { return machine.stream_create(current_device, stream); });
}

hipError_t hipStreamDestroy(hipStream_t stream) {
  return with_device([&](Machine& machine) { return machine.stream_destroy(stream); });
}

hipError_t hipStreamSynchronize(hipStream_t stream) {
  return with_device([&](Machine& machine) { return machine.stream_synchronize(current_device, stream); });
}

hipError_t hipStreamWaitEvent(hipStream_t stream, hipEvent_t event, unsigned int) {
  return with_device([&](Machine& machine) { return machine.stream_wait(current_device, stream, event); });
}

hipError_t hipMemcpyAsync(void* to, const void* from, size_t size, hipMemcpyKind kind, hipStream_t stream) {
  const Copy copy{reinterpret_cast<uint64_t>(to), reinterpret_cast<uint64_t>(from), size};
  return with_device([&](Machine& machine) { return machine.submit(current_device, stream, {copy}, kind_of(kind)); });
}

hipError_t hipMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, hipStream_t stream) {
  const Copy copy{reinterpret_cast<uint64_t>(to), reinterpret_cast<uint64_t>(from), size};
  return with_device(
      [&](Machine& machine) { return machine.submit(current_device, stream, {copy}, Kind::kDeviceToDevice, true); });
}

hipError_t hipDeviceCanAccessPeer(int* answer, int device, int peer) {
  Machine& machine = Machine::get();
  for (const int each : {device, peer})
    if (const Status status = machine.usable(each); status != Status::kOk) return code(status);
  *answer = machine.can_access_peer(device, peer);
  return hipSuccess;
}

hipError_t hipDeviceEnablePeerAccess(int peer, unsigned int) {
  return with_device([&](Machine& machine) { return machine.enable_peer(current_device, peer); });
}

hipError_t hipEventCreateWithFlags(hipEvent_t* event, unsigned int) {
  return with_device([&](Machine& machine) { return machine.event_create(current_device, event); });
}

hipError_t hipEventDestroy(hipEvent_t event) {
  return with_device([&](Machine& machine) { return machine.event_destroy(event); });
}

hipError_t hipEventRecord(hipEvent_t event, hipStream_t stream) {
  return with_device([&](Machine& machine) { return machine.event_record(current_device, event, stream); });
}

hipError_t hipEventQuery(hipEvent_t event) {
  return with_device([&](Machine& machine) { return machine.event_query(event); });
}

hipError_t hipEventSynchronize(hipEvent_t event) {
  return with_device([&](Machine& machine) { return machine.event_synchronize(event); });
}

hipError_t hipIpcGetMemHandle(hipIpcMemHandle_t* handle, void* address) {
  return with_device([&](Machine& machine) {
    IpcName name{};
    const Status status = machine.ipc_export(address, false, false, &name);
    std::memset(handle, 0, sizeof *handle);
    if (status == Status::kOk) std::memcpy(handle, &name, sizeof name);
    return status;
  });
}

hipError_t hipIpcOpenMemHandle(void** address, hipIpcMemHandle_t handle, unsigned int) {
  IpcName name;
  std::memcpy(&name, &handle, sizeof name);
  name.token_mask = ~0ull;
  return with_device([&](Machine& machine) { return machine.ipc_import(current_device, name, address); });
}

hipError_t hipIpcCloseMemHandle(void* address) {
  return with_device([&](Machine& machine) { return machine.ipc_close_import(address); });
}

}  // extern "C"
