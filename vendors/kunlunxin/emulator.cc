// SPDX-License-Identifier: Apache-2.0
// The XPU runtime's calls (libxpurt.so) over the emulated machine. Prototypes, types and constants are
// in vendor_abi.h, which is generated from vendors/kunlunxin/abi.py when this is compiled.
#include <algorithm>
#include <cstring>
#include <string>

#include "cuda_like.h"
#include "vendor_abi.h"

using sage_emulator::Copy;
using sage_emulator::Kind;
using sage_emulator::Machine;
using sage_emulator::Status;

namespace {

// The runtime has no code for misaligned addresses.
int code(Status status) {
  switch (status) {
    case Status::kOk:
      return XPU_SUCCESS;
    case Status::kNotReady:
    case Status::kInUse:
      return XPUERR_BUSY;
    case Status::kInvalidDevice:
      return XPUERR_INVALID_DEVICE;
    case Status::kOutOfMemory:
      return XPUERR_NOMEM;
    case Status::kAlreadyRegistered:
      return XPUERR_HOSTMEM_ALREADY_REGISTERED;
    case Status::kDmaError:
      return XPUERR_DMAABORT;
    case Status::kDeviceLost:
      return XPUERR_DEVRESET;
    case Status::kNotSupported:
    case Status::kPeerNotEnabled:
      return XPUERR_NOSUPPORT;
    default:
      return XPUERR_INVALID_PARAM;
  }
}

using Xpu = sage_emulator::CudaLike<code>;

// What a thread has set of its next launch. An argument has 512 bytes at most; a kernel that declares more reads zeros.
constexpr size_t kMostArgument = 512, kReadArgument = 8 << 10;
constexpr int kCores = 64;  // of a cluster
struct NextLaunch {
  alignas(16) uint8_t argument[kReadArgument];
  int clusters, cores;
  XPUStream stream;
};
thread_local NextLaunch next{};

}  // namespace

extern "C" {

const char* xpu_strerror(int) { return Machine::reason().c_str(); }

int xpu_device_count(int* count) {
  *count = Machine::get().devices();
  return XPU_SUCCESS;
}

int xpu_set_device(int device) { return Xpu::set_device(device); }

int xpu_device_get_attr(uint64_t* value, XPUDeviceAttr attribute, int device) {
  *value = attribute == XPUATTR_PCI_ADDRESS ? static_cast<uint64_t>(0xe0 + device) << 8 : 0;
  return code(Machine::get().usable(device));
}

int xpu_malloc(void** address, uint64_t size, XPUMemoryKind kind) {
  if (kind != XPU_MEM_MAIN) return XPUERR_INVALID_PARAM;
  return Xpu::alloc(address, size);
}

int xpu_free(void* address) { return Xpu::free(address); }

int xpu_host_alloc(void** address, uint64_t size, unsigned int) { return Xpu::host_alloc(address, size); }

int xpu_host_free(void* address) { return Xpu::host_free(address); }

int xpu_host_register(void* address, uint64_t size, unsigned int) { return Xpu::host_register(address, size); }

int xpu_host_unregister(void* address) { return Xpu::host_unregister(address); }

int xpu_memcpy_async(void* to, const void* from, uint64_t size, XPUMemcpyKind direction, XPUStream stream) {
  const Kind kind = direction == XPU_HOST_TO_DEVICE     ? Kind::kHostToDevice
                    : direction == XPU_DEVICE_TO_HOST   ? Kind::kDeviceToHost
                    : direction == XPU_DEVICE_TO_DEVICE ? Kind::kDeviceToDevice
                                                        : Kind::kHostToHost;
  return Xpu::copy(to, from, size, kind, stream);
}

int xpu_memcpy_peer(int to_device, void* to, int from_device, const void* from, uint64_t size) {
  const Copy copy{reinterpret_cast<uint64_t>(to), reinterpret_cast<uint64_t>(from), size};
  Machine& machine = Machine::get();
  if (to_device != from_device) {  // needs no call that enables it
    const Status status = machine.enable_peer(to_device, from_device);
    if (status != Status::kOk && status != Status::kPeerAlreadyEnabled) return code(status);
  }
  void* stream = nullptr;
  Status status = machine.stream_create(to_device, &stream);
  if (status != Status::kOk) return code(status);
  status = machine.submit(to_device, stream, {copy}, Kind::kDeviceToDevice);
  if (status == Status::kOk) status = machine.stream_synchronize(to_device, stream);
  machine.stream_destroy(stream);
  return code(status);
}

int xpu_stream_create(XPUStream* stream) { return Xpu::stream_create(stream); }

int xpu_stream_destroy(XPUStream stream) { return Xpu::stream_destroy(stream); }

int xpu_stream_wait_event(XPUStream stream, XPUEvent event) { return Xpu::stream_wait(stream, event); }

int xpu_wait(XPUStream stream) { return Xpu::stream_synchronize(stream); }

int xpu_event_create(XPUEvent* event) { return Xpu::event_create(event); }

int xpu_event_destroy(XPUEvent event) { return Xpu::event_destroy(event); }

int xpu_event_record(XPUEvent event, XPUStream stream) { return Xpu::event_record(event, stream); }

int xpu_event_query(XPUEvent event) { return Xpu::event_query(event); }

int xpu_event_wait(XPUEvent event) { return Xpu::event_synchronize(event); }

int xpu_ipc_get_memhandle(XPUIpcMemHandle* handle, void* address) { return Xpu::ipc_get(handle, address); }

int xpu_ipc_open_memhandle(void** address, XPUIpcMemHandle handle, unsigned int) {
  return Xpu::ipc_open(address, handle);
}

int xpu_ipc_close_memhandle(void* address) { return Xpu::ipc_close(address); }

// An image of which one function is used.
int xpu_create_cl_func(XPUFunc* function, uint64_t image, uint32_t size, uint32_t start, uint32_t, uint64_t,
                       const char* name, bool on_xpu) {
  if (size == 0 || start != 0 || on_xpu) return code(Status::kInvalidValue);
  void* module = nullptr;
  const int loaded = Xpu::module_load(&module, reinterpret_cast<const void*>(image));
  return loaded == XPU_SUCCESS ? Xpu::module_function(function, module, name) : loaded;
}

int xpu_launch_argument_set(const void* argument, size_t size, size_t offset) {
  if (offset % 4 != 0 || offset > kMostArgument || size > kMostArgument - offset)
    return code(Machine::fail(Status::kInvalidValue, "an argument has 512 bytes at most, in words"));
  std::memcpy(next.argument + offset, argument, size);
  return XPU_SUCCESS;
}

int xpu_launch_config(int clusters, int cores, XPUStream stream) {
  if (clusters < 1 || cores < 1 || cores > kCores)
    return code(Machine::fail(Status::kInvalidValue, std::to_string(clusters) + " blocks of " + std::to_string(cores) +
                                                         " threads are none, or more cores than a cluster has"));
  next.clusters = clusters;
  next.cores = cores;
  next.stream = stream;
  return XPU_SUCCESS;
}

int xpu_launch_async(XPUFunc function) {
  void* parameters[] = {next.argument};
  const unsigned clusters = static_cast<unsigned>(next.clusters), cores = static_cast<unsigned>(next.cores);
  const int launched = Xpu::launch(function, {clusters, 1, 1}, {cores, 1, 1}, 0, next.stream, parameters, nullptr);
  std::fill_n(next.argument, kMostArgument, uint8_t{0});
  next.clusters = 0;
  return launched;
}

}  // extern "C"
