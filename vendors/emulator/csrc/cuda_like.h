// SPDX-License-Identifier: Apache-2.0
// The calls that libraries like CUDA's runtime have in common, over the emulated machine: a vendor's file gives the
// code of each status, and names these as its own functions.
#pragma once

#include <cstring>

#include "machine.h"

namespace sage_emulator {

// `code` turns a Status into the vendor's own.
template <auto code>
struct CudaLike {
  using Result = decltype(code(Status::kOk));
  inline static thread_local int current_device = 0;

  // On the current device, if it is there.
  template <typename Call>
  static Result with_device(Call call) {
    Machine& machine = Machine::get();
    const Status status = machine.usable(current_device);
    return code(status == Status::kOk ? call(machine) : status);
  }

  static Result set_device(int device) {
    const Status status = Machine::get().usable(device);
    if (status == Status::kOk) current_device = device;
    return code(status);
  }

  static Result memory_info(size_t* free, size_t* total) {
    return with_device([&](Machine& machine) { return machine.memory_info(current_device, free, total); });
  }

  static Result alloc(void** address, size_t size) {
    return with_device([&](Machine& machine) { return machine.alloc(current_device, size, address); });
  }
  static Result free(void* address) {
    return with_device([&](Machine& machine) { return machine.free(address); });
  }
  static Result host_alloc(void** address, size_t size) {
    return with_device([&](Machine& machine) { return machine.host_alloc(size, address); });
  }
  static Result host_free(void* address) {
    return with_device([&](Machine& machine) { return machine.host_free(address); });
  }
  static Result host_register(void* address, size_t size) {
    return with_device([&](Machine& machine) { return machine.host_register(address, size); });
  }
  static Result host_unregister(void* address) {
    return with_device([&](Machine& machine) { return machine.host_unregister(address); });
  }
  static Result range_of(void** base, size_t* size, void* address) {
    return with_device([&](Machine& machine) { return machine.range_of(address, base, size); });
  }

  static Result stream_create(void** stream) {
    return with_device([&](Machine& machine) { return machine.stream_create(current_device, stream); });
  }
  static Result stream_destroy(void* stream) {
    return with_device([&](Machine& machine) { return machine.stream_destroy(stream); });
  }
  static Result stream_synchronize(void* stream) {
    return with_device([&](Machine& machine) { return machine.stream_synchronize(current_device, stream); });
  }
  static Result stream_wait(void* stream, void* event) {
    return with_device([&](Machine& machine) { return machine.stream_wait(current_device, stream, event); });
  }

  static Result copy(void* to, const void* from, size_t size, Kind kind, void* stream, bool peer = false) {
    const Copy copy{reinterpret_cast<uint64_t>(to), reinterpret_cast<uint64_t>(from), size};
    return with_device([&](Machine& machine) { return machine.submit(current_device, stream, {copy}, kind, peer); });
  }

  template <typename Answer>
  static Result can_access_peer(Answer* answer, int device, int peer) {
    Machine& machine = Machine::get();
    for (const int each : {device, peer})
      if (const Status status = machine.usable(each); status != Status::kOk) return code(status);
    *answer = machine.can_access_peer(device, peer);
    return code(Status::kOk);
  }
  static Result enable_peer(int peer) {
    return with_device([&](Machine& machine) { return machine.enable_peer(current_device, peer); });
  }

  static Result module_load(void** module, const void* image) {
    return with_device([&](Machine& machine) { return machine.module_load(current_device, image, module); });
  }
  static Result module_function(void** function, void* module, const char* name) {
    return with_device([&](Machine& machine) { return machine.module_function(module, name, function); });
  }
  static Result launch(void* function, Dimensions blocks, Dimensions threads, unsigned shared_bytes, void* stream,
                       void** parameters, void** extra) {
    return with_device([&](Machine& machine) {
      return machine.launch(current_device, function, blocks, threads, shared_bytes, stream, parameters, extra);
    });
  }

  static Result event_create(void** event) {
    return with_device([&](Machine& machine) { return machine.event_create(current_device, event); });
  }
  static Result event_destroy(void* event) {
    return with_device([&](Machine& machine) { return machine.event_destroy(event); });
  }
  static Result event_record(void* event, void* stream) {
    return with_device([&](Machine& machine) { return machine.event_record(current_device, event, stream); });
  }
  static Result event_query(void* event) {
    return with_device([&](Machine& machine) { return machine.event_query(event); });
  }
  static Result event_synchronize(void* event) {
    return with_device([&](Machine& machine) { return machine.event_synchronize(event); });
  }

  // Handles that any process may open.
  template <typename Handle>
  static Result ipc_get(Handle* handle, void* address) {
    return with_device([&](Machine& machine) {
      IpcName name{};
      const Status status = machine.ipc_export(address, false, false, &name);
      std::memset(handle, 0, sizeof *handle);
      if (status == Status::kOk) std::memcpy(handle, &name, sizeof name);
      return status;
    });
  }
  template <typename Handle>
  static Result ipc_open(void** address, const Handle& handle) {
    IpcName name;
    std::memcpy(&name, &handle, sizeof name);
    name.token_mask = ~0ull;
    return with_device([&](Machine& machine) { return machine.ipc_import(current_device, name, address); });
  }
  static Result ipc_close(void* address) {
    return with_device([&](Machine& machine) { return machine.ipc_close_import(address); });
  }
};

}  // namespace sage_emulator
