// SPDX-License-Identifier: Apache-2.0
#include "shm/ring.h"

#include <algorithm>
#include <cstring>

namespace sage_kvt {

void RingWriter::copy_in(uint64_t position, const void* from, size_t size) {
  if (size == 0) return;
  const size_t at = position % kRingBytes;
  const size_t first = std::min(size, kRingBytes - at);
  std::memcpy(data_ + at, from, first);
  std::memcpy(data_, static_cast<const uint8_t*>(from) + first, size - first);
}

bool RingWriter::write(const std::vector<Part>& parts) {
  uint64_t size = 0;
  for (const auto& part : parts) size += part.size;
  const uint64_t total = padded_to_8(size);
  const uint64_t tail = index_.tail.load(std::memory_order_acquire);
  // A tail that the peer set beyond our head, or far behind, only makes the ring look full.
  if (tail > head_ || head_ - tail > kRingBytes || kRingBytes - (head_ - tail) < total) return false;
  uint64_t position = head_;
  for (const auto& part : parts) {
    copy_in(position, part.data, part.size);
    position += part.size;
  }
  head_ += total;
  index_.head.store(head_, std::memory_order_seq_cst);
  return true;
}

bool RingWriter::reader_sleeps() {
  if (index_.sleeping.load(std::memory_order_seq_cst) == 0) return false;
  return index_.sleeping.exchange(0, std::memory_order_seq_cst) != 0;
}

bool RingWriter::wait_for_room(uint64_t total) {
  index_.blocked.store(1, std::memory_order_seq_cst);
  const uint64_t tail = index_.tail.load(std::memory_order_seq_cst);
  // A tail that can't be makes us wait for a better one, not spin.
  return tail > head_ || head_ - tail > kRingBytes || kRingBytes - (head_ - tail) < padded_to_8(total);
}

void RingReader::copy_out(uint64_t position, void* to, size_t size) const {
  const size_t at = position % kRingBytes;
  const size_t first = std::min(size, kRingBytes - at);
  std::memcpy(to, data_ + at, first);
  std::memcpy(static_cast<uint8_t*>(to) + first, data_, size - first);
}

RingReader::Result RingReader::read(std::vector<uint8_t>* record) {
  const uint64_t head = index_.head.load(std::memory_order_acquire);
  if (head == tail_) return Result::kEmpty;
  const uint64_t available = head - tail_;
  RecordHeader header;
  if (available > kRingBytes || available < sizeof header) return Result::kBroken;
  copy_out(tail_, &header, sizeof header);
  if (header.size < sizeof header || header.size % 8 != 0 || header.size > available) return Result::kBroken;
  record->resize(header.size);
  copy_out(tail_, record->data(), header.size);
  // The header was read twice; the one that was checked is the one that counts.
  std::memcpy(record->data(), &header, sizeof header);
  tail_ += header.size;
  index_.tail.store(tail_, std::memory_order_seq_cst);
  return Result::kRecord;
}

}  // namespace sage_kvt
