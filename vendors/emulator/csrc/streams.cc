// SPDX-License-Identifier: Apache-2.0
#include "streams.h"

#include <sys/prctl.h>

#include <thread>
#include <utility>

namespace sage_emulator {

std::shared_ptr<Stream> Machine::find_stream(void* handle) {
  std::lock_guard guard(mutex_);
  const auto found = streams_.find(handle);
  return found == streams_.end() ? nullptr : found->second;
}

std::shared_ptr<Event> Machine::find_event(void* handle) {
  std::lock_guard guard(mutex_);
  const auto found = events_.find(handle);
  return found == events_.end() ? nullptr : found->second;
}

Status Machine::stream_create(int device, void** stream) {
  if (const Status status = usable(device); status != Status::kOk) return status;
  auto made = std::make_shared<Stream>(device);
  {
    std::lock_guard guard(mutex_);
    streams_[made.get()] = made;
  }
  *stream = made.get();
  std::thread([this, made] { run(made); }).detach();
  return Status::kOk;
}

Status Machine::stream_destroy(void* stream) {
  const auto found = find_stream(stream);
  if (found == nullptr) return fail(Status::kInvalidHandle, "no such stream");
  {
    std::lock_guard guard(mutex_);
    streams_.erase(stream);
  }
  std::lock_guard guard(found->mutex);
  found->closing = true;  // what is queued is still done
  found->changed.notify_all();
  return Status::kOk;
}

Status Machine::enqueue(const std::shared_ptr<Stream>& stream, Operation operation) {
  operation.enqueued = Clock::now();
  std::lock_guard guard(stream->mutex);
  stream->queue.push_back(std::move(operation));
  ++stream->enqueued;
  stream->changed.notify_all();
  return Status::kOk;
}

Status Machine::working_stream(int device, void* handle, std::shared_ptr<Stream>* stream) {
  if (const Status status = usable(device); status != Status::kOk) return status;
  const auto found = find_stream(handle);
  if (found == nullptr) return fail(Status::kInvalidHandle, "no such stream");
  if (found->device != device) return fail(Status::kWrongDevice, "the stream is another device's");
  std::lock_guard guard(found->mutex);
  if (found->status != Status::kOk) return fail(found->status, "earlier work of the stream failed");
  *stream = found;
  return Status::kOk;
}

Status Machine::stream_synchronize(int device, void* stream) {
  const auto found = find_stream(stream);
  if (found == nullptr) return fail(Status::kInvalidHandle, "no such stream");
  if (found->device != device) return fail(Status::kWrongDevice, "the stream is another device's");
  std::unique_lock lock(found->mutex);
  const uint64_t until = found->enqueued;
  found->changed.wait(lock, [&] { return found->finished >= until; });
  if (found->status != Status::kOk) return fail(found->status, "work of the stream failed");
  return usable(device);
}

Status Machine::stream_wait(int device, void* stream, void* event) {
  if (const Status status = usable(device); status != Status::kOk) return status;
  const auto found = find_stream(stream);
  const auto awaited = find_event(event);
  if (found == nullptr || awaited == nullptr) return fail(Status::kInvalidHandle, "no such stream or event");
  if (found->device != device) return fail(Status::kWrongDevice, "the stream is another device's");
  Operation operation{Operation::What::kWait, {}, awaited, 0, {}};
  {
    std::lock_guard guard(awaited->mutex);
    operation.generation = awaited->recorded;
  }
  return enqueue(found, std::move(operation));
}

Status Machine::event_create(int device, void** event) {
  if (const Status status = usable(device); status != Status::kOk) return status;
  auto made = std::make_shared<Event>(device);
  std::lock_guard guard(mutex_);
  events_[made.get()] = made;
  *event = made.get();
  return Status::kOk;
}

Status Machine::event_destroy(void* event) {
  std::lock_guard guard(mutex_);
  if (events_.erase(event) == 0) return fail(Status::kInvalidHandle, "no such event");
  return Status::kOk;
}

Status Machine::event_record(int device, void* event, void* stream) {
  if (const Status status = usable(device); status != Status::kOk) return status;
  const auto found = find_stream(stream);
  const auto recorded = find_event(event);
  if (found == nullptr || recorded == nullptr) return fail(Status::kInvalidHandle, "no such stream or event");
  if (found->device != device || recorded->device != device)
    return fail(Status::kWrongDevice, "the stream or the event is another device's");
  Operation operation{Operation::What::kRecord, {}, recorded, 0, {}};
  {
    std::lock_guard guard(recorded->mutex);
    operation.generation = ++recorded->recorded;
  }
  return enqueue(found, std::move(operation));
}

Status Machine::event_query(void* event) {
  const auto found = find_event(event);
  if (found == nullptr) return fail(Status::kInvalidHandle, "no such event");
  std::lock_guard guard(found->mutex);
  if (found->completed < found->recorded) {
    const Status status = usable(found->device);
    return status == Status::kOk ? Status::kNotReady : status;
  }
  if (found->status != Status::kOk) return fail(found->status, "work before the event failed");
  return Status::kOk;
}

Status Machine::event_synchronize(void* event) {
  const auto found = find_event(event);
  if (found == nullptr) return fail(Status::kInvalidHandle, "no such event");
  std::unique_lock lock(found->mutex);
  const uint64_t until = found->recorded;
  found->changed.wait(lock, [&] { return found->completed >= until; });
  if (found->status != Status::kOk) return fail(found->status, "work before the event failed");
  return Status::kOk;
}

void Machine::run(std::shared_ptr<Stream> stream) {
  ::prctl(PR_SET_NAME, "emulated-stream");
  ::prctl(PR_SET_TIMERSLACK, 1000ul);  // ns; the default of 50 us is longer than many copies
  const auto raise = [&](Status status) {
    std::lock_guard guard(stream->mutex);
    if (stream->status == Status::kOk) stream->status = status;
  };
  Clock::time_point reached{};
  while (true) {
    Operation operation;
    {
      std::unique_lock lock(stream->mutex);
      stream->changed.wait(lock, [&] { return stream->closing || !stream->queue.empty(); });
      if (stream->queue.empty()) return;
      operation = std::move(stream->queue.front());
      stream->queue.pop_front();
    }
    if (device_list_[static_cast<size_t>(stream->device)]->lost) raise(Status::kDeviceLost);
    switch (operation.what) {
      case Operation::What::kCopy: {
        // From when it could have begun: what the host's scheduling cost is made up for.
        reached = std::max(reached, operation.enqueued) + latency();
        for (auto& move : operation.moves) {
          if (stream->status == Status::kOk)
            if (const Status status = perform(stream->device, move, &reached); status != Status::kOk) raise(status);
        }
        bool last;
        {
          std::lock_guard guard(stream->mutex);
          last = stream->queue.empty();
        }
        if (last) std::this_thread::sleep_until(reached);
        for (auto& move : operation.moves) move.release();
        break;
      }
      case Operation::What::kLaunch: {
        std::this_thread::sleep_until(reached);  // by their rates, the copies before it are over then
        if (stream->status == Status::kOk) perform(stream->device, *operation.launch);
        reached = std::max(reached, Clock::now());
        operation.launch->release();
        break;
      }
      case Operation::What::kRecord: {
        std::this_thread::sleep_until(reached);
        std::lock_guard guard(operation.event->mutex);
        operation.event->completed = std::max(operation.event->completed, operation.generation);
        operation.event->status = stream->status;
        operation.event->changed.notify_all();
        break;
      }
      case Operation::What::kWait: {
        Status status;
        {
          std::unique_lock lock(operation.event->mutex);
          operation.event->changed.wait(lock, [&] { return operation.event->completed >= operation.generation; });
          status = operation.event->status;
        }
        reached = std::max(reached, Clock::now());
        if (status != Status::kOk) raise(status);  // what it waited for never came
        break;
      }
    }
    std::lock_guard guard(stream->mutex);
    ++stream->finished;
    stream->changed.notify_all();
  }
}

}  // namespace sage_emulator
