// SPDX-License-Identifier: Apache-2.0
#include "bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <system_error>

#include "call_rows.h"
#include "crc32c.h"
#include "machine_limits.h"
#include "shm/channel.h"
#include "tcp/tcp_endpoint.h"
#ifdef SAGE_KVT_RDMA
#include "rdma/rdma_endpoint.h"
#endif

namespace nb = nanobind;
using namespace nb::literals;
using namespace sage_kvt;

nb::list sage_kvt::events_of(std::vector<Event> events) {
  nb::list out;
  for (const auto& e : events)
    out.append(nb::make_tuple(static_cast<int>(e.kind), e.connection, e.id, static_cast<int>(e.status), e.offset,
                              e.length, e.time_ns, nb::bytes(e.payload.data(), e.payload.size()), e.detail,
                              e.began_ns));
  return out;
}

WindowDescriptor sage_kvt::window_descriptor(const nb::bytes& data) {
  WindowDescriptor d;
  if (data.size() != sizeof d)
    throw std::invalid_argument("window_descriptor has " + std::to_string(data.size()) + " bytes, must have " +
                                std::to_string(sizeof d));
  std::memcpy(&d, data.c_str(), sizeof d);
  return d;
}

EndpointOptions sage_kvt::options_of(int lanes, uint64_t chunk_bytes, uint64_t spin_us, bool measures) {
  if (lanes < 1 || lanes > 16) throw std::invalid_argument("lanes is " + std::to_string(lanes) + ", allowed: 1 to 16");
  if (chunk_bytes < 4096 || chunk_bytes > kMaxChunkBytes)
    throw std::invalid_argument("chunk_bytes is " + std::to_string(chunk_bytes) + ", allowed: 4096 to " +
                                std::to_string(kMaxChunkBytes));
  constexpr uint64_t kMaxSpinUs = 100000;
  if (spin_us > kMaxSpinUs)
    throw std::invalid_argument("spin_us is " + std::to_string(spin_us) + ", allowed: 0 to " +
                                std::to_string(kMaxSpinUs));
  EndpointOptions options;
  options.lanes = lanes;
  options.chunk_bytes = chunk_bytes;
  options.spin_ns = spin_us * 1000;
  options.measures = measures;
  return options;
}

namespace {

using Pairs = nb::ndarray<const uint64_t, nb::shape<-1, 2>, nb::c_contig, nb::device::cpu>;
using Triples = nb::ndarray<const uint64_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu>;

std::vector<Segment> segments_of(const Pairs& array) {
  std::vector<Segment> out(array.shape(0));
  static_assert(sizeof(Segment) == 16);
  if (!out.empty()) std::memcpy(out.data(), array.data(), out.size() * sizeof(Segment));
  return out;
}

std::vector<Descriptor> descriptors_of(const Triples& array) {
  std::vector<Descriptor> out(array.shape(0));
  static_assert(sizeof(Descriptor) == 24);
  if (!out.empty()) std::memcpy(out.data(), array.data(), out.size() * sizeof(Descriptor));
  return out;
}

nb::bytes to_bytes(const WindowDescriptor& d) { return nb::bytes(reinterpret_cast<const char*>(&d), sizeof d); }

nb::dict counters_of(Endpoint& endpoint) {
  const Counters& c = endpoint.counters;
  const auto held = endpoint.held();
  nb::dict out;
  out["connections"] = held.connections;
  out["windows"] = held.windows;
  out["posts"] = held.posts;
  out["bytes_sent"] = c.bytes_sent.load();
  out["bytes_landed"] = c.bytes_landed.load();
  out["chunks_sent"] = c.chunks_sent.load();
  out["chunks_landed"] = c.chunks_landed.load();
  out["checksum_failures"] = c.checksum_failures.load();
  out["stale_chunks"] = c.stale_chunks.load();
  out["refused_chunks"] = c.refused_chunks.load();
  out["stalls"] = c.stalls.load();
  out["messages_sent"] = c.messages_sent.load();
  out["messages_received"] = c.messages_received.load();
  out["forged_frames"] = c.forged_frames.load();
  out["refused_connections"] = c.refused_connections.load();
  out["send_ns"] = c.send_ns.load();
  out["place_ns"] = c.place_ns.load();
  out["verify_ns"] = c.verify_ns.load();
  return out;
}

// Count and sum of nanoseconds of each bucket.
nb::list buckets_of(const Histogram& histogram) {
  nb::list out;
  for (size_t i = 0; i < Histogram::kBuckets; ++i) out.append(nb::make_tuple(histogram.count(i), histogram.sum_ns(i)));
  return out;
}

}  // namespace

NB_MODULE(_data_plane, m) {
  // A process may end with an engine open; what is left then is the system's to take back.
  nb::set_leak_warnings(false);
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const ConnectionClosed& e) {
      PyErr_SetString(PyExc_ConnectionError, e.what());
    } catch (const std::system_error& e) {
      nb::object error = nb::module_::import_("builtins").attr("OSError")(e.code().value(), e.what());
      PyErr_SetObject(reinterpret_cast<PyObject*>(error.type().ptr()), error.ptr());
    }
  });

  bind_conversion(m);
  nb::class_<Endpoint>(m, "Endpoint")
      .def("register_memory", &Endpoint::register_memory, "address"_a, "length"_a)
      .def("deregister_memory", &Endpoint::deregister_memory, "region"_a)
      .def("listen", &Endpoint::listen, "address"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("connect", &Endpoint::connect, "address"_a, "timeout_s"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("authorize", &Endpoint::authorize, "connection"_a, nb::call_guard<nb::gil_scoped_release>())
      // Short calls, which are many: they keep the interpreter.
      .def("watch", &Endpoint::watch, "connection"_a, "timeout_s"_a)
      .def("unwatch", &Endpoint::unwatch, "connection"_a)
      .def("connection_info",
           [](Endpoint& e, uint64_t connection) {
             const auto info = e.info(connection);
             return nb::make_tuple(info.peer, info.mode, info.reason, info.crosses_wire, info.lanes, info.local);
           })
      .def(
          "close_connection",
          [](Endpoint& e, uint64_t connection) { e.close_connection(connection, Status::kCancelled, "closed here"); },
          "connection"_a, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "send",
          [](Endpoint& e, uint64_t connection, const nb::bytes& message) {
            std::string copy(message.c_str(), message.size());
            bool queued;
            {
              nb::gil_scoped_release release;
              queued = e.send(connection, std::move(copy));
            }
            if (!queued) {
              PyErr_SetString(PyExc_BlockingIOError, "the connection's message queue is full");
              throw nb::python_error();
            }
          },
          "connection"_a, "message"_a)
      .def(
          "open_window",
          [](Endpoint& e, uint64_t connection, const Pairs& segments, uint64_t generation, bool notify) {
            auto list = segments_of(segments);
            nb::gil_scoped_release release;
            return e.open_window(connection, list, generation, notify);
          },
          "connection"_a, "segments"_a, "generation"_a, "notify_chunks"_a)
      .def("window_descriptor", [](Endpoint& e, uint64_t window) { return to_bytes(e.describe(window)); })
      .def("close_window", &Endpoint::close_window, "window"_a, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "post",
          [](Endpoint& e, uint64_t connection, const nb::bytes& target, const Triples& descriptors, uint64_t generation,
             int priority, bool checksum) {
            const auto window = window_descriptor(target);
            auto list = descriptors_of(descriptors);
            nb::gil_scoped_release release;
            return e.post(connection, window, list, generation, priority, checksum);
          },
          "connection"_a, "window_descriptor"_a, "descriptors"_a, "generation"_a, "priority"_a, "checksum"_a)
      .def("cancel", &Endpoint::cancel, "post"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("poll", [](Endpoint& e, size_t max_events) { return events_of(e.poll(max_events)); })
      .def("wait", &Endpoint::wait, "timeout_s"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("fileno", &Endpoint::fileno)
      .def("counters", [](Endpoint& e) { return counters_of(e); })
      .def("small_posts", [](Endpoint& e) { return buckets_of(e.counters.small_posts); })
      .def("traffic", &Endpoint::traffic)
      .def("close", &Endpoint::close, nb::call_guard<nb::gil_scoped_release>());

  bind_paged(m);
  bind_parts(m);
#ifdef SAGE_KVT_SIMULATION
  bind_simulation(m);
#endif

  nb::class_<TcpEndpoint, Endpoint>(m, "TcpEndpoint")
      .def(
          "__init__",
          [](TcpEndpoint* self, int lanes, uint64_t chunk_bytes, uint64_t spin_us, int socket_buffer,
             const std::string& local_address, const std::vector<std::string>& links, bool measures) {
            if (socket_buffer < 0)
              throw std::invalid_argument("socket_buffer is " + std::to_string(socket_buffer) +
                                          ", must be 0 (the kernel's own) or a size in bytes");
            new (self) TcpEndpoint(options_of(lanes, chunk_bytes, spin_us, measures),
                                   TcpOptions{socket_buffer, local_address, links});
          },
          nb::kw_only(), "lanes"_a, "chunk_bytes"_a, "spin_us"_a, "socket_buffer"_a, "local_address"_a, "links"_a,
          "measures"_a)
      .def(
          "protect",
          [](TcpEndpoint& e, uint64_t connection, bool encrypts, const nb::bytes& send, const nb::bytes& receive,
             const nb::bytes& last_plain) {
            std::string message(last_plain.c_str(), last_plain.size());
            std::string send_keys(send.c_str(), send.size()), receive_keys(receive.c_str(), receive.size());
            const auto wipe = [&] {
              if (const auto* crypto = libcrypto(nullptr)) {
                crypto->cleanse(send_keys.data(), send_keys.size());
                crypto->cleanse(receive_keys.data(), receive_keys.size());
              }
            };
            nb::gil_scoped_release release;
            try {
              e.protect(connection, encrypts, send_keys, receive_keys, std::move(message));
            } catch (...) {
              wipe();
              throw;
            }
            wipe();
          },
          "connection"_a, "encrypts"_a, "send_keys"_a, "receive_keys"_a, "last_plain"_a);

  bind_carried(m);
#ifdef SAGE_KVT_RDMA
  m.def("rdma_lacks", &rdma_lacks, nb::call_guard<nb::gil_scoped_release>());
  nb::class_<RdmaEndpoint, TcpEndpoint>(m, "RdmaEndpoint")
      .def(
          "__init__",
          [](RdmaEndpoint* self, int lanes, uint64_t chunk_bytes, uint64_t spin_us, const std::string& local_address,
             bool measures) {
            new (self) RdmaEndpoint(options_of(lanes, chunk_bytes, spin_us, measures), TcpOptions{0, local_address},
                                    RdmaOptions{});
          },
          nb::kw_only(), "lanes"_a, "chunk_bytes"_a, "spin_us"_a, "local_address"_a, "measures"_a)
      .def("unregistered", &RdmaEndpoint::unregistered);
#else
  m.def("rdma_lacks", [] { return std::string("this build has no rdma: rdma-core's headers were missing"); });
#endif

  nb::class_<ShmEndpoint, Endpoint>(m, "ShmEndpoint")
      .def(
          "__init__",
          [](ShmEndpoint* self, int lanes, uint64_t chunk_bytes, uint64_t spin_us, bool allow_direct,
             uint64_t arena_bytes, bool measures) {
            if (arena_bytes < (1u << 20) || arena_bytes > (1u << 30))
              throw std::invalid_argument("arena_bytes is " + std::to_string(arena_bytes) +
                                          ", allowed: 1 MiB to 1 GiB");
            new (self)
                ShmEndpoint(options_of(lanes, chunk_bytes, spin_us, measures), ShmOptions{allow_direct, arena_bytes});
          },
          nb::kw_only(), "lanes"_a, "chunk_bytes"_a, "spin_us"_a, "allow_direct"_a, "arena_bytes"_a, "measures"_a);

  m.def(
      "crc32c", [](const nb::bytes& data, uint32_t seed) { return crc32c(seed, data.c_str(), data.size()); }, "data"_a,
      "seed"_a = 0);
  m.attr("LANE_KEYS_BYTES") = kLaneKeysBytes;
  m.def("libcrypto", [] {
    std::string why;
    const auto* found = libcrypto(&why);
    return nb::make_tuple(found ? found->version(0) : "", why);
  });
  m.def("measure_cipher", &measure_cipher, "encrypts"_a, "bytes"_a, "slice"_a,
        nb::call_guard<nb::gil_scoped_release>());
  m.def("crc32c_implementation", [] { return crc32c_implementations().front().name; });
  m.def("crc32c_by_each", [](const nb::bytes& data, uint32_t seed) {
    nb::dict out;
    for (const auto& i : crc32c_implementations()) out[i.name.c_str()] = i.run(seed, data.c_str(), data.size());
    return out;
  });
  m.def(
      "merge_descriptors",
      [](const Triples& descriptors) {
        std::vector<std::vector<uint64_t>> out;
        for (const auto& d : merge_descriptors(descriptors_of(descriptors)))
          out.push_back({d.local, d.remote, d.length});
        return out;
      },
      "descriptors"_a);

  m.def(
      "call_rows",
      [](uint64_t function, const Triples& rows, const std::vector<std::pair<int, uint64_t>>& words) {
        if (words.size() > kMostWords)
          throw std::invalid_argument("words has " + std::to_string(words.size()) + " entries, at most " +
                                      std::to_string(kMostWords) + " are allowed");
        std::array<Word, kMostWords> given;
        for (size_t i = 0; i < words.size(); ++i) {
          if (words[i].first < -1 || words[i].first > 2)
            throw std::invalid_argument("word " + std::to_string(i) + " is of column " +
                                        std::to_string(words[i].first) + ", allowed: -1 to 2");
          given[i] = {words[i].first, words[i].second};
        }
        nb::gil_scoped_release release;
        const auto called =
            call_rows(function, reinterpret_cast<const uint64_t (*)[3]>(rows.data()), rows.shape(0), given);
        return std::make_pair(called.done, called.status);
      },
      "function"_a, "rows"_a, "words"_a);
  m.def(
      "measure_process_vm_readv",
      [](int pid, const Pairs& local, const Pairs& remote) {
        auto to = segments_of(local), from = segments_of(remote);
        nb::gil_scoped_release release;
        return measure_process_vm_readv(pid, to, from);
      },
      "pid"_a, "local"_a, "remote"_a);
  m.def(
      "measure_memcpy",
      [](const Pairs& to, const Pairs& from) {
        auto a = segments_of(to), b = segments_of(from);
        nb::gil_scoped_release release;
        return measure_memcpy(a, b);
      },
      "to"_a, "from_"_a);
  m.def(
      "measure_socket_send",
      [](int fd, uint64_t address, uint64_t size, uint64_t block) {
        nb::gil_scoped_release release;
        return measure_socket_send(fd, reinterpret_cast<const void*>(address), size, block);
      },
      "fd"_a, "address"_a, "size"_a, "block"_a);
  m.def(
      "measure_socket_receive",
      [](int fd, uint64_t address, uint64_t size, uint64_t block) {
        nb::gil_scoped_release release;
        return measure_socket_receive(fd, reinterpret_cast<void*>(address), size, block);
      },
      "fd"_a, "address"_a, "size"_a, "block"_a);
  m.def("measure_socket_ping", &measure_socket_ping, "fd"_a, "block"_a, "count"_a,
        nb::call_guard<nb::gil_scoped_release>());
  m.def("socket_echo", &socket_echo, "fd"_a, "block"_a, "count"_a, nb::call_guard<nb::gil_scoped_release>());
}
