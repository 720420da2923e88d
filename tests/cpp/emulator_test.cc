// SPDX-License-Identifier: Apache-2.0
// The emulated machine of vendors/emulator, from many threads at once.
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "check.h"
#include "machine.h"

using namespace sage_emulator;

namespace {

constexpr uint64_t kBytes = 1u << 20;
constexpr int kThreads = 4, kRounds = 30;

void configure(const char* changes) {
  const std::string text = std::string("devices=2\nmemory_bytes=67108864\npeer_access=01;10\n") + changes;
  CHECK(Machine::get().configure(text).empty());
}

// Each thread carries its own bytes to a device, over to the other one, and back.
void round_trips(int number) {
  Machine& machine = Machine::get();
  const int device = number % 2;
  void *host, *near, *far, *stream, *other, *event;
  CHECK(machine.host_alloc(kBytes, &host) == Status::kOk);
  CHECK(machine.alloc(device, kBytes, &near) == Status::kOk);
  CHECK(machine.alloc(1 - device, kBytes, &far) == Status::kOk);
  CHECK(machine.stream_create(device, &stream) == Status::kOk);
  CHECK(machine.stream_create(device, &other) == Status::kOk);
  CHECK(machine.event_create(device, &event) == Status::kOk);
  const auto copy = [&](void* on, void* to, void* from, Kind kind) {
    const Copy one{reinterpret_cast<uint64_t>(to), reinterpret_cast<uint64_t>(from), kBytes};
    CHECK(machine.submit(device, on, {one}, kind) == Status::kOk);
  };
  for (int round = 0; round < kRounds; ++round) {
    std::memset(host, number + round, kBytes);
    copy(stream, near, host, Kind::kHostToDevice);
    copy(stream, far, near, Kind::kDeviceToDevice);
    CHECK(machine.event_record(device, event, stream) == Status::kOk);
    CHECK(machine.stream_wait(device, other, event) == Status::kOk);
    CHECK(machine.event_synchronize(event) == Status::kOk);
    std::memset(host, 0, kBytes);
    copy(other, host, far, Kind::kDeviceToHost);
    CHECK(machine.stream_synchronize(device, other) == Status::kOk);
    const auto* bytes = static_cast<const uint8_t*>(host);
    CHECK(bytes[0] == static_cast<uint8_t>(number + round) && bytes[kBytes - 1] == bytes[0]);
  }
  CHECK(machine.event_destroy(event) == Status::kOk);
  CHECK(machine.stream_destroy(stream) == Status::kOk);
  CHECK(machine.stream_destroy(other) == Status::kOk);
  CHECK(machine.free(near) == Status::kOk);
  CHECK(machine.free(far) == Status::kOk);
  CHECK(machine.host_free(host) == Status::kOk);
}

// While copies run, engines are held and let go and rates change.
void many_threads() {
  configure("");
  CHECK(Machine::get().enable_peer(0, 1) == Status::kOk);
  CHECK(Machine::get().enable_peer(1, 0) == Status::kOk);
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(round_trips, i);
  std::atomic<bool> over{false};
  std::thread meddler([&] {
    for (int i = 0; !over; ++i) {
      configure(i % 2 ? "held=5\nh2d_gbytes_per_s=5\n" : "held=0\nh2d_gbytes_per_s=0\n");
      std::this_thread::sleep_for(std::chrono::microseconds(500));
    }
    configure("held=0\n");
  });
  for (auto& thread : threads) thread.join();
  over = true;
  meddler.join();
}

// A device goes away under several streams; every wait ends, and all that was taken can be left.
void a_device_is_lost_under_streams() {
  Machine& machine = Machine::get();
  void *host, *memory;
  CHECK(machine.host_alloc(kBytes, &host) == Status::kOk);
  CHECK(machine.alloc(0, kBytes * kThreads, &memory) == Status::kOk);
  configure("held=1\ndevice_lost_after_copies=3\n");
  std::vector<std::thread> threads;
  std::atomic<int> lost{0};
  for (int i = 0; i < kThreads; ++i) {
    void* stream;
    CHECK(machine.stream_create(0, &stream) == Status::kOk);
    const uint64_t own = reinterpret_cast<uint64_t>(memory) + static_cast<uint64_t>(i) * kBytes;
    const Copy one{own, reinterpret_cast<uint64_t>(host), kBytes};
    for (int round = 0; round < 3; ++round) CHECK(machine.submit(0, stream, {one}, Kind::kHostToDevice) == Status::kOk);
    threads.emplace_back([&, stream] {
      if (machine.stream_synchronize(0, stream) == Status::kDeviceLost) ++lost;
      machine.stream_destroy(stream);
    });
  }
  configure("held=0\ndevice_lost_after_copies=3\n");
  for (auto& thread : threads) thread.join();
  CHECK(lost == kThreads);
  CHECK(machine.usable(0) == Status::kDeviceLost);
  CHECK(machine.usable(1) == Status::kOk);
  CHECK(machine.host_free(host) == Status::kOk);
}

}  // namespace

int main() {
  RUN(many_threads);
  RUN(a_device_is_lost_under_streams);
}
