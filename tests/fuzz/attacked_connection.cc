// SPDX-License-Identifier: Apache-2.0
#include "attacked_connection.h"

#include "../cpp/check.h"

namespace sage_kvt::fuzz {
namespace {

constexpr uint64_t kPeersWindow = 99;
constexpr uint8_t kUntouched = 0xEE;

// Of another connection: nobody who does not own it may write there.
struct Foreign {
  explicit Foreign(Endpoint& endpoint) : memory(4096, kUntouched) {
    const auto address = reinterpret_cast<uint64_t>(memory.data());
    endpoint.register_memory(address, memory.size());
    connection = endpoint.new_connection(false);
    window = endpoint.open_window(connection->id, {{address, memory.size()}}, kGeneration, false);
  }
  std::vector<uint8_t> memory;
  std::shared_ptr<Connection> connection;
  uint64_t window = 0;
};

Foreign& foreign(Endpoint& endpoint) {
  static auto* made = new Foreign(endpoint);
  return *made;
}

uint64_t address_of(const std::vector<uint8_t>& bytes) { return reinterpret_cast<uint64_t>(bytes.data()); }

}  // namespace

EndpointOptions stepped_options(int lanes) {
  EndpointOptions options;
  options.lanes = lanes;
  options.chunk_bytes = 4096;
  options.spin_ns = 0;
  options.inline_bytes = 0;
  options.stepped = true;
  return options;
}

AttackedConnection::AttackedConnection(Stepped& stepped, bool incoming)
    : stepped_(stepped), endpoint_(stepped.endpoint()), connection_(endpoint_.new_connection(incoming)) {
  foreign(endpoint_);
  CHECK(connection_ != nullptr);
}

AttackedConnection::~AttackedConnection() {
  endpoint_.close_window(window_);
  for (uint64_t region : regions_) endpoint_.deregister_memory(region);
}

void AttackedConnection::authorize() {
  if (authorized() || endpoint_.find_connection(connection_->id) == nullptr) return;
  endpoint_.authorize(connection_->id);
  std::vector<Segment> segments;
  for (size_t size : {300, 1, 5000, 64}) {
    memory_.emplace_back(size);
    segments.push_back({address_of(memory_.back()), size});
    regions_.push_back(endpoint_.register_memory(segments.back().address, size));
    window_size_ += size;
  }
  landed_.resize(window_size_);
  closed_window_ = endpoint_.open_window(connection_->id, segments, kGeneration, false);
  endpoint_.close_window(closed_window_);
  window_ = endpoint_.open_window(connection_->id, segments, kGeneration, true);
}

void AttackedConnection::post(bool checksum) {
  if (post_ != 0 || !authorized() || endpoint_.find_connection(connection_->id) == nullptr) return;
  source_.resize(9000);
  regions_.push_back(endpoint_.register_memory(address_of(source_), source_.size()));
  post_ = endpoint_.post(connection_->id, {kPeersWindow, kGeneration, source_.size()},
                         {{address_of(source_), 0, 4500}, {address_of(source_) + 4500, 4500, 4500}}, kGeneration, 0,
                         checksum);
}

uint64_t AttackedConnection::window_named(uint64_t name) const {
  switch (name) {
    case kOwnWindow:
      return window_;
    case kClosedWindow:
      return closed_window_;
    case kForeignWindow:
      return foreign(endpoint_).window;
    default:
      return name;
  }
}

bool AttackedConnection::turn() {
  for (const auto& channel : connection_->channels()) channel->woken = true;
  return stepped_.step();
}

void AttackedConnection::take_events() {
  for (const auto& event : endpoint_.poll(1u << 20)) {
    if (event.connection == foreign(endpoint_).connection->id) std::abort();
    if (event.connection != connection_->id) continue;  // of another lane, before it joined
    CHECK(counts_.closed == 0);                         // nothing follows it
    switch (event.kind) {
      case EventKind::kMessage:
        CHECK(event.payload.size() <= (authorized() ? kMaxMessageBytes : kMaxUnauthorizedMessageBytes));
        break;
      case EventKind::kLanded:
        CHECK(authorized() && event.id == window_);
        CHECK(event.length > 0 && event.offset <= window_size_ && event.length <= window_size_ - event.offset);
        for (uint64_t byte = event.offset; byte < event.offset + event.length; ++byte) {
          CHECK(!landed_[byte]);  // none counts twice
          landed_[byte] = true;
        }
        break;
      case EventKind::kWindowDone:
        CHECK(event.id == window_ && ++counts_.done == 1 && counts_.failed == 0);
        CHECK(std::find(landed_.begin(), landed_.end(), false) == landed_.end());
        break;
      case EventKind::kWindowFailed:
        CHECK(event.id == window_ && ++counts_.failed == 1 && counts_.done == 0);
        break;
      case EventKind::kSent:
        CHECK(event.id == post_ && ++counts_.sent == 1);
        break;
      case EventKind::kClosed:
        ++counts_.closed;
        break;
      default:
        break;
    }
  }
}

void AttackedConnection::end() {
  stepped_.step();  // it may have ended itself
  take_events();
  const bool announced = connection_->announced;
  endpoint_.close_connection(connection_->id, Status::kCancelled, "");
  stepped_.step();
  take_events();
  CHECK(counts_.closed == (announced ? 1 : 0));
  CHECK(counts_.sent == (post_ != 0 ? 1 : 0));
  CHECK(endpoint_.find_connection(connection_->id) == nullptr && connection_->channels().empty());
  const auto& untouched = foreign(endpoint_).memory;  // each byte is as the one before it
  CHECK(untouched[0] == kUntouched && std::memcmp(untouched.data(), untouched.data() + 1, untouched.size() - 1) == 0);
}

}  // namespace sage_kvt::fuzz
