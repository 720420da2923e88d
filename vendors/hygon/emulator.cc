// SPDX-License-Identifier: Apache-2.0
// HIP's calls (libgalaxyhip.so.5) over the emulated machine. Prototypes, types and constants are in
// vendor_abi.h, which is generated from vendors/hygon/abi.py when this is compiled.
#include <cstdio>

#include "cuda_like.h"
#include "vendor_abi.h"

using sage_emulator::Kind;
using sage_emulator::Machine;
using sage_emulator::Status;

namespace {

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
    case Status::kInvalidImage:
      return hipErrorInvalidImage;
    case Status::kNotFound:
      return hipErrorNotFound;
    default:
      return hipErrorInvalidValue;
  }
}

using Hip = sage_emulator::CudaLike<code>;

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

hipError_t hipSetDevice(int device) { return Hip::set_device(device); }

hipError_t hipDeviceGetName(char* name, int length, hipDevice_t device) {
  std::snprintf(name, static_cast<size_t>(length), "emulated DCU");
  return code(Machine::get().usable(device));
}

hipError_t hipDeviceGetPCIBusId(char* id, int length, int device) {
  std::snprintf(id, static_cast<size_t>(length), "0000:%02x:00.0", 0xe0 + device);
  return code(Machine::get().usable(device));
}

hipError_t hipMemGetInfo(size_t* free, size_t* total) { return Hip::memory_info(free, total); }

hipError_t hipMalloc(void** address, size_t size) { return Hip::alloc(address, size); }

hipError_t hipFree(void* address) { return Hip::free(address); }

hipError_t hipHostMalloc(void** address, size_t size, unsigned int) { return Hip::host_alloc(address, size); }

hipError_t hipHostFree(void* address) { return Hip::host_free(address); }

hipError_t hipHostRegister(void* address, size_t size, unsigned int) { return Hip::host_register(address, size); }

hipError_t hipHostUnregister(void* address) { return Hip::host_unregister(address); }

hipError_t hipMemGetAddressRange(hipDeviceptr_t* base, size_t* size, hipDeviceptr_t address) {
  return Hip::range_of(base, size, address);
}

hipError_t hipStreamCreateWithFlags(hipStream_t* stream, unsigned int) { return Hip::stream_create(stream); }

hipError_t hipStreamDestroy(hipStream_t stream) { return Hip::stream_destroy(stream); }

hipError_t hipStreamSynchronize(hipStream_t stream) { return Hip::stream_synchronize(stream); }

hipError_t hipStreamWaitEvent(hipStream_t stream, hipEvent_t event, unsigned int) {
  return Hip::stream_wait(stream, event);
}

hipError_t hipMemcpyAsync(void* to, const void* from, size_t size, hipMemcpyKind kind, hipStream_t stream) {
  return Hip::copy(to, from, size, kind_of(kind), stream);
}

hipError_t hipMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, hipStream_t stream) {
  return Hip::copy(to, from, size, Kind::kDeviceToDevice, stream, true);
}

hipError_t hipDeviceCanAccessPeer(int* answer, int device, int peer) {
  return Hip::can_access_peer(answer, device, peer);
}

hipError_t hipDeviceEnablePeerAccess(int peer, unsigned int) { return Hip::enable_peer(peer); }

hipError_t hipModuleLoadData(hipModule_t* module, const void* image) { return Hip::module_load(module, image); }

hipError_t hipModuleGetFunction(hipFunction_t* function, hipModule_t module, const char* name) {
  return Hip::module_function(function, module, name);
}

hipError_t hipModuleLaunchKernel(hipFunction_t function, unsigned int x, unsigned int y, unsigned int z,
                                 unsigned int threads_x, unsigned int threads_y, unsigned int threads_z,
                                 unsigned int shared_bytes, hipStream_t stream, void** parameters, void** extra) {
  return Hip::launch(function, {x, y, z}, {threads_x, threads_y, threads_z}, shared_bytes, stream, parameters, extra);
}

hipError_t hipEventCreateWithFlags(hipEvent_t* event, unsigned int) { return Hip::event_create(event); }

hipError_t hipEventDestroy(hipEvent_t event) { return Hip::event_destroy(event); }

hipError_t hipEventRecord(hipEvent_t event, hipStream_t stream) { return Hip::event_record(event, stream); }

hipError_t hipEventQuery(hipEvent_t event) { return Hip::event_query(event); }

hipError_t hipEventSynchronize(hipEvent_t event) { return Hip::event_synchronize(event); }

hipError_t hipIpcGetMemHandle(hipIpcMemHandle_t* handle, void* address) { return Hip::ipc_get(handle, address); }

hipError_t hipIpcOpenMemHandle(void** address, hipIpcMemHandle_t handle, unsigned int) {
  return Hip::ipc_open(address, handle);
}

hipError_t hipIpcCloseMemHandle(void* address) { return Hip::ipc_close(address); }

}  // extern "C"
