// SPDX-License-Identifier: Apache-2.0
// CNRT's calls (libcnrt.so) and CNDrv's of kernels (libcndrv.so) over the emulated machine. Prototypes, types and
// constants are in vendor_abi.h, which is generated from vendors/cambricon/abi.py when this is compiled.
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "cuda_like.h"
#include "vendor_abi.h"

using sage_emulator::Copy;
using sage_emulator::IpcName;
using sage_emulator::Kind;
using sage_emulator::Machine;
using sage_emulator::Status;

namespace {

thread_local cnrtRet_t last_error = cnrtSuccess;
std::mutex acquired_mutex;
std::map<void*, bool> acquired;  // addresses whose handle was given out, which works once

// CNRT has no code for misaligned addresses, and one for all that goes wrong behind the call.
cnrtRet_t code(Status status) {
  switch (status) {
    case Status::kOk:
      return cnrtSuccess;
    case Status::kNotReady:
      return cnrtErrorNotReady;
    case Status::kInvalidDevice:
      return cnrtErrorDeviceInvalid;
    case Status::kInvalidHandle:
      return cnrtErrorInvalidResourceHandle;
    case Status::kWrongDevice:
      return cnrtErrorDevice;
    case Status::kOutOfMemory:
      return cnrtErrorNoMem;
    case Status::kWrongKind:
      return cnrtErrorMemcpyDirectionInvalid;
    case Status::kDmaError:
      return cnrtErrorQueue;
    case Status::kDeviceLost:
      return cnrtErrorNoDevice;
    case Status::kNotSupported:
    case Status::kPeerNotEnabled:
      return cnrtErrorNotSupport;
    case Status::kInUse:
      return cnrtErrorIllegalState;
    case Status::kNotPermitted:
      return cnrtErrorOpsNotPermitted;
    case Status::kInvalidImage:
      return CN_FATBIN_INVALID_IMAGE;
    case Status::kNotFound:
      return CN_ERROR_NOT_FOUND;
    default:
      return cnrtErrorArgsInvalid;
  }
}

cnrtRet_t noted(Status status) {
  const cnrtRet_t result = code(status);
  if (result != cnrtSuccess) last_error = result;
  return result;
}

using Cnrt = sage_emulator::CudaLike<noted>;

// A handle has 8 bytes: 22 bits of process (its limit on Linux), 20 of file descriptor, 22 of token.
constexpr uint64_t kTokenMask = (1ull << 22) - 1;

}  // namespace

extern "C" {

const char* cnrtGetErrorStr(cnrtRet_t) { return Machine::reason().c_str(); }

cnrtRet_t cnrtGetLastError() {
  const cnrtRet_t result = last_error;
  last_error = cnrtSuccess;
  return result;
}

cnrtRet_t cnrtGetDeviceCount(unsigned int* count) {
  *count = static_cast<unsigned int>(Machine::get().devices());
  return cnrtSuccess;
}

cnrtRet_t cnrtSetDevice(int device) {
  const Status status = Machine::get().usable(device);
  if (status == Status::kOk) Cnrt::current_device = device;
  return noted(status);
}

cnrtRet_t cnrtDeviceGetPCIBusId(char* id, int length, int device) {
  std::snprintf(id, static_cast<size_t>(length), "0000:%02x:00.0", 0xe0 + device);
  return noted(Machine::get().usable(device));
}

cnrtRet_t cnrtMemGetInfo(size_t* free, size_t* total) { return Cnrt::memory_info(free, total); }

cnrtRet_t cnrtMalloc(void** address, size_t size) { return Cnrt::alloc(address, size); }

cnrtRet_t cnrtFree(void* address) {
  return Cnrt::with_device([&](Machine& machine) {
    const Status status = machine.free(address);
    std::lock_guard guard(acquired_mutex);
    if (status == Status::kOk) acquired.erase(address);
    return status;
  });
}

cnrtRet_t cnrtHostMalloc(void** address, size_t size) { return Cnrt::host_alloc(address, size); }

cnrtRet_t cnrtFreeHost(void* address) { return Cnrt::host_free(address); }

cnrtRet_t cnrtPointerGetAttributes(cnrtPointerAttributes_t* found, const void* address) {
  return Cnrt::with_device([&](Machine& machine) {
    std::memset(found, 0, sizeof *found);
    const Status status = machine.range_of(address, &found->deviceBasePointer, &found->size);
    if (status != Status::kOk) return Status::kOk;  // memory that CNRT does not know is no error
    found->type = cnrtMemTypeDevice;
    found->device = Cnrt::current_device;
    found->devicePointer = const_cast<void*>(address);
    return status;
  });
}

cnrtRet_t cnrtMemcpyAsync_V3(void* to, void* from, size_t size, cnrtQueue_t queue, cnrtMemTransDir_t direction) {
  const Copy copy{reinterpret_cast<uint64_t>(to), reinterpret_cast<uint64_t>(from), size};
  const Kind kind = direction == cnrtMemcpyHostToDev   ? Kind::kHostToDevice
                    : direction == cnrtMemcpyDevToHost ? Kind::kDeviceToHost
                    : direction == cnrtMemcpyDevToDev  ? Kind::kDeviceToDevice
                                                       : Kind::kHostToHost;
  return Cnrt::with_device([&](Machine& machine) { return machine.submit(Cnrt::current_device, queue, {copy}, kind); });
}

cnrtRet_t cnrtMemcpyAsync_V2(void* to, void* from, size_t size, cnrtQueue_t queue, cnrtMemTransDir_t direction) {
  return cnrtMemcpyAsync_V3(to, from, size, queue, direction);
}

cnrtRet_t cnrtMemcpyAsync(void* to, void* from, size_t size, cnrtQueue_t queue, cnrtMemTransDir_t direction) {
  return cnrtMemcpyAsync_V3(to, from, size, queue, direction);
}

cnrtRet_t cnrtMemcpyPeerAsync(void* to, int to_device, void* from, int from_device, size_t size, cnrtQueue_t queue) {
  const Copy copy{reinterpret_cast<uint64_t>(to), reinterpret_cast<uint64_t>(from), size};
  return Cnrt::with_device([&](Machine& machine) {
    const int peer = to_device == Cnrt::current_device ? from_device : to_device;
    // What is reachable needs no call that enables it.
    const Status status = peer == Cnrt::current_device ? Status::kOk : machine.enable_peer(Cnrt::current_device, peer);
    if (status != Status::kOk && status != Status::kPeerAlreadyEnabled) return status;
    return machine.submit(Cnrt::current_device, queue, {copy}, Kind::kDeviceToDevice);
  });
}

cnrtRet_t cnrtGetPeerAccessibility(unsigned int* answer, int device, int peer) {
  Machine& machine = Machine::get();
  for (const int each : {device, peer})
    if (const Status status = machine.usable(each); status != Status::kOk) return noted(status);
  *answer = machine.can_access_peer(device, peer);
  return cnrtSuccess;
}

cnrtRet_t cnrtQueueCreate(cnrtQueue_t* queue) { return Cnrt::stream_create(queue); }

cnrtRet_t cnrtQueueDestroy(cnrtQueue_t queue) { return Cnrt::stream_destroy(queue); }

cnrtRet_t cnrtQueueSync(cnrtQueue_t queue) { return Cnrt::stream_synchronize(queue); }

cnrtRet_t cnrtQueueWaitNotifier(cnrtNotifier_t notifier, cnrtQueue_t queue, unsigned int) {
  return Cnrt::stream_wait(queue, notifier);
}

cnrtRet_t cnrtNotifierCreateWithFlags(cnrtNotifier_t* notifier, unsigned int) { return Cnrt::event_create(notifier); }

cnrtRet_t cnrtNotifierDestroy(cnrtNotifier_t notifier) { return Cnrt::event_destroy(notifier); }

cnrtRet_t cnrtPlaceNotifier(cnrtNotifier_t notifier, cnrtQueue_t queue) { return Cnrt::event_record(notifier, queue); }

cnrtRet_t cnrtQueryNotifier(cnrtNotifier_t notifier) { return Cnrt::event_query(notifier); }

cnrtRet_t cnrtWaitNotifier(cnrtNotifier_t notifier) { return Cnrt::event_synchronize(notifier); }

cnrtRet_t cnrtAcquireMemHandle(cnrtIpcMemHandle* handle, void* address) {
  return Cnrt::with_device([&](Machine& machine) {
    IpcName name{};
    std::lock_guard guard(acquired_mutex);
    if (acquired.count(address) != 0) return Machine::fail(Status::kInvalidValue, "its handle was acquired before");
    const Status status = machine.ipc_export(address, true, false, &name);
    if (status != Status::kOk) return status;
    if (name.fd >= 1u << 20) return Machine::fail(Status::kOutOfMemory, "too many files are open for a handle");
    acquired[address] = true;
    *handle = reinterpret_cast<void*>(uint64_t{name.pid} << 42 | uint64_t{name.fd} << 22 | (name.token & kTokenMask));
    return status;
  });
}

cnrtRet_t cnrtMapMemHandle(void** address, cnrtIpcMemHandle handle, int flags) {
  if (flags != 0) return noted(Status::kInvalidValue);
  const uint64_t value = reinterpret_cast<uint64_t>(handle);
  const IpcName name{static_cast<uint32_t>(value >> 42), static_cast<uint32_t>(value >> 22 & ((1u << 20) - 1)),
                     value & kTokenMask, kTokenMask};
  return Cnrt::with_device([&](Machine& machine) { return machine.ipc_import(Cnrt::current_device, name, address); });
}

cnrtRet_t cnrtUnMapMemHandle(void* address) { return Cnrt::ipc_close(address); }

CNresult cnDeviceGet(CNdev* handle, int ordinal) {
  *handle = static_cast<CNdev>(ordinal);
  return noted(Machine::get().usable(ordinal));
}

CNresult cnDeviceGetAttribute(int*, CNdevice_attribute, CNdev) {
  return noted(Machine::fail(Status::kNotSupported, "its kernels are the host's: no MLU's attributes fit"));
}

CNresult cnModuleLoadFatBinary(const void* image, CNmodule* module) { return Cnrt::module_load(module, image); }

CNresult cnModuleGetKernel(CNmodule module, const char* name, CNkernel* kernel) {
  return Cnrt::module_function(kernel, module, name);
}

CNresult cnInvokeKernel(CNkernel kernel, unsigned int x, unsigned int y, unsigned int z, KernelClass type,
                        unsigned int reserved, CNqueue queue, void** parameters, void** extra) {
  if (type != CN_KERNEL_CLASS_BLOCK || reserved != 0) return noted(Status::kInvalidValue);
  return Cnrt::launch(kernel, {x, y, z}, {1, 1, 1}, 0, queue, parameters, extra);
}

}  // extern "C"
