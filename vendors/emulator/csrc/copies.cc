// SPDX-License-Identifier: Apache-2.0
// Copies: what a DMA engine would refuse, how long it would take, and the faults that are asked for.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

#include "streams.h"

namespace sage_emulator {
namespace {

const uint64_t kPage = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
constexpr uint64_t kSlice = 256 << 10;  // bytes that an engine moves for one stream before the next one's turn
constexpr auto kShortestSleep = std::chrono::microseconds(100);

std::string range(uint64_t address, uint64_t bytes) { return hex(address) + " + " + std::to_string(bytes); }

bool mapped(uint64_t address, uint64_t bytes) {
  const uint64_t first = address / kPage * kPage;
  std::vector<unsigned char> pages((address + bytes - first + kPage - 1) / kPage);
  return ::mincore(reinterpret_cast<void*>(first), address + bytes - first, pages.data()) == 0;
}

}  // namespace

void InFlight::hold() {
  for (auto& allocation : allocations) ++allocation->in_flight;
  for (auto& each : ranges) ++each->in_flight;
}

void InFlight::release() {
  for (auto& allocation : allocations) --allocation->in_flight;
  for (auto& each : ranges) --each->in_flight;
  allocations.clear();
  ranges.clear();
}

Status Machine::check_host(uint64_t address, uint64_t bytes, Move* move, bool* pageable) {
  if (const auto pinned = find_host(address); pinned != nullptr) {
    if (address + bytes > pinned->base + pinned->bytes)
      return fail(Status::kInvalidValue, range(address, bytes) + " ends behind its pinned memory");
    move->ranges.push_back(pinned);
    return Status::kOk;
  }
  if (settings_.pinned_only) return fail(Status::kNotPinned, "host memory " + range(address, bytes) + " is not pinned");
  if (!mapped(address, bytes)) return fail(Status::kInvalidValue, range(address, bytes) + " is not mapped");
  *pageable = true;
  return Status::kOk;
}

Status Machine::plan(int device, const Copy& copy, Kind kind, bool peer_staged, Move* move) {
  const uint64_t alignment = static_cast<uint64_t>(settings_.dma_alignment_bytes);
  if ((copy.destination | copy.source) == 0 || copy.bytes == 0)
    return fail(Status::kInvalidValue, "a copy without addresses or of 0 bytes");
  for (const auto value : {copy.destination, copy.source, copy.bytes})
    if (value % alignment != 0)
      return fail(Status::kMisaligned, hex(value) + " is not a multiple of " + std::to_string(alignment));
  if (settings_.max_transfer_bytes > 0 && copy.bytes > static_cast<uint64_t>(settings_.max_transfer_bytes))
    return fail(Status::kTooLarge, std::to_string(copy.bytes) + " bytes in one copy; at most " +
                                       std::to_string(settings_.max_transfer_bytes) + " are possible");
  const auto to = find_allocation(copy.destination), from = find_allocation(copy.source);
  const Kind real = from == nullptr ? (to == nullptr ? Kind::kHostToHost : Kind::kHostToDevice)
                                    : (to == nullptr ? Kind::kDeviceToHost : Kind::kDeviceToDevice);
  if ((kind != Kind::kInfer && kind != real) || real == Kind::kHostToHost)
    return fail(Status::kWrongKind, "the addresses do not lie where the direction says");
  bool pageable = false;
  for (const auto& [allocation, address, is_source] :
       {std::tuple(to, copy.destination, false), std::tuple(from, copy.source, true)}) {
    uint8_t* at = reinterpret_cast<uint8_t*>(address);
    if (allocation == nullptr) {
      if (const Status status = check_host(address, copy.bytes, move, &pageable); status != Status::kOk) return status;
    } else {
      if (address + copy.bytes > allocation->base + allocation->bytes)
        return fail(Status::kInvalidValue, range(address, copy.bytes) + " ends behind its allocation");
      if (const Status status = usable(allocation->device); status != Status::kOk) return status;
      move->allocations.push_back(allocation);
      at = allocation->view + (address - allocation->base);
    }
    if (is_source)
      move->from = at;
    else
      move->to = at;
  }
  move->bytes = copy.bytes;
  move->direction = real == Kind::kHostToDevice   ? Direction::kHostToDevice
                    : real == Kind::kDeviceToHost ? Direction::kDeviceToHost
                                                  : Direction::kDeviceToDevice;
  for (const auto& allocation : move->allocations) {
    if (allocation->device == device) continue;
    const bool enabled = reaches(device, *allocation);
    if (!enabled && !peer_staged)
      return fail(Status::kPeerNotEnabled, "device " + std::to_string(device) + " has no access to device " +
                                               std::to_string(allocation->device) + "'s memory");
    move->direction = enabled ? Direction::kPeer : Direction::kDeviceToHost;
  }
  return pageable ? Status::kNotReady : Status::kOk;
}

Status Machine::submit(int device, void* stream, const std::vector<Copy>& copies, Kind kind, bool peer_staged) {
  std::shared_ptr<Stream> found;
  if (const Status status = working_stream(device, stream, &found); status != Status::kOk) return status;
  Operation operation{Operation::What::kCopy, {}, nullptr, 0, {}};
  bool pageable = false;
  for (const auto& copy : copies) {
    Move move;
    const Status status = plan(device, copy, kind, peer_staged, &move);
    if (status != Status::kOk && status != Status::kNotReady) return status;
    pageable = pageable || status == Status::kNotReady;
    operation.moves.push_back(std::move(move));
  }
  for (auto& move : operation.moves) {
    move.hold();
    auto& counts = counts_[static_cast<size_t>(move.direction)];
    ++counts.copies;
    counts.bytes += move.bytes;
  }
  if (!operation.moves.empty()) ++counts_[static_cast<size_t>(operation.moves[0].direction)].calls;
  enqueue(found, std::move(operation));
  // Drivers stage pageable memory, and the call returns when that is over.
  return pageable ? stream_synchronize(device, stream) : Status::kOk;
}

bool Machine::wait_while_held(int device, Direction direction, Clock::time_point* reached) {
  std::unique_lock lock(live_mutex_);
  const int64_t bit = int64_t{1} << static_cast<int>(direction);
  auto& lost = device_list_[static_cast<size_t>(device)]->lost;
  if ((settings_.held & bit) != 0) {
    hold_changed_.wait(lock, [&] { return (settings_.held & bit) == 0 || lost; });
    *reached = std::max(*reached, Clock::now());
  }
  return !lost;
}

std::chrono::nanoseconds Machine::latency() {
  std::lock_guard guard(live_mutex_);
  return std::chrono::nanoseconds(static_cast<int64_t>(settings_.latency_seconds * 1e9));
}

Status Machine::perform(int device, Move& move, Clock::time_point* reached) {
  Device& at = *device_list_[static_cast<size_t>(device)];
  if (!wait_while_held(device, move.direction, reached)) return Status::kDeviceLost;
  double rate;
  bool fails;
  {
    std::lock_guard guard(live_mutex_);
    const int64_t begun = copies_begun_++;
    if (settings_.device_lost_after_copies >= 0 && begun >= settings_.device_lost_after_copies) {
      at.lost = true;
      hold_changed_.notify_all();
      return Status::kDeviceLost;
    }
    fails = begun == settings_.dma_error_after_copies;
    rate = settings_.bytes_per_second[static_cast<int>(move.direction)];
  }
  const uint64_t total = fails ? move.bytes / 2 : move.bytes;
  Engine& engine = at.engines[static_cast<size_t>(move.direction)];
  for (uint64_t done = 0; done < total;) {
    if (!wait_while_held(device, move.direction, reached)) return Status::kDeviceLost;
    const uint64_t bytes = std::min(kSlice, total - done);
    if (rate > 0) {
      const std::chrono::duration<double> takes(static_cast<double>(bytes) / rate);
      std::lock_guard guard(engine.mutex);
      engine.free_at = std::max(engine.free_at, *reached) + std::chrono::duration_cast<Clock::duration>(takes);
      *reached = engine.free_at;
    }
    std::memcpy(move.to + done, move.from + done, bytes);
    done += bytes;
    // Shorter delays add up in `reached`; sleeping for each of them would take far longer than they do.
    if (*reached - Clock::now() > kShortestSleep) std::this_thread::sleep_until(*reached);
  }
  return fails ? Status::kDmaError : Status::kOk;
}

}  // namespace sage_emulator
