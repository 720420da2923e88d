// SPDX-License-Identifier: Apache-2.0
// A library that moves bytes within this process, for carried endpoints: it may be slow, and it may fail.
#pragma once

#include <atomic>
#include <chrono>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "carried/carried_endpoint.h"

namespace sage_kvt {

constexpr char kLocal[] = "local";

class LocallyCarried : public CarriedEndpoint {
 public:
  explicit LocallyCarried(const EndpointOptions& options, size_t slots = 8)
      : CarriedEndpoint(options, TcpOptions{}, CarriedOptions{kLocal, slots}) {
    describe_library("nothing needs to be known");
    thread_ = std::thread([this] { run(); });
  }
  ~LocallyCarried() override { LocallyCarried::close(); }

  uint64_t register_memory(uint64_t address, uint64_t length) override {
    const uint64_t region = CarriedEndpoint::register_memory(address, length);
    if (knows_memory) carry(region, address, length);
    return region;
  }
  void close() override {
    CarriedEndpoint::close();
    over_ = true;
    if (thread_.joinable()) thread_.join();
  }

  std::atomic<bool> fails{false}, holds{false}, knows_memory{true}, meets{true};
  std::atomic<uint64_t> reads{0}, met_peers{0};

 private:
  void run() {
    std::vector<CarriedJob> held;
    while (!over_ || !held.empty()) {
      if (auto job = next_job(0.01)) {
        if (job->what == CarriedJob::What::kMeet) {
          ++met_peers;
          met(job->connection, meets ? "" : "it does not want to");
        }
        if (job->what == CarriedJob::What::kRead) held.push_back(std::move(*job));
      }
      if (holds && !over_) continue;
      for (const auto& job : held) {
        for (const auto& row : job.read->rows)
          std::memcpy(reinterpret_cast<void*>(row.local), reinterpret_cast<const void*>(row.remote), row.length);
        ++reads;
        read_ended(job.read->number, fails);
      }
      held.clear();
    }
  }

  std::atomic<bool> over_{false};
  std::thread thread_;
};

}  // namespace sage_kvt
