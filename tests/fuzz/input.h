// SPDX-License-Identifier: Apache-2.0
// One fuzz input, read as the choices and bytes of a hostile peer. Behind its end everything is 0.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace sage_kvt::fuzz {

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}

  template <typename Number>
  Number number() {
    Number value{};
    const size_t size = std::min(sizeof value, left_);
    std::memcpy(&value, data_, size);
    skip(size);
    return value;
  }
  uint8_t byte() { return number<uint8_t>(); }
  // At most `size`: what is left.
  std::vector<uint8_t> bytes(size_t size) {
    size = std::min(size, left_);
    std::vector<uint8_t> taken(data_, data_ + size);
    skip(size);
    return taken;
  }
  std::vector<uint8_t> rest() { return bytes(left_); }
  bool empty() const { return left_ == 0; }

 private:
  void skip(size_t size) {
    data_ += size;
    left_ -= size;
  }
  const uint8_t* data_;
  size_t left_;
};

}  // namespace sage_kvt::fuzz
