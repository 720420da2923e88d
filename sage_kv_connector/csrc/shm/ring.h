// SPDX-License-Identifier: Apache-2.0
// What two processes share for one connection: two rings of records, generations, arenas.
//
// The connecting side makes the memfd; side 0 is the connecting one. Side s writes ring s and
// the tail of ring 1-s. The peer may write anything at any time, so a reader copies a record
// out before it looks at it, and trusts no index it did not check.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace sage_kvt {

constexpr uint32_t kShmMagic = 0x48564B53;  // "SKVH"
constexpr uint32_t kShmVersion = 1;
constexpr size_t kRingBytes = 4u << 20;
constexpr size_t kSlots = 256;  // chunks in flight, and generations, of each side

struct alignas(64) RingIndex {
  alignas(64) std::atomic<uint64_t> head;      // bytes ever written, by the writer
  alignas(64) std::atomic<uint64_t> tail;      // bytes ever taken, by the reader
  alignas(64) std::atomic<uint32_t> sleeping;  // the reader wants its eventfd written
  std::atomic<uint32_t> blocked;               // so does the writer, once there is room
  std::atomic<uint32_t> pings;                 // so many the writer's lane has sent
  std::atomic<uint32_t> answered;              // the last of them that the reader's lane saw
};

struct SharedLayout {
  uint32_t magic, version;
  uint64_t arena_bytes;  // of each side
  RingIndex index[2];
  alignas(64) std::atomic<uint64_t> live[2][kSlots];  // generation of side s's chunk in a slot, 0 = revoked
  alignas(4096) uint8_t ring[2][kRingBytes];
  // followed by two arenas of arena_bytes
};
static_assert(std::atomic<uint64_t>::is_always_lock_free);

enum class RecordType : uint32_t { kMessage = 1, kNotice = 2, kAck = 3, kGrant = 4 };

struct RecordHeader {
  uint32_t size;  // of the whole record, a multiple of 8
  uint32_t type;
};

struct Notice {
  RecordHeader header;
  uint64_t window, offset, length, generation;
  uint64_t arena_offset;
  uint32_t slot, pieces;
  uint32_t crc;
  uint32_t flags;
  // followed by `pieces` × PeerPiece unless kInArena
};
constexpr uint32_t kInArena = 1, kHasCrc = 2;
// The sender need not be woken for the acknowledgement if the chunk is taken: it has room for more, and its post waits.
constexpr uint32_t kAckLater = 4;

struct PeerPiece {
  uint64_t address, length;
};

struct Ack {
  RecordHeader header;
  uint32_t slot, status;
};

struct GrantRecord {
  RecordHeader header;
  uint64_t window, parts;
};

struct MessageRecord {
  RecordHeader header;
  uint64_t length;
};

constexpr uint64_t padded_to_8(uint64_t size) { return (size + 7) & ~uint64_t{7}; }

// Writer of one ring. Parts are copied one after the other as one record.
class RingWriter {
 public:
  RingWriter(RingIndex& index, uint8_t* data) : index_(index), data_(data), head_(0) {}
  struct Part {
    const void* data;
    size_t size;
  };
  // False if there is no room. `total` is padded to 8.
  bool write(const std::vector<Part>& parts);
  // True once after records were written and the reader sleeps: it must be woken.
  bool reader_sleeps();
  // The reader's lane shall show that it lives; it is woken as after a record.
  void ping() { index_.pings.fetch_add(1, std::memory_order_seq_cst); }
  // True once after it did.
  bool answered() {
    const uint32_t last = index_.answered.load(std::memory_order_relaxed);
    return std::exchange(answered_, last) != last;
  }
  // The ring was full: ask to be woken. False if there is room by now.
  bool wait_for_room(uint64_t total);

 private:
  void copy_in(uint64_t position, const void* from, size_t size);
  RingIndex& index_;
  uint8_t* data_;
  uint64_t head_;
  uint32_t answered_ = 0;
};

class RingReader {
 public:
  RingReader(RingIndex& index, const uint8_t* data) : index_(index), data_(data), tail_(0) {}
  enum class Result { kEmpty, kRecord, kBroken };
  // Copies the next record out and takes it off.
  Result read(std::vector<uint8_t>* record);
  bool empty() const { return index_.head.load(std::memory_order_seq_cst) == tail_; }
  // True once after records were taken that a writer waits for.
  bool writer_blocked() {
    return index_.blocked.load(std::memory_order_seq_cst) != 0 &&
           index_.blocked.exchange(0, std::memory_order_seq_cst) != 0;
  }
  // However many pings came, one answer is for all of them.
  bool pinged() const { return index_.pings.load(std::memory_order_seq_cst) != answered_; }
  void answer_ping() {
    answered_ = index_.pings.load(std::memory_order_seq_cst);
    index_.answered.store(answered_, std::memory_order_relaxed);
  }
  void set_sleeping(bool sleeping) { index_.sleeping.store(sleeping ? 1 : 0, std::memory_order_seq_cst); }

 private:
  void copy_out(uint64_t position, void* to, size_t size) const;
  RingIndex& index_;
  const uint8_t* data_;
  uint64_t tail_;
  uint32_t answered_ = 0;
};

}  // namespace sage_kvt
