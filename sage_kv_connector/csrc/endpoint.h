// SPDX-License-Identifier: Apache-2.0
// One backend instance of one process: lanes, connections, windows, posts and their completions.
//
// Locks, outermost first: Channel::mutex, Connection's, then the tables here and Window's.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "connection.h"
#include "event.h"
#include "lane.h"
#include "measured.h"
#include "memory_region.h"
#include "window.h"

namespace sage_kvt {

// What an event costs besides its payload, in a connection's inbox.
constexpr size_t kEventBytes = sizeof(Event);
// Longer times are refused where a user gives them, and are for ever where a thread waits.
constexpr double kMaxTimeoutS = 604800;

struct EndpointOptions {
  int lanes = 1;
  uint64_t chunk_bytes = 1 << 20;
  uint64_t spin_ns = 50000;
  // A post of at most this many bytes on an idle connection leaves from the caller's thread.
  uint64_t inline_bytes = 64 << 10;
  bool stepped = false;  // lanes have no threads
  bool measures = true;  // times, too
};

// What is open now.
struct Held {
  size_t connections, windows, posts;
};

// What a peer needs to know of a window.
struct WindowDescriptor {
  uint64_t window, generation, size;
};

constexpr size_t kMaxMessageBytes = 1u << 20;
constexpr size_t kMaxUnauthorizedMessageBytes = 64u << 10;
constexpr size_t kMaxUnauthorizedConnections = 64;
// So long a place among them is safe; after that somebody new may take it.
constexpr uint64_t kSafePlaceNs = 250000000;
// An incoming peer has this long until it is announced.
constexpr uint64_t kSetUpNs = 5000000000;
constexpr size_t kMaxPieces = 512;
constexpr uint64_t kMaxChunkBytes = 64u << 20;

// Whatever a backend does between its lanes' turns, with no channel's mutex held; several lanes may be there at once.
class Tender {
 public:
  virtual ~Tender() = default;
  virtual void tend() = 0;
};

class Endpoint {
 public:
  explicit Endpoint(const EndpointOptions& options);
  virtual ~Endpoint();

  // -- set-up; errors are std::invalid_argument (bad argument) or std::system_error
  virtual std::string listen(const std::string& address) = 0;
  virtual uint64_t connect(const std::string& address, double timeout_s) = 0;
  virtual uint64_t register_memory(uint64_t address, uint64_t length) { return regions_.add(address, length); }
  virtual void deregister_memory(uint64_t region) { regions_.remove(region); }
  virtual void authorize(uint64_t connection);
  ConnectionInfo info(uint64_t connection);
  // Close the connection with kSilent if its peer gives no sign of life for so long; until `unwatch`.
  void watch(uint64_t connection, double timeout_s);
  void unwatch(uint64_t connection);
  void close_connection(uint64_t connection, Status status, const std::string& detail);

  // -- transfers
  // False when the connection's bounded queue is full.
  bool send(uint64_t connection, std::string message);
  uint64_t open_window(uint64_t connection, const std::vector<Segment>& segments, uint64_t generation, bool notify);
  // Over any space; `memory`: what holds its bytes.
  uint64_t open_window(uint64_t connection, std::unique_ptr<Space> space, const std::vector<Segment>& memory,
                       uint64_t generation, bool notify);
  WindowDescriptor describe(uint64_t window);
  uint64_t close_window(uint64_t window);
  uint64_t post(uint64_t connection, const WindowDescriptor& target, const std::vector<Descriptor>& descriptors,
                uint64_t generation, int priority, bool checksum);
  // Any post; `memory`: what holds its bytes.
  uint64_t post(uint64_t connection, const WindowDescriptor& target, const std::shared_ptr<Post>& post,
                const std::vector<Segment>& memory, const PostOptions& how);
  void cancel(uint64_t post);
  bool wait(double timeout_s);
  std::vector<Event> poll(size_t max_events);
  int fileno() const { return completions_.fd(); }
  CompletionQueue& completions() { return completions_; }
  // Idempotent; every thread is joined, every descriptor closed and the end of all told when it returns.
  virtual void close();

  // -- for channels and connections
  // An incoming one counts as unauthorized. Where there are too many of those the oldest goes, if its place is not safe
  // any more; else nullptr.
  std::shared_ptr<Connection> new_connection(bool incoming);
  // Somebody who was no peer is gone: counted, and told, once a second at most.
  void turned_away(const std::string& who, Status status, const std::string& why);
  // Drop a connection that was never announced.
  void forget(const std::shared_ptr<Connection>& connection);
  std::shared_ptr<Connection> find_connection(uint64_t id);
  std::shared_ptr<Window> find_window(uint64_t id);
  void connection_closed(uint64_t id, Status status, const std::string& detail);
  void post_ended(const Post& post);
  // `connection`: it came over this one.
  void window_landed(Connection& connection, const std::shared_ptr<Window>& window, uint64_t offset, uint64_t length);
  void window_failed(const std::shared_ptr<Window>& window, Status status, uint64_t offset, uint64_t length,
                     const std::string& detail);
  // Gives the channel to its connection and a lane, or shuts it if the connection is closed.
  void attach(const std::shared_ptr<Channel>& channel);
  void emit(EventKind kind, uint64_t connection, const std::string& detail = "");
  void emit_message(Connection& connection, std::string payload);
  // A channel (its mutex held) found its connection broken; it ends once no channel lock is held.
  void doom(const std::shared_ptr<Connection>& connection, Status status, const std::string& detail);
  const EndpointOptions& options() const { return options_; }
  Counters counters;
  Held held();
  // Bytes of each connection that is open, by its id.
  std::vector<std::tuple<uint64_t, uint64_t, uint64_t>> traffic();

 protected:
  // A connection is gone; for what a backend keeps of it.
  virtual void forgotten(uint64_t) {}
  // now_ns() in `timeout_s`; throws std::invalid_argument for one that is not allowed.
  static uint64_t deadline_after(double timeout_s) { return now_ns() + nanoseconds(timeout_s); }
  void throw_if_closed() const;
  Lane& lane(size_t index) { return *lanes_[index % lanes_.size()]; }
  const std::vector<std::unique_ptr<Lane>>& lanes() const { return lanes_; }
  bool has_doomed() const { return any_doomed_; }
  // From now on until it is closed, beside the endpoint's own: from its constructor on, when lanes run already.
  void set_tender(Tender* tender) { tender_ = tender; }

 private:
  static uint64_t nanoseconds(double timeout_s);
  void no_longer_counted(Connection& connection);
  bool make_place();
  void tend();
  std::vector<std::shared_ptr<Channel>> all_channels();
  void bury_doomed();
  void tell_end(const Connection& connection, Status status, const std::string& detail);

  const EndpointOptions options_;
  CompletionQueue completions_;
  MemoryRegions regions_;
  std::shared_mutex mutex_;
  std::unordered_map<uint64_t, std::shared_ptr<Connection>> connections_;
  std::unordered_map<uint64_t, std::shared_ptr<Window>> windows_;
  std::unordered_map<uint64_t, std::shared_ptr<Connection>> post_owner_;
  size_t ending_ = 0;  // connections whose end is being told
  std::condition_variable_any ended_;
  std::vector<std::unique_ptr<Lane>> lanes_;
  struct Doomed {
    std::shared_ptr<Connection> connection;
    Status status;
    std::string detail;
  };
  std::mutex doomed_mutex_;
  std::vector<Doomed> doomed_;
  std::atomic<bool> any_doomed_{false};
  std::atomic<Tender*> tender_{nullptr};
  std::atomic<uint64_t> wait_spin_ns_;
  std::atomic<size_t> unauthorized_{0};
  std::atomic<uint64_t> next_id_{1}, next_lane_{0};
  std::mutex turned_away_mutex_;
  uint64_t turned_away_told_ = 0, turned_away_untold_ = 0;
  std::atomic<bool> closed_{false};
};

}  // namespace sage_kvt
