// SPDX-License-Identifier: Apache-2.0
// The CUDA driver's calls (libcuda.so.1) over the emulated machine. Prototypes, types and constants are
// in vendor_abi.h, which is generated from vendors/nvidia/abi.py when this is compiled.
#include <cstdio>
#include <cstring>

#include "machine.h"
#include "vendor_abi.h"

using sage_emulator::Copy;
using sage_emulator::Dimensions;
using sage_emulator::IpcName;
using sage_emulator::Kind;
using sage_emulator::Machine;
using sage_emulator::Status;

namespace {

bool initialized = false;
char contexts[64];  // the address of an element is the handle of that device's primary context
thread_local std::vector<int> context_stack;

CUresult code(Status status) {
  switch (status) {
    case Status::kOk:
      return CUDA_SUCCESS;
    case Status::kNotReady:
      return CUDA_ERROR_NOT_READY;
    case Status::kInvalidDevice:
      return CUDA_ERROR_INVALID_DEVICE;
    case Status::kNoDeviceSet:
      return CUDA_ERROR_INVALID_CONTEXT;
    case Status::kInvalidHandle:
    case Status::kWrongDevice:
      return CUDA_ERROR_INVALID_HANDLE;
    case Status::kOutOfMemory:
      return CUDA_ERROR_OUT_OF_MEMORY;
    case Status::kMisaligned:
      return CUDA_ERROR_MISALIGNED_ADDRESS;
    case Status::kAlreadyRegistered:
      return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    case Status::kNotRegistered:
      return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    case Status::kDmaError:
      return CUDA_ERROR_ILLEGAL_ADDRESS;
    case Status::kDeviceLost:
      return CUDA_ERROR_DEVICE_UNAVAILABLE;
    case Status::kNotSupported:
      return CUDA_ERROR_NOT_SUPPORTED;
    case Status::kPeerNotEnabled:
      return CUDA_ERROR_PEER_ACCESS_NOT_ENABLED;
    case Status::kPeerAlreadyEnabled:
      return CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED;
    case Status::kInUse:
      return CUDA_ERROR_ILLEGAL_STATE;
    case Status::kNotPermitted:
      return CUDA_ERROR_NOT_PERMITTED;
    case Status::kInvalidImage:
      return CUDA_ERROR_INVALID_IMAGE;
    case Status::kNotFound:
      return CUDA_ERROR_NOT_FOUND;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

// The device of a context's handle, -1 for no context.
int device_of(CUcontext context) {
  for (int device = 0; device < Machine::get().devices(); ++device)
    if (context == contexts + device) return device;
  return -1;
}

template <typename Call>
CUresult with_device(Call call) {
  if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
  if (context_stack.empty()) return code(Machine::fail(Status::kNoDeviceSet, "no context is current"));
  Machine& machine = Machine::get();
  const int device = context_stack.back();
  const Status status = machine.usable(device);
  return code(status == Status::kOk ? call(machine, device) : status);
}

CUresult submit(CUdeviceptr to, CUdeviceptr from, size_t size, Kind kind, CUstream stream) {
  return with_device(
      [&](Machine& machine, int device) { return machine.submit(device, stream, {Copy{to, from, size}}, kind, true); });
}

CUresult submit_batch(const CUdeviceptr* to, const CUdeviceptr* from, const size_t* sizes, size_t count,
                      const CUmemcpyAttributes* attributes, const size_t* first, size_t attribute_count,
                      CUstream stream) {
  if (attribute_count != 1 || first[0] != 0 || count == 0 ||
      attributes->srcAccessOrder != CU_MEMCPY_SRC_ACCESS_ORDER_STREAM)
    return CUDA_ERROR_INVALID_VALUE;
  std::vector<Copy> copies;
  for (size_t i = 0; i < count; ++i) copies.push_back({to[i], from[i], sizes[i]});
  return with_device(
      [&](Machine& machine, int device) { return machine.submit(device, stream, copies, Kind::kInfer, true); });
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned int flags) {
  initialized = true;
  if (Machine::get().devices() == 0) return CUDA_ERROR_NO_DEVICE;
  return flags == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult, const char** text) {
  *text = Machine::reason().c_str();
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  *count = Machine::get().devices();
  return initialized ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

CUresult cuDeviceGet(CUdevice* handle, int ordinal) {
  *handle = ordinal;
  return code(Machine::get().usable(ordinal));
}

CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
  std::snprintf(name, static_cast<size_t>(length), "emulated GPU");
  return code(Machine::get().usable(device));
}

CUresult cuDeviceGetPCIBusId(char* id, int length, CUdevice device) {
  std::snprintf(id, static_cast<size_t>(length), "0000:%02X:00.0", 0xe0 + device);
  return code(Machine::get().usable(device));
}

CUresult cuDeviceGetAttribute(int*, CUdevice_attribute, CUdevice) {
  return code(Machine::fail(Status::kNotSupported, "its kernels are the host's: no GPU's attributes fit"));
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  const Status status = Machine::get().usable(device);
  if (status == Status::kOk) *context = contexts + device;
  return code(status);
}

CUresult cuCtxPushCurrent(CUcontext context) {
  const int device = device_of(context);
  if (device < 0) return CUDA_ERROR_INVALID_CONTEXT;
  context_stack.push_back(device);
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext* context) {
  if (context_stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *context = contexts + context_stack.back();
  context_stack.pop_back();
  return CUDA_SUCCESS;
}

CUresult cuMemGetInfo(size_t* free, size_t* total) {
  return with_device([&](Machine& machine, int device) { return machine.memory_info(device, free, total); });
}

CUresult cuMemAlloc(CUdeviceptr* address, size_t size) {
  return with_device([&](Machine& machine, int device) {
    void* found = nullptr;
    const Status status = machine.alloc(device, size, &found);
    *address = reinterpret_cast<CUdeviceptr>(found);
    return status;
  });
}

CUresult cuMemFree(CUdeviceptr address) {
  return with_device([&](Machine& machine, int) { return machine.free(reinterpret_cast<void*>(address)); });
}

CUresult cuMemHostAlloc(void** address, size_t size, unsigned int) {
  return with_device([&](Machine& machine, int) { return machine.host_alloc(size, address); });
}

CUresult cuMemFreeHost(void* address) {
  return with_device([&](Machine& machine, int) { return machine.host_free(address); });
}

CUresult cuMemHostRegister(void* address, size_t size, unsigned int) {
  return with_device([&](Machine& machine, int) { return machine.host_register(address, size); });
}

CUresult cuMemHostUnregister(void* address) {
  return with_device([&](Machine& machine, int) { return machine.host_unregister(address); });
}

CUresult cuMemGetAddressRange(CUdeviceptr* base, size_t* size, CUdeviceptr address) {
  return with_device([&](Machine& machine, int) {
    void* found = nullptr;
    const Status status = machine.range_of(reinterpret_cast<void*>(address), &found, size);
    *base = reinterpret_cast<CUdeviceptr>(found);
    return status;
  });
}

CUresult cuStreamCreate(CUstream* stream, unsigned int) {
  return with_device([&](Machine& machine, int device) { return machine.stream_create(device, stream); });
}

CUresult cuStreamDestroy(CUstream stream) {
  return with_device([&](Machine& machine, int) { return machine.stream_destroy(stream); });
}

CUresult cuStreamSynchronize(CUstream stream) {
  return with_device([&](Machine& machine, int device) { return machine.stream_synchronize(device, stream); });
}

CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int) {
  return with_device([&](Machine& machine, int device) { return machine.stream_wait(device, stream, event); });
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t size, CUstream stream) {
  return submit(to, reinterpret_cast<CUdeviceptr>(from), size, Kind::kHostToDevice, stream);
}

CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t size, CUstream stream) {
  return submit(reinterpret_cast<CUdeviceptr>(to), from, size, Kind::kDeviceToHost, stream);
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
  return submit(to, from, size, Kind::kDeviceToDevice, stream);
}

CUresult cuMemcpyPeerAsync(CUdeviceptr to, CUcontext to_context, CUdeviceptr from, CUcontext from_context, size_t size,
                           CUstream stream) {
  if (device_of(to_context) < 0 || device_of(from_context) < 0) return CUDA_ERROR_INVALID_CONTEXT;
  return submit(to, from, size, Kind::kDeviceToDevice, stream);
}

CUresult cuMemcpyBatchAsync(CUdeviceptr* to, CUdeviceptr* from, size_t* sizes, size_t count,
                            CUmemcpyAttributes* attributes, size_t* first, size_t attribute_count, CUstream stream) {
  return submit_batch(to, from, sizes, count, attributes, first, attribute_count, stream);
}

// The form of CUDA 12.8 has the plain name.
#pragma push_macro("cuMemcpyBatchAsync")
#undef cuMemcpyBatchAsync
__attribute__((visibility("default"))) CUresult cuMemcpyBatchAsync(CUdeviceptr* to, CUdeviceptr* from, size_t* sizes,
                                                                   size_t count, CUmemcpyAttributes* attributes,
                                                                   size_t* first, size_t attribute_count,
                                                                   size_t* failed, CUstream stream) {
  *failed = SIZE_MAX;  // not known
  return submit_batch(to, from, sizes, count, attributes, first, attribute_count, stream);
}
#pragma pop_macro("cuMemcpyBatchAsync")

CUresult cuDeviceCanAccessPeer(int* answer, CUdevice device, CUdevice peer) {
  Machine& machine = Machine::get();
  for (const int each : {device, peer})
    if (const Status status = machine.usable(each); status != Status::kOk) return code(status);
  *answer = machine.can_access_peer(device, peer);
  return CUDA_SUCCESS;
}

CUresult cuCtxEnablePeerAccess(CUcontext peer, unsigned int flags) {
  const int other = device_of(peer);
  if (other < 0) return CUDA_ERROR_INVALID_CONTEXT;
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  return with_device([&](Machine& machine, int device) { return machine.enable_peer(device, other); });
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  return with_device([&](Machine& machine, int device) { return machine.module_load(device, image, module); });
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  return with_device([&](Machine& machine, int) { return machine.module_function(module, name, function); });
}

CUresult cuLaunchKernel(CUfunction function, unsigned int x, unsigned int y, unsigned int z, unsigned int threads_x,
                        unsigned int threads_y, unsigned int threads_z, unsigned int shared_bytes, CUstream stream,
                        void** parameters, void** extra) {
  const Dimensions blocks{x, y, z}, threads{threads_x, threads_y, threads_z};
  return with_device([&](Machine& machine, int device) {
    return machine.launch(device, function, blocks, threads, shared_bytes, stream, parameters, extra);
  });
}

CUresult cuEventCreate(CUevent* event, unsigned int) {
  return with_device([&](Machine& machine, int device) { return machine.event_create(device, event); });
}

CUresult cuEventDestroy(CUevent event) {
  return with_device([&](Machine& machine, int) { return machine.event_destroy(event); });
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
  return with_device([&](Machine& machine, int device) { return machine.event_record(device, event, stream); });
}

CUresult cuEventQuery(CUevent event) {
  return with_device([&](Machine& machine, int) { return machine.event_query(event); });
}

CUresult cuEventSynchronize(CUevent event) {
  return with_device([&](Machine& machine, int) { return machine.event_synchronize(event); });
}

CUresult cuIpcGetMemHandle(CUipcMemHandle* handle, CUdeviceptr address) {
  return with_device([&](Machine& machine, int) {
    IpcName name{};
    const Status status = machine.ipc_export(reinterpret_cast<void*>(address), false, false, &name);
    std::memset(handle, 0, sizeof *handle);
    if (status == Status::kOk) std::memcpy(handle, &name, sizeof name);
    return status;
  });
}

CUresult cuIpcOpenMemHandle(CUdeviceptr* address, CUipcMemHandle handle, unsigned int flags) {
  if (flags != CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS) return CUDA_ERROR_INVALID_VALUE;
  IpcName name;
  std::memcpy(&name, &handle, sizeof name);
  name.token_mask = ~0ull;
  return with_device([&](Machine& machine, int device) {
    void* opened = nullptr;
    const Status status = machine.ipc_import(device, name, &opened);
    *address = reinterpret_cast<CUdeviceptr>(opened);
    return status;
  });
}

CUresult cuIpcCloseMemHandle(CUdeviceptr address) {
  return with_device([&](Machine& machine, int) { return machine.ipc_close_import(reinterpret_cast<void*>(address)); });
}

}  // extern "C"
