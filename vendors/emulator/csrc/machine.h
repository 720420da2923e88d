// SPDX-License-Identifier: Apache-2.0
// A node with accelerators, emulated over host memory. The vendors' ABI files wrap this class.
//
// Device memory is a memfd that is mapped twice: the address handed out is mapped without any
// access, so host code that follows it dies as it would on a card; the machine moves the bytes
// through a mapping of its own. A stream is a thread with a queue. A device has one copy engine
// for each direction, which streams share. Kernels are host code that a stream calls; they follow
// device addresses, so what their device reaches is opened while one runs.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "settings.h"

namespace sage_emulator {

enum class Status {
  kOk,
  kNotReady,
  kInvalidValue,
  kInvalidDevice,
  kNoDeviceSet,  // the thread has chosen none, where the vendor wants that
  kInvalidHandle,
  kWrongDevice,  // a stream or an event of another device than the current one
  kOutOfMemory,
  kMisaligned,
  kTooLarge,
  kNotPinned,
  kWrongKind,  // the direction does not fit the addresses
  kAlreadyRegistered,
  kNotRegistered,
  kDmaError,
  kDeviceLost,
  kNotSupported,
  kPeerNotEnabled,
  kPeerAlreadyEnabled,
  kInUse,         // freed or closed while copies or importers still use it
  kNotPermitted,  // the exporter did not allow this process
  kInvalidImage,  // no module that this machine can run
  kNotFound,      // no function of that name
};

enum class Kind { kHostToHost, kHostToDevice, kDeviceToHost, kDeviceToDevice, kInfer };

struct Copy {
  uint64_t destination;
  uint64_t source;
  uint64_t bytes;
};

// What an exported allocation is found by in another process; vendors pack it into their handle.
struct IpcName {
  uint32_t pid;
  uint32_t fd;
  uint64_t token;
  uint64_t token_mask;  // which bits of the token a short handle had room for
};

// What was asked of the engines of one direction: calls that copy, copies in them, bytes.
struct Counts {
  std::atomic<uint64_t> calls{0}, copies{0}, bytes{0};
};

struct Dimensions {
  unsigned x, y, z;
};

// What a module has to have: `NAME`, and beside it `NAME_argument_bytes`, an unsigned.
using Kernel = void (*)(const void* argument, const unsigned blocks[2], unsigned threads, unsigned shared_bytes);

struct Function {
  int device;
  Kernel kernel;
  unsigned argument_bytes;
};

struct Allocation;
struct HostRange;
struct Event;
struct Stream;
struct Device;
struct Move;
struct Operation;
struct Launch;

class Machine {
 public:
  static Machine& get();

  // Empty when all is well, else what is wrong. Later calls may change rates, holds and faults only.
  std::string configure(const std::string& text);

  int devices() const { return static_cast<int>(settings_.devices); }
  const Settings& settings() const { return settings_; }
  Status usable(int device);

  Status memory_info(int device, uint64_t* free, uint64_t* total);
  Status alloc(int device, uint64_t bytes, void** address);
  Status free(void* address);
  // All of it, as when the machine is switched off; what queued work uses goes when that is over.
  void forget_memory();
  Status range_of(const void* address, void** base, uint64_t* bytes);
  Status host_alloc(uint64_t bytes, void** address);
  Status host_free(void* address);
  Status host_register(void* address, uint64_t bytes);
  Status host_unregister(void* address);

  // A range inside an allocation stands for all of it, unless only its base will do.
  Status ipc_export(const void* address, bool base_only, bool named_importers_only, IpcName* name);
  Status ipc_allow(const IpcName& name, int32_t pid);
  Status ipc_import(int device, const IpcName& name, void** address);
  Status ipc_close_import(void* address);
  Status ipc_close(const IpcName& name);  // by key, on either side

  bool can_access_peer(int device, int peer) const;
  Status enable_peer(int device, int peer);

  Status stream_create(int device, void** stream);
  Status stream_destroy(void* stream);
  Status stream_synchronize(int device, void* stream);
  Status stream_wait(int device, void* stream, void* event);
  Status event_create(int device, void** event);
  Status event_destroy(void* event);
  Status event_record(int device, void* event, void* stream);
  Status event_query(void* event);
  Status event_synchronize(void* event);

  // Checks every copy, then enqueues all or none. `peer_staged`: without peer access a copy
  // between devices goes through the host, as slow as that is, instead of failing.
  Status submit(int device, void* stream, const std::vector<Copy>& copies, Kind kind, bool peer_staged = false);

  // A module's image is a shared library of the host. Modules stay until the process ends.
  Status module_load(int device, const void* image, void** module);
  Status module_function(void* module, const char* name, void** function);
  // For calls that are told how long the argument is: whether the function takes no more.
  Status takes(void* function, size_t argument_bytes);
  // `parameters` has the address of the kernel's one argument, which is copied before this returns.
  Status launch(int device, void* function, Dimensions blocks, Dimensions threads, unsigned shared_bytes, void* stream,
                void** parameters, void** extra);

  // Since the start.
  const std::array<Counts, kDirections>& counts() const { return counts_; }
  uint64_t launches() const { return launches_; }

  // Why the last call of this thread failed, for the vendor's own "last message" call.
  static const std::string& reason();
  static Status fail(Status status, const std::string& reason);

 private:
  using Clock = std::chrono::steady_clock;

  // copies.cc
  Status plan(int device, const Copy& copy, Kind kind, bool peer_staged, Move* move);
  Status check_host(uint64_t address, uint64_t bytes, Move* move, bool* pageable);
  // `reached` is when the stream's work so far ends by the rates; moved on by what this copy takes.
  Status perform(int device, Move& move, Clock::time_point* reached);
  bool wait_while_held(int device, Direction direction, Clock::time_point* reached);
  std::chrono::nanoseconds latency();
  // streams.cc
  void run(std::shared_ptr<Stream> stream);
  std::shared_ptr<Stream> find_stream(void* handle);
  std::shared_ptr<Event> find_event(void* handle);
  Status enqueue(const std::shared_ptr<Stream>& stream, Operation operation);
  // The stream, if work of this device can be put on it.
  Status working_stream(int device, void* handle, std::shared_ptr<Stream>* stream);
  // kernels.cc
  void perform(int device, const Launch& launch);
  // memory.cc
  std::shared_ptr<Allocation> find_allocation(uint64_t address);
  std::shared_ptr<HostRange> find_host(uint64_t address);
  // ipc.cc
  std::shared_ptr<Allocation> find_export(const IpcName& name);
  // Whether work of the device can read and write the allocation, without the host.
  bool reaches(int device, const Allocation& allocation) const;

  Settings settings_;
  bool configured_ = false;
  std::vector<std::unique_ptr<Device>> device_list_;
  std::mutex mutex_;  // guards the maps below and the devices' sums
  std::map<uint64_t, std::shared_ptr<Allocation>> allocations_;
  std::map<uint64_t, std::shared_ptr<HostRange>> host_;
  std::map<void*, std::shared_ptr<Stream>> streams_;
  std::map<void*, std::shared_ptr<Event>> events_;
  std::map<void*, int> modules_;         // by what dlopen returned: the device
  std::map<void*, Function> functions_;  // by their addresses
  int64_t copies_begun_ = 0;
  std::array<Counts, kDirections> counts_;
  std::atomic<uint64_t> launches_{0};
  std::mutex live_mutex_;  // guards what configure may change: rates, holds, faults
  std::condition_variable hold_changed_;
};

// What other processes that import an allocation share with it; the last page of its memfd.
struct Sharing {
  static constexpr int kAllowed = 64, kImporters = 64;
  uint64_t token;
  uint64_t bytes;
  int32_t device;
  int32_t only_named;  // importers must be in `allowed`
  std::atomic<int32_t> allowed[kAllowed];
  std::atomic<int32_t> importers[kImporters];  // process ids, 0 is a free place
};

struct Allocation {
  ~Allocation();
  // Kernels that may follow its device address begin and end; under the machine's mutex.
  void open_to_kernel();
  void close_to_kernel();
  // This process imports it no more.
  void leave();
  uint64_t base = 0;    // the device address
  uint64_t bytes = 0;   // asked for
  uint64_t mapped = 0;  // rounded to pages
  uint8_t* view = nullptr;
  Sharing* sharing = nullptr;
  int fd = -1;
  int device = 0;
  bool imported = false;
  bool exported = false;
  bool virtual_memory = false;
  int kernels = 0;  // that run on devices which reach it
  std::atomic<int> in_flight{0};
};

struct HostRange {
  uint64_t base = 0;
  uint64_t bytes = 0;
  bool owned = false;  // by host_alloc
  std::atomic<int> in_flight{0};
};

struct Engine {
  std::mutex mutex;
  std::chrono::steady_clock::time_point free_at{};
};

struct Device {
  std::array<Engine, kDirections> engines;
  std::atomic<bool> lost{false};
  uint64_t used = 0;       // bytes, of memory
  uint64_t allocated = 0;  // bytes ever, for the fault
  std::vector<bool> peers;
};

// Memory that queued work uses: kept, and not to be freed, until that is over.
struct InFlight {
  std::vector<std::shared_ptr<Allocation>> allocations;
  std::vector<std::shared_ptr<HostRange>> ranges;
  void hold();
  void release();
};

// One copy whose ends are resolved.
struct Move : InFlight {
  uint8_t* to = nullptr;
  const uint8_t* from = nullptr;
  uint64_t bytes = 0;
  Direction direction = Direction::kHostToDevice;
};

std::string hex(uint64_t value);

}  // namespace sage_emulator
