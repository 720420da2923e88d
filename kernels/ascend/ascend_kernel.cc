// SPDX-License-Identifier: Apache-2.0
// Encoding and decoding of tiles in Ascend C: a vector core takes every GetBlockNum()-th tile.
//
// Rows lie in unified buffer at a pitch of 64 elements, as many at a time as 4096 lanes hold.
// The vector unit of Atlas A2 has neither fp8 nor comparisons of int32, so all is shifts, sums,
// minima and maxima of the bits of fp32. Never run on a card; host_shim.h emulates the interface.
#ifdef KV_HOST_SHIM
#include "host_shim.h"
#else
#include "kernel_operator.h"
#endif
#define KV_FN __aicore__ inline
#include "core_tile.h"

using namespace AscendC;

namespace {

constexpr int kLanes = 4096;
using Ints = LocalTensor<int32_t>;

// A float of fewer bits on the way from or to fp32.
struct Small {
  int mantissa, bias, largest;
};

class TileKernel {
 public:
  __aicore__ inline void Init(GM_ADDR arguments) {
    GlobalTensor<uint32_t> words;
    words.SetGlobalBuffer((__gm__ uint32_t*)arguments);
    uint32_t* to = reinterpret_cast<uint32_t*>(&launch_);
    for (int i = 0; i < int(sizeof(launch_) / 4); ++i) to[i] = words.GetValue(i);
    pages_.SetGlobalBuffer((__gm__ uint64_t*)launch_.pages);
    item_ = kv::memory_bytes(launch_);
    pitch_ = (launch_.dim + 63) / 64 * 64;
    code_pitch_ = launch_.wire_dtype == kv::kInt4 ? pitch_ / 2 : pitch_;
    chunk_ = kLanes / pitch_;
    pipe_.InitBuffer(in_, 1, kLanes * 4);
    pipe_.InitBuffer(out_, 1, kLanes * 4);
    for (TBuf<QuePosition::VECCALC>* buffer : {&values_, &magnitude_, &sign_, &nan_, &a_, &b_, &c_, &cells_}) {
      pipe_.InitBuffer(*buffer, kLanes * 4);
    }
  }

  __aicore__ inline void Encode() {
    for (int index = GetBlockIdx(); index < kv::core_tiles(launch_); index += GetBlockNum()) {
      tile_ = kv::core_tile_at(launch_, index);
      Magnitudes();
      Scales();
      for (int first = 0; first < tile_.tokens; first += chunk_) Codes(first, Rows(first));
      const int used = tile_.tokens * tile_.row_bytes;
      if (used < tile_.codes_bytes) {
        LocalTensor<int16_t> zeros = out_.AllocTensor<int16_t>();
        Duplicate(zeros, int16_t(0), 16);
        Send(tile_.codes + used, zeros.ReinterpretCast<uint8_t>(), 1, tile_.codes_bytes - used, 32);
      }
    }
  }

  __aicore__ inline void Decode() {
    for (int index = GetBlockIdx(); index < kv::core_tiles(launch_); index += GetBlockNum()) {
      tile_ = kv::core_tile_at(launch_, index);
      LocalTensor<uint8_t> scales = Receive(tile_.scales, 1, tile_.scale_bytes, 32);
      Cast(cells_.Get<float>(), scales.ReinterpretCast<bfloat16_t>(), RoundMode::CAST_NONE, tile_.scale_count);
      in_.FreeTensor(scales);
      for (int first = 0; first < tile_.tokens; first += chunk_) Values(first, Rows(first));
    }
  }

 private:
  __aicore__ inline int Rows(int first) { return tile_.tokens - first < chunk_ ? tile_.tokens - first : chunk_; }
  // Lanes of some rows, a multiple of what one repeat of the vector unit takes of 16-bit elements.
  __aicore__ inline int Lanes(int rows) { return (rows * pitch_ + 127) / 128 * 128; }

  // -- transfers

  __aicore__ inline LocalTensor<uint8_t> Receive(uint64_t address, int rows, int bytes, int pitch_bytes) {
    LocalTensor<uint8_t> local = in_.AllocTensor<uint8_t>();
    GlobalTensor<uint8_t> global;
    global.SetGlobalBuffer((__gm__ uint8_t*)address);
    const uint32_t gap = uint32_t(rows > 1 ? (pitch_bytes - (bytes + 31) / 32 * 32) / 32 : 0);
    DataCopyPad(local, global, DataCopyExtParams{uint16_t(rows), uint32_t(bytes), 0, gap, 0},
                DataCopyPadExtParams<uint8_t>{false, 0, 0, 0});
    in_.EnQue(local);
    return in_.DeQue<uint8_t>();
  }

  __aicore__ inline void Send(uint64_t address, LocalTensor<uint8_t> filled, int rows, int bytes, int pitch_bytes) {
    out_.EnQue(filled);
    LocalTensor<uint8_t> local = out_.DeQue<uint8_t>();
    GlobalTensor<uint8_t> global;
    global.SetGlobalBuffer((__gm__ uint8_t*)address);
    const uint32_t gap = uint32_t(rows > 1 ? (pitch_bytes - (bytes + 31) / 32 * 32) / 32 : 0);
    DataCopyPad(global, local, DataCopyExtParams{uint16_t(rows), uint32_t(bytes), gap, 0, 0});
    out_.FreeTensor(local);
  }

  __aicore__ inline uint64_t RowAddress(int token) {
    return pages_.GetValue(kv::page_of(launch_, tile_, token)) + kv::row_offset(launch_, tile_, token);
  }

  // Rows of memory as fp32 in values_, their bits without sign in magnitude_, signs in sign_.
  __aicore__ inline void Load(int first, int rows) {
    LocalTensor<uint8_t> local = in_.AllocTensor<uint8_t>();
    for (int row = 0; row < rows; ++row) {
      GlobalTensor<uint8_t> global;
      global.SetGlobalBuffer((__gm__ uint8_t*)RowAddress(first + row));
      DataCopyPad(local[row * pitch_ * item_], global, DataCopyExtParams{1, uint32_t(launch_.dim * item_), 0, 0, 0},
                  DataCopyPadExtParams<uint8_t>{false, 0, 0, 0});
    }
    in_.EnQue(local);
    local = in_.DeQue<uint8_t>();
    const int n = Lanes(rows);
    LocalTensor<float> values = values_.Get<float>();
    if (launch_.memory == kv::kFp32) {
      DataCopy(values, local.ReinterpretCast<float>(), n);
    } else if (launch_.memory == kv::kFp16) {
      Cast(values, local.ReinterpretCast<half>(), RoundMode::CAST_NONE, n);
    } else {
      Cast(values, local.ReinterpretCast<bfloat16_t>(), RoundMode::CAST_NONE, n);
    }
    in_.FreeTensor(local);
    ShiftRight(sign_.Get<uint32_t>(), values_.Get<uint32_t>(), 31u, n);
    Unsigned(n);
  }

  __aicore__ inline void Unsigned(int n) {
    ShiftLeft(magnitude_.Get<uint32_t>(), values_.Get<uint32_t>(), 1u, n);
    ShiftRight(magnitude_.Get<uint32_t>(), magnitude_.Get<uint32_t>(), 1u, n);
  }

  // 1 where `from` is above `limit`, else 0.
  __aicore__ inline void Above(Ints to, Ints from, int32_t limit, int n) {
    Adds(to, from, -limit, n);
    Maxs(to, to, 0, n);
    Mins(to, to, 1, n);
  }

  __aicore__ inline void ShiftRightInts(Ints to, Ints from, uint32_t bits, int n) {
    ShiftRight(to.ReinterpretCast<uint32_t>(), from.ReinterpretCast<uint32_t>(), bits, n);
  }
  __aicore__ inline void ShiftLeftInts(Ints to, Ints from, uint32_t bits, int n) {
    ShiftLeft(to.ReinterpretCast<uint32_t>(), from.ReinterpretCast<uint32_t>(), bits, n);
  }

  // -- scales

  __aicore__ inline void Magnitudes() {
    LocalTensor<float> cells = cells_.Get<float>();
    Duplicate(cells, 0.0f, tile_.scale_count);
    for (int first = 0; first < tile_.tokens; first += chunk_) {
      const int rows = Rows(first), n = Lanes(rows);
      Load(first, rows);
      Ints magnitude = magnitude_.Get<int32_t>(), finite = a_.Get<int32_t>();
      Above(finite, magnitude, 0x7F7FFFFF, n);
      Muls(finite, finite, -1, n);
      Adds(finite, finite, 1, n);
      Mul(magnitude, magnitude, finite, n);
      for (int row = 0; row < rows; ++row) {
        LocalTensor<float> of_row = magnitude_.Get<float>()[row * pitch_];
        if (launch_.granularity == kv::kPerChannel) {
          Max(cells, cells, of_row, launch_.dim);
          continue;
        }
        ReduceMax(b_.Get<float>(), of_row, c_.Get<float>(), launch_.dim);
        PipeBarrier<PIPE_ALL>();  // the scalar unit reads what the vector unit wrote
        const int cell = launch_.granularity == kv::kPerToken ? first + row : 0;
        const float largest = b_.Get<float>().GetValue(0), known = cells.GetValue(cell);
        cells.SetValue(cell, known < largest ? largest : known);
        PipeBarrier<PIPE_ALL>();
      }
    }
  }

  // Magnitudes in cells_ to scales on the wire, and their reciprocals in cells_.
  __aicore__ inline void Scales() {
    const int n = tile_.scale_count;
    LocalTensor<float> cells = cells_.Get<float>(), ones = a_.Get<float>();
    Ints bits = cells_.Get<int32_t>(), top = b_.Get<int32_t>();
    Muls(cells, cells, kv::reciprocal_up(launch_), n);
    Adds(bits, bits, 0xFFFF, n);
    ShiftRightInts(bits, bits, 16, n);
    ShiftLeftInts(bits, bits, 16, n);
    Maxs(bits, bits, int32_t(kv::kSmallestScale), n);
    Mins(bits, bits, int32_t(kv::kLargestBf16), n);
    ShiftRightInts(top, bits, 16, n);
    LocalTensor<int16_t> sent = out_.AllocTensor<int16_t>();
    Duplicate(sent, int16_t(0), tile_.scale_bytes / 2);
    Cast(sent, top, RoundMode::CAST_NONE, n);
    Send(tile_.scales, sent.ReinterpretCast<uint8_t>(), 1, tile_.scale_bytes, 32);
    Duplicate(ones, 1.0f, n);
    Div(cells, ones, cells, n);
    PipeBarrier<PIPE_ALL>();
  }

  // values_ times the scale (or its reciprocal) of each row or channel.
  __aicore__ inline void ApplyScales(int first, int rows) {
    LocalTensor<float> cells = cells_.Get<float>();
    for (int row = 0; row < rows; ++row) {
      LocalTensor<float> of_row = values_.Get<float>()[row * pitch_];
      if (launch_.granularity == kv::kPerChannel) {
        Mul(of_row, of_row, cells, launch_.dim);
      } else {
        Muls(of_row, of_row, cells.GetValue(launch_.granularity == kv::kPerToken ? first + row : 0), launch_.dim);
      }
    }
  }

  // -- elements. Magnitudes of fp32 in magnitude_ become codes without sign in place.

  __aicore__ inline void Narrow(Small to, int n) {
    const int shift = 23 - to.mantissa, least = (128 - to.bias) << 23;
    Ints m = magnitude_.Get<int32_t>(), low = a_.Get<int32_t>(), odd = b_.Get<int32_t>(), even = c_.Get<int32_t>();
    Mins(m, m, (to.largest << shift) + ((127 - to.bias) << 23), n);
    if (to.bias != 127) {
      // What is below the smallest normal, in units of the smallest denormal, rounds in a sum.
      const int magic = (128 - to.bias + shift) << 23;
      Mins(low, m, least, n);
      Adds(a_.Get<float>(), a_.Get<float>(), kv::float_of(uint32_t(magic)), n);
      Adds(low, low, -magic, n);
      Maxs(m, m, least, n);
    }
    ShiftRightInts(odd, m, shift, n);
    ShiftRightInts(even, odd, 1, n);
    ShiftLeftInts(even, even, 1, n);
    Sub(odd, odd, even, n);
    Add(m, m, odd, n);
    Adds(m, m, (1 << (shift - 1)) - 1, n);
    ShiftRightInts(m, m, shift, n);
    if (to.bias != 127) {
      Adds(m, m, -((128 - to.bias) << to.mantissa), n);
      Add(m, m, low, n);
    }
  }

  __aicore__ inline Small WireFloat() {
    return launch_.wire_dtype == kv::kFp8E4m3 ? Small{3, 7, 0x7E} : Small{2, 15, 0x7B};
  }

  __aicore__ inline void Codes(int first, int rows) {
    const int n = Lanes(rows);
    Load(first, rows);
    Ints m = magnitude_.Get<int32_t>(), sign = sign_.Get<int32_t>(), nan = nan_.Get<int32_t>(), a = a_.Get<int32_t>();
    Above(nan, m, 0x7F800000, n);
    ApplyScales(first, rows);
    Unsigned(n);
    LocalTensor<int16_t> shorts = a_.Get<int16_t>();
    int bytes = n;
    if (launch_.wire_dtype == kv::kInt4) {
      Mins(m, m, 0x40E00000, n);  // 7.0
      Adds(magnitude_.Get<float>(), magnitude_.Get<float>(), 8388608.0f, n);
      Adds(m, m, -0x4B000000, n);  // 2**23: a sum with it rounds
      Muls(nan, nan, -1, n);
      Adds(nan, nan, 1, n);
      Mul(m, m, nan, n);
      Muls(sign, sign, -2, n);
      Adds(sign, sign, 1, n);
      Mul(m, m, sign, n);
      Adds(m, m, 16, n);  // -7 … 7 to 9 … 15, 0 … 7
      ShiftRightInts(a, m, 4, n);
      ShiftLeftInts(a, a, 4, n);
      Sub(m, m, a, n);
      LocalTensor<int16_t> nibbles = b_.Get<int16_t>(), high = c_.Get<int16_t>();
      Cast(nibbles, m, RoundMode::CAST_NONE, n);
      uint64_t count = 0;
      const GatherMaskParams whole{1, uint16_t(n / 128), 8, 0};
      GatherMask(shorts, nibbles, uint8_t(1), false, 0, whole, count);  // pattern 1: even elements
      GatherMask(high, nibbles, uint8_t(2), false, 0, whole, count);    // pattern 2: odd elements
      bytes = n / 2;
      Muls(high, high, int16_t(16), bytes);
      Add(shorts, shorts, high, bytes);
    } else {
      const Small wire = WireFloat();
      Narrow(wire, n);
      Muls(nan, nan, (launch_.wire_dtype == kv::kFp8E4m3 ? 0x7F : 0x7E) - wire.largest, n);
      Add(m, m, nan, n);
      ShiftLeftInts(sign, sign, 7, n);
      Add(m, m, sign, n);
      Cast(shorts, m, RoundMode::CAST_NONE, n);
    }
    LocalTensor<uint8_t> codes = out_.AllocTensor<uint8_t>();
    Cast(b_.Get<half>(), shorts, RoundMode::CAST_NONE, bytes);
    Cast(codes, b_.Get<half>(), RoundMode::CAST_NONE, bytes);
    Send(tile_.codes + uint64_t(first) * tile_.row_bytes, codes, rows, tile_.row_bytes, code_pitch_);
  }

  __aicore__ inline void Values(int first, int rows) {
    const int n = Lanes(rows);
    const uint64_t from = tile_.codes + uint64_t(first) * tile_.row_bytes;
    LocalTensor<uint8_t> codes = Receive(from, rows, tile_.row_bytes, code_pitch_);
    Ints m = magnitude_.Get<int32_t>(), sign = sign_.Get<int32_t>(), nan = nan_.Get<int32_t>();
    Ints a = a_.Get<int32_t>(), b = b_.Get<int32_t>(), bits = values_.Get<int32_t>();
    const int bytes = launch_.wire_dtype == kv::kInt4 ? n / 2 : n;
    Cast(b_.Get<half>(), codes, RoundMode::CAST_NONE, bytes);
    Cast(m, b_.Get<half>(), RoundMode::CAST_RINT, bytes);
    in_.FreeTensor(codes);
    if (launch_.wire_dtype == kv::kInt4) {
      ShiftRightInts(a, m, 4, bytes);
      ShiftLeftInts(b, a, 4, bytes);
      Sub(m, m, b, bytes);
      ShiftLeftInts(a, a, 16, bytes);
      Add(m, m, a, bytes);  // a byte's two nibbles are now two neighbouring int16
      LocalTensor<int16_t> nibbles = magnitude_.Get<int16_t>(), high = a_.Get<int16_t>();
      ShiftRight(high, nibbles, int16_t(3), n);
      Muls(high, high, int16_t(-16), n);
      Add(nibbles, nibbles, high, n);
      Cast(values_.Get<float>(), nibbles, RoundMode::CAST_NONE, n);
      ShiftRightInts(sign, bits, 31, n);
    } else {
      const Small wire = WireFloat();
      const int shift = 23 - wire.mantissa, normal = 1 << wire.mantissa;
      ShiftRightInts(sign, m, 7, n);
      ShiftLeftInts(a, sign, 7, n);
      Sub(m, m, a, n);
      Mins(a, m, normal, n);
      Cast(values_.Get<float>(), a, RoundMode::CAST_NONE, n);
      Muls(values_.Get<float>(), values_.Get<float>(), kv::float_of(uint32_t(128 - wire.bias - wire.mantissa) << 23),
           n);
      Maxs(a, m, normal, n);
      ShiftLeftInts(a, a, shift, n);
      Adds(a, a, -(1 << 23), n);
      Add(bits, bits, a, n);
      // e4m3: 480 becomes NaN; e5m2: 2**16 becomes infinity, and what is above it NaN.
      const bool e4m3 = launch_.wire_dtype == kv::kFp8E4m3;
      Above(nan, m, wire.largest, n);
      Muls(nan, nan, e4m3 ? 0x7FC00000 - 0x43F00000 : 0x38000000, n);
      Add(bits, bits, nan, n);
    }
    ApplyScales(first, rows);
    Unsigned(n);
    Store(first, rows, n);
  }

  // magnitude_ and sign_ to rows of memory.
  __aicore__ inline void Store(int first, int rows, int n) {
    Ints m = magnitude_.Get<int32_t>(), sign = sign_.Get<int32_t>(), nan = nan_.Get<int32_t>();
    Ints special = values_.Get<int32_t>(), a = a_.Get<int32_t>();
    LocalTensor<uint8_t> out = out_.AllocTensor<uint8_t>();
    Above(nan, m, 0x7F800000, n);
    if (launch_.memory == kv::kFp32) {
      Muls(a, m, -1, n);
      Adds(a, a, 0x7FC00000, n);
      Mul(a, a, nan, n);
      Add(m, m, a, n);
      ShiftLeftInts(sign, sign, 31, n);
      Add(out.ReinterpretCast<int32_t>(), m, sign, n);
    } else {
      const bool fp16 = launch_.memory == kv::kFp16;
      Above(special, m, 0x7F7FFFFF, n);
      Narrow(fp16 ? Small{10, 15, 0x7BFF} : Small{7, 127, 0x7F7F}, n);
      Add(m, m, special, n);
      Muls(nan, nan, fp16 ? 0x200 : 0x40, n);
      Add(m, m, nan, n);
      Muls(sign, sign, -32768, n);
      Add(m, m, sign, n);
      Cast(out.ReinterpretCast<int16_t>(), m, RoundMode::CAST_NONE, n);
    }
    out_.EnQue(out);
    out = out_.DeQue<uint8_t>();
    for (int row = 0; row < rows; ++row) {
      GlobalTensor<uint8_t> global;
      global.SetGlobalBuffer((__gm__ uint8_t*)RowAddress(first + row));
      DataCopyPad(global, out[row * pitch_ * item_], DataCopyExtParams{1, uint32_t(launch_.dim * item_), 0, 0, 0});
    }
    out_.FreeTensor(out);
  }

  kv::CoreLaunch launch_;
  kv::CoreTile tile_;
  int item_, pitch_, code_pitch_, chunk_;
  TPipe pipe_;
  TQue<QuePosition::VECIN, 1> in_;
  TQue<QuePosition::VECOUT, 1> out_;
  TBuf<QuePosition::VECCALC> values_, magnitude_, sign_, nan_, a_, b_, c_, cells_;
  GlobalTensor<uint64_t> pages_;
};

}  // namespace

// `launch` is a kv::CoreLaunch in global memory.
extern "C" __global__ __aicore__ void kv_encode(GM_ADDR launch) {
  TileKernel kernel;
  kernel.Init(launch);
  kernel.Encode();
}

extern "C" __global__ __aicore__ void kv_decode(GM_ADDR launch) {
  TileKernel kernel;
  kernel.Init(launch);
  kernel.Decode();
}
