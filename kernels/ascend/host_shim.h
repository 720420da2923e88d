// SPDX-License-Identifier: Apache-2.0
// An emulation of exactly that part of Ascend C that ascend_kernel.cc uses, and launches on the host, for emulated
// devices and tests: cores run one after the other. It stops at accesses outside of a tensor, at unaligned transfers
// and at 192 KiB of buffers.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>
#include <vector>

#define __aicore__
#define __global__
#define __gm__
using GM_ADDR = uint8_t*;
using half = _Float16;
struct bfloat16_t {
  uint16_t bits;
};

namespace AscendC {

inline void require(bool holds) {
  if (!holds) abort();
}

inline thread_local int block_index = 0, block_count = 1;  // streams run kernels beside one another
inline int GetBlockIdx() { return block_index; }
inline int GetBlockNum() { return block_count; }

enum class QuePosition { VECIN, VECOUT, VECCALC };
enum class RoundMode { CAST_NONE, CAST_RINT };
enum Pipe { PIPE_ALL };
template <Pipe>
void PipeBarrier() {}

template <class T>
struct LocalTensor {
  uint8_t* start = nullptr;
  int64_t bytes = 0;
  template <class U>
  LocalTensor<U> ReinterpretCast() const {
    return {start, bytes};
  }
  LocalTensor operator[](int offset) const { return {start + offset * sizeof(T), bytes - int64_t(offset * sizeof(T))}; }
  T* data(int count) const {
    require(count >= 0 && int64_t(count * sizeof(T)) <= bytes && uint64_t(start) % 32 == 0);
    return reinterpret_cast<T*>(start);
  }
  T GetValue(int i) const { return reinterpret_cast<const T*>(start)[i]; }
  void SetValue(int i, T value) { reinterpret_cast<T*>(start)[i] = value; }
};

template <class T>
struct GlobalTensor {
  T* start = nullptr;
  void SetGlobalBuffer(T* at) { start = at; }
  T GetValue(int64_t i) const { return start[i]; }
};

struct Buffer {
  std::vector<uint8_t> memory;
  uint8_t* start() { return memory.data() + (32 - uint64_t(memory.data()) % 32) % 32; }
};
template <QuePosition>
struct TBuf : Buffer {
  template <class T>
  LocalTensor<T> Get() {
    return {start(), int64_t(memory.size()) - 32};
  }
};
template <QuePosition, int>
struct TQue : Buffer {
  bool taken = false;
  template <class T>
  LocalTensor<T> AllocTensor() {
    require(!taken);
    taken = true;
    return {start(), int64_t(memory.size()) - 32};
  }
  template <class T>
  void EnQue(LocalTensor<T>) {}
  template <class T>
  LocalTensor<T> DeQue() {
    return {start(), int64_t(memory.size()) - 32};
  }
  template <class T>
  void FreeTensor(LocalTensor<T>) {
    taken = false;
  }
};
struct TPipe {
  int used = 0;
  void Take(Buffer& buffer, int bytes) {
    used += bytes;
    require(used <= 192 << 10);
    buffer.memory.assign(bytes + 32, 0xA5);
  }
  template <QuePosition p>
  void InitBuffer(TBuf<p>& buffer, int bytes) {
    Take(buffer, bytes);
  }
  template <QuePosition p, int depth>
  void InitBuffer(TQue<p, depth>& queue, int count, int bytes) {
    Take(queue, count * bytes);
  }
};

struct DataCopyExtParams {
  uint16_t blockCount;
  uint32_t blockLen, srcStride, dstStride, rsv;
};
template <class T>
struct DataCopyPadExtParams {
  bool isPad;
  uint8_t leftPadding, rightPadding;
  T paddingValue;
};
// Strides are the gaps between blocks: bytes in global memory, 32 bytes in unified buffer.
template <class T>
void DataCopyPad(LocalTensor<T> to, GlobalTensor<T> from, DataCopyExtParams p, DataCopyPadExtParams<T>) {
  const int64_t step = (p.blockLen + 31) / 32 * 32 + p.dstStride * 32;
  T* target = to.data(int(((p.blockCount - 1) * step + p.blockLen) / sizeof(T)));
  for (int i = 0; i < p.blockCount; ++i) {
    memcpy(target + i * step / sizeof(T), from.start + i * (p.blockLen + p.srcStride) / sizeof(T), p.blockLen);
  }
}
template <class T>
void DataCopyPad(GlobalTensor<T> to, LocalTensor<T> from, DataCopyExtParams p) {
  const int64_t step = (p.blockLen + 31) / 32 * 32 + p.srcStride * 32;
  const T* source = from.data(int(((p.blockCount - 1) * step + p.blockLen) / sizeof(T)));
  for (int i = 0; i < p.blockCount; ++i) {
    memcpy(to.start + i * (p.blockLen + p.dstStride) / sizeof(T), source + i * step / sizeof(T), p.blockLen);
  }
}
template <class T>
void DataCopy(LocalTensor<T> to, LocalTensor<T> from, int count) {
  memcpy(to.data(count), from.data(count), count * sizeof(T));
}

template <class To, class From>
To cast_one(From value) {
  return To(value);
}
template <>
inline float cast_one(bfloat16_t value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}
template <>
inline int32_t cast_one(half value) {
  return int32_t(rintf(float(value)));
}
template <>
inline uint8_t cast_one(half value) {
  return uint8_t(rintf(float(value)));
}
template <class To, class From>
void Cast(LocalTensor<To> to, LocalTensor<From> from, RoundMode, int count) {
  for (int i = 0; i < count; ++i) to.data(count)[i] = cast_one<To, From>(from.data(count)[i]);
}

template <class T>
void Duplicate(LocalTensor<T> to, T value, int count) {
  for (int i = 0; i < count; ++i) to.data(count)[i] = value;
}

#define KV_SCALAR(name, expression)                                   \
  template <class T>                                                  \
  void name(LocalTensor<T> to, LocalTensor<T> from, T b, int count) { \
    for (int i = 0; i < count; ++i) {                                 \
      const T a = from.data(count)[i];                                \
      to.data(count)[i] = T(expression);                              \
    }                                                                 \
  }
KV_SCALAR(Adds, a + b)
KV_SCALAR(Muls, a* b)
KV_SCALAR(Mins, a < b ? a : b)
KV_SCALAR(Maxs, a > b ? a : b)
KV_SCALAR(ShiftLeft, a << b)
KV_SCALAR(ShiftRight, a >> b)
#undef KV_SCALAR

#define KV_VECTOR(name, expression)                                                    \
  template <class T>                                                                   \
  void name(LocalTensor<T> to, LocalTensor<T> left, LocalTensor<T> right, int count) { \
    for (int i = 0; i < count; ++i) {                                                  \
      const T a = left.data(count)[i], b = right.data(count)[i];                       \
      to.data(count)[i] = T(expression);                                               \
    }                                                                                  \
  }
KV_VECTOR(Add, a + b)
KV_VECTOR(Sub, a - b)
KV_VECTOR(Mul, a* b)
KV_VECTOR(Div, a / b)
KV_VECTOR(Max, a > b ? a : b)
KV_VECTOR(Min, a < b ? a : b)
#undef KV_VECTOR

inline void ReduceMax(LocalTensor<float> to, LocalTensor<float> from, LocalTensor<float>, int count) {
  float largest = from.data(count)[0];
  for (int i = 1; i < count; ++i) largest = fmaxf(largest, from.data(count)[i]);
  to.data(1)[0] = largest;
}
inline void ReduceMin(LocalTensor<float> to, LocalTensor<float> from, LocalTensor<float>, int count) {
  float smallest = from.data(count)[0];
  for (int i = 1; i < count; ++i) smallest = fminf(smallest, from.data(count)[i]);
  to.data(1)[0] = smallest;
}

struct GatherMaskParams {
  uint8_t src0BlockStride;
  uint16_t repeatTimes, src0RepeatStride;
  uint8_t src1RepeatStride;
};
inline void GatherMask(LocalTensor<int16_t> to, LocalTensor<int16_t> from, uint8_t pattern, bool, uint32_t,
                       GatherMaskParams params, uint64_t& count) {
  const int elements = params.repeatTimes * 128;
  count = elements / 2;
  for (int i = 0; i < elements / 2; ++i) to.data(elements / 2)[i] = from.data(elements)[2 * i + (pattern == 2)];
}

}  // namespace AscendC

#include "host_functions.h"

namespace kv {

template <class Memory, class Wire, bool kEncode>
void run_core(GM_ADDR launch);

template <class Memory, class Wire, bool kEncode>
void launch_on_host(const Launch& launch, const unsigned blocks[2], unsigned) {
  AscendC::block_count = int(blocks[0] * blocks[1]);
  for (AscendC::block_index = 0; AscendC::block_index < AscendC::block_count; ++AscendC::block_index) {
    run_core<Memory, Wire, kEncode>(reinterpret_cast<GM_ADDR>(const_cast<Launch*>(&launch)));
  }
}

}  // namespace kv
