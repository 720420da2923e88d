// SPDX-License-Identifier: Apache-2.0
// How the paths of an endpoint's connections come and go: one thread that listens, dials, and clears up.
//
// Life of a path: the side that accepted a connection invites the other one over it (a note: where it listens, and a
// token) -> that one dials from each of its addresses -> both attach a channel. It ends by a fault of either side ->
// each tells the other over the connection which chunks had ended here -> what the peer has is sent, the rest goes
// another way, by the connection's own sockets if there is no other path -> it is dialled again, later each time.
//
// Threads: this one owns everything here; others give it tasks. It alone destroys what rdma-core tells events of.
#pragma once

#include <netinet/in.h>

#include <functional>
#include <map>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "path/channel.h"
#include "rdma/notes.h"
#include "rdma/queue_pair.h"

namespace sage_kvt {

class RdmaEndpoint;

struct RdmaOptions {
  uint8_t traffic_class = 0;
  // A path is given up when it got no acknowledgement in 4.096 µs times two to the power of this, and again for each of
  // `retries`.
  uint8_t ack_timeout = 10;
  uint8_t retries = 7;
};

class Paths : public PathOwner {
 public:
  // Throws std::system_error.
  Paths(RdmaEndpoint& endpoint, const Verbs& verbs, VerbsDevices& devices, const RdmaOptions& options);
  ~Paths() override;
  Paths(const Paths&) = delete;
  Paths& operator=(const Paths&) = delete;

  // Both sides of a connection trust each other now.
  void authorized(const std::shared_ptr<Connection>& connection, bool dialled);
  // False if it makes no sense.
  bool on_note(const std::shared_ptr<Connection>& connection, const std::string& note);
  void path_ended(const PathChannel& channel, Flights flights, const Results& results) override;
  void forget(uint64_t connection);
  // Ends the thread: nothing is dialled any more. Idempotent.
  void stop();
  // Clears up what is left, once every channel was shut.
  void finish();

 private:
  using Key = std::pair<uint64_t, uint32_t>;  // connection, path
  struct Route {
    SocketAddress from, to;
    bool busy = false;  // it is being set up, or there
    uint64_t due = 0, backoff_ns = 0;
  };
  struct Dial {
    std::shared_ptr<Connection> connection;
    Token token{};
    std::vector<Route> routes;
    uint32_t next_path = 1;
  };
  struct Setup {
    std::shared_ptr<Connection> connection;
    std::unique_ptr<QueuePair> pair;
    uint32_t path = 0;
    bool dialled = false;
    PathTerms terms{};  // ours
  };
  struct Left {
    std::shared_ptr<Connection> connection;
    Flights flights;
  };
  struct Happened {
    rdma_cm_id* id;
    rdma_cm_event_type what;
    int status;
    std::vector<uint8_t> data;
  };

  void run();
  void submit(std::function<void()> task);
  bool run_tasks();
  int timeout_ms() const;

  static constexpr int kResolveMs = 2000;
  void listen();
  void invite(const std::shared_ptr<Connection>& connection);
  void invited(const std::shared_ptr<Connection>& connection, const Invitation& invitation);
  void dial_due();
  void dial(Dial& dial, size_t route);
  bool take_event(Happened* happened);
  void on_event(const Happened& happened);
  void on_request(const Happened& happened);
  void set_options(rdma_cm_id* id);
  rdma_conn_param offered(Setup& setup, const Token& token) const;
  void on_resolved(rdma_cm_id* id, Setup& setup);
  void connect(rdma_cm_id* id, Setup& setup);
  void established(const Happened& happened);
  void failed(rdma_cm_id* id, const std::string& why);
  void again(const Key& key, const std::string& why);
  void peer_ended(const std::shared_ptr<Connection>& connection, const PathEnded& ended);
  void settle(const Key& key);

  RdmaEndpoint& endpoint_;
  const Verbs& verbs_;
  VerbsDevices& devices_;
  const RdmaOptions options_;
  rdma_event_channel* events_ = nullptr;
  int wake_ = -1;
  std::vector<rdma_cm_id*> listeners_;
  std::vector<SocketAddress> listening_;
  std::mutex mutex_;
  std::vector<std::function<void()>> tasks_;
  bool stopping_ = false;
  std::thread thread_;

  std::map<uint64_t, Dial> dials_;
  std::map<Key, size_t> routes_;  // of paths that we dialled
  struct Invited {
    Token token;
    uint32_t last_path = 0;  // each is to have a higher number than the one before
  };
  std::map<uint64_t, Invited> invited_;
  std::unordered_map<rdma_cm_id*, Setup> setups_;
  struct Live {
    std::weak_ptr<PathChannel> channel;
    Key key;
  };
  std::unordered_map<rdma_cm_id*, Live> live_;
  std::map<Key, Left> left_;
  std::map<Key, Results> told_;  // by the peer
};

}  // namespace sage_kvt
