// SPDX-License-Identifier: Apache-2.0
// Encoding and decoding in Ascend C: of the tiles of all planes and layers a vector core takes every GetBlockNum()-th.
//
// Rows lie in unified buffer at a pitch of 64 elements, as many at a time as kLanes hold. Never run on a card;
// host_shim.h emulates the interface.
#include "lanes.h"

namespace kv {

template <class Memory, class Wire>
class TileKernel : Lanes {
 public:
  // `launch`: a Launch in global memory.
  __aicore__ inline void Init(GM_ADDR launch) {
    GlobalTensor<uint32_t> words;
    words.SetGlobalBuffer((__gm__ uint32_t*)launch);
    uint32_t* to = reinterpret_cast<uint32_t*>(&launch_);
    for (int i = 0; i < kHeaderBytes / 4; ++i) to[i] = words.GetValue(i);
    layers_.SetGlobalBuffer((__gm__ uint64_t*)(launch + kHeaderBytes));
    const uint64_t ids =
        uint64_t(launch + kHeaderBytes) + uint64_t(launch_.planes) * launch_.layers * sizeof(LayerPlane);
    ids_.SetGlobalBuffer((__gm__ int32_t*)ids);
    pipe_.InitBuffer(in_, 1, kLanes * 4);
    pipe_.InitBuffer(out_, 1, kLanes * 4);
    InitLanes(pipe_);
    for (TBuf<QuePosition::VECCALC>* buffer : {&cells_, &lows_, &zeros_}) pipe_.InitBuffer(*buffer, kLanes * 4);
  }

  template <bool kEncode>
  __aicore__ inline void Run() {
    int index = GetBlockIdx();  // of a tile, counted from the row's first
    for (int row = 0; row < launch_.planes * launch_.layers; ++row) {
      shape_ = shape_at(launch_, row);
      const int tiles = tile_count(shape_);
      if (index < tiles) SetRow(row);
      for (; index < tiles; index += GetBlockNum()) {
        tile_ = place_at(shape_, index, Wire::kBits);
        scales_ = wire_ + tile_.wire_offset;
        codes_ = scales_ + uint64_t(tile_.scale_bytes) * (1 + shape_.zero_point);
        kEncode ? Encode() : Decode();
      }
      index -= tiles;
    }
  }

 private:
  static constexpr Small kMemory = SmallOf<Memory>::kValue, kWire = SmallOf<Wire>::kValue;
  static constexpr bool kInt4 = Wire::kInt4, kScaledMemory = HasScale<Memory>::kValue;
  static constexpr int kHeaderBytes = int(sizeof(Launch) - sizeof(Launch::data));
  static_assert(kHeaderBytes % 8 == 0, "the data of a Launch is words of 8 bytes");

  __aicore__ inline void SetRow(int row) {
    base_ = layers_.GetValue(2 * row);
    const uint64_t both = layers_.GetValue(2 * row + 1);
    memory_scale_ = float_of(uint32_t(both));
    tensor_scale_ = float_of(uint32_t(both >> 32));
    wire_ = wire_at(launch_, row);
    page_stride_ = launch_.plane[row % launch_.planes].page_stride;
    pitch_ = (shape_.dim + 63) / 64 * 64;
    chunk_ = kLanes / pitch_;
    row_bytes_ = shape_.dim * kWire.bits / 8;
  }

  __aicore__ inline void Encode() {
    if (tile_.scale_count > 0) {
      Reduce();
      MakeScales();
    }
    for (int first = 0; first < tile_.tokens; first += chunk_) Codes(first, Rows(first));
    const int used = tile_.tokens * row_bytes_;
    if (used == tile_.codes_bytes) return;
    LocalTensor<int16_t> padding = out_.AllocTensor<int16_t>();
    Duplicate(padding, int16_t(0), 16);
    Send(codes_ + used, padding.ReinterpretCast<uint8_t>(), 1, tile_.codes_bytes - used, 32);
  }

  __aicore__ inline void Decode() {
    if (tile_.scale_count > 0) {
      TakeCells(cells_.Get<float>(), scales_);
      if (shape_.zero_point) TakeCells(zeros_.Get<float>(), scales_ + tile_.scale_bytes);
      PipeBarrier<PIPE_ALL>();  // the scalar unit reads them
    }
    for (int first = 0; first < tile_.tokens; first += chunk_) Values(first, Rows(first));
  }

  __aicore__ inline int Rows(int first) { return tile_.tokens - first < chunk_ ? tile_.tokens - first : chunk_; }
  // Lanes of some rows, a multiple of what one repeat of the vector unit takes of 16-bit elements.
  __aicore__ inline int LanesOf(int rows) { return (rows * pitch_ + 127) / 128 * 128; }

  // -- transfers

  // Gaps in unified buffer are counted in 32 bytes.
  __aicore__ inline uint32_t Gap(int rows, int bytes, int pitch_bytes) {
    return uint32_t(rows > 1 ? (pitch_bytes - (bytes + 31) / 32 * 32) / 32 : 0);
  }

  __aicore__ inline Bytes Receive(uint64_t address, int rows, int bytes, int pitch_bytes) {
    Bytes local = in_.AllocTensor<uint8_t>();
    GlobalTensor<uint8_t> global;
    global.SetGlobalBuffer((__gm__ uint8_t*)address);
    DataCopyPad(local, global, DataCopyExtParams{uint16_t(rows), uint32_t(bytes), 0, Gap(rows, bytes, pitch_bytes), 0},
                DataCopyPadExtParams<uint8_t>{false, 0, 0, 0});
    in_.EnQue(local);
    return in_.DeQue<uint8_t>();
  }

  __aicore__ inline void Send(uint64_t address, Bytes filled, int rows, int bytes, int pitch_bytes) {
    out_.EnQue(filled);
    Bytes local = out_.DeQue<uint8_t>();
    GlobalTensor<uint8_t> global;
    global.SetGlobalBuffer((__gm__ uint8_t*)address);
    DataCopyPad(global, local, DataCopyExtParams{uint16_t(rows), uint32_t(bytes), Gap(rows, bytes, pitch_bytes), 0, 0});
    out_.FreeTensor(local);
  }

  // bf16 of the wire as fp32.
  __aicore__ inline void TakeCells(LocalTensor<float> to, uint64_t address) {
    Bytes sent = Receive(address, 1, tile_.scale_bytes, 32);
    Cast(to, sent.ReinterpretCast<bfloat16_t>(), RoundMode::CAST_NONE, tile_.scale_count);
    in_.FreeTensor(sent);
  }

  // The upper halves of fp32 in `cells`, whose lower ones are zero; a_ is used.
  __aicore__ inline void SendCells(uint64_t address, Ints cells) {
    Ints top = a_.Get<int32_t>();
    ShiftRight(top, cells, int32_t(16), tile_.scale_count);
    LocalTensor<int16_t> sent = out_.AllocTensor<int16_t>();
    Duplicate(sent, int16_t(0), tile_.scale_bytes / 2);
    Cast(sent, top, RoundMode::CAST_NONE, tile_.scale_count);
    Send(address, sent.ReinterpretCast<uint8_t>(), 1, tile_.scale_bytes, 32);
  }

  __aicore__ inline uint64_t RowAddress(int token) {
    const int64_t place = tile_.place + token, page = place / shape_.page_tokens;
    const int64_t element = tile_.head_offset + (place - page * shape_.page_tokens) * shape_.token_stride;
    return base_ + uint64_t(ids_.GetValue(page) * page_stride_ + element * (kMemory.bits / 8));
  }

  // Rows of memory as fp32 in values_, their signs (0 or 1) in sign_.
  __aicore__ inline void Load(int first, int rows) {
    const int item = kMemory.bits / 8;
    Bytes local = in_.AllocTensor<uint8_t>();
    for (int row = 0; row < rows; ++row) {
      GlobalTensor<uint8_t> global;
      global.SetGlobalBuffer((__gm__ uint8_t*)RowAddress(first + row));
      DataCopyPad(local[row * pitch_ * item], global, DataCopyExtParams{1, uint32_t(shape_.dim * item), 0, 0, 0},
                  DataCopyPadExtParams<uint8_t>{false, 0, 0, 0});
    }
    in_.EnQue(local);
    local = in_.DeQue<uint8_t>();
    const int n = LanesOf(rows);
    Widen<Memory>(local, n);
    in_.FreeTensor(local);
    if (kScaledMemory) Muls(values_.Get<float>(), values_.Get<float>(), memory_scale_, n);
  }

  // magnitude_ and sign_ to rows of memory.
  __aicore__ inline void Store(int first, int rows, int n) {
    const int item = kMemory.bits / 8;
    Bytes out = out_.AllocTensor<uint8_t>();
    Finish<Memory>(out, n);
    out_.EnQue(out);
    out = out_.DeQue<uint8_t>();
    for (int row = 0; row < rows; ++row) {
      GlobalTensor<uint8_t> global;
      global.SetGlobalBuffer((__gm__ uint8_t*)RowAddress(first + row));
      DataCopyPad(global, out[row * pitch_ * item], DataCopyExtParams{1, uint32_t(shape_.dim * item), 0, 0, 0});
    }
    out_.FreeTensor(out);
  }

  // -- scales and zero points

  __aicore__ inline void Reduce() {
    LocalTensor<float> cells = cells_.Get<float>(), lows = lows_.Get<float>();
    Duplicate(cells, shape_.zero_point ? -float_of(kLargestFp32) : 0.0f, tile_.scale_count);
    if (shape_.zero_point) Duplicate(lows, float_of(kLargestFp32), tile_.scale_count);
    PipeBarrier<PIPE_ALL>();
    for (int first = 0; first < tile_.tokens; first += chunk_) {
      const int rows = Rows(first), n = LanesOf(rows);
      Load(first, rows);
      Unsigned(n);
      Ints finite = a_.Get<int32_t>();
      Above(finite, magnitude_.Get<int32_t>(), kLargestFp32, n);
      Not(finite, n);
      LocalTensor<float> values = shape_.zero_point ? values_.Get<float>() : magnitude_.Get<float>();
      Mul(values.ReinterpretCast<int32_t>(), values.ReinterpretCast<int32_t>(), finite, n);
      if (shape_.zero_point) Adds(values, values, 0.0f, n);  // -0 becomes 0
      for (int row = 0; row < rows; ++row) {
        LocalTensor<float> of_row = values[row * pitch_];
        if (shape_.granularity == kChannel) {
          Max(cells, cells, of_row, shape_.dim);
          if (shape_.zero_point) Min(lows, lows, of_row, shape_.dim);
          continue;
        }
        ReduceMax(b_.Get<float>(), of_row, c_.Get<float>(), shape_.dim);
        if (shape_.zero_point) ReduceMin(a_.Get<float>(), of_row, c_.Get<float>(), shape_.dim);
        PipeBarrier<PIPE_ALL>();  // the scalar unit reads what the vector unit wrote
        const int cell = shape_.granularity == kToken ? first + row : 0;
        const float largest = b_.Get<float>().GetValue(0);
        if (cells.GetValue(cell) < largest) cells.SetValue(cell, largest);
        if (shape_.zero_point && a_.Get<float>().GetValue(0) < lows.GetValue(cell)) {
          lows.SetValue(cell, a_.Get<float>().GetValue(0));
        }
        PipeBarrier<PIPE_ALL>();
      }
    }
  }

  // Largest magnitudes, or with a zero point values, in cells_ and smallest ones in lows_ to what is sent; what values
  // are multiplied by in cells_, zero points in zeros_.
  __aicore__ inline void MakeScales() {
    const int n = tile_.scale_count;
    LocalTensor<float> cells = cells_.Get<float>(), ones = a_.Get<float>();
    Ints bits = cells_.Get<int32_t>();
    if (shape_.zero_point) {
      MakeZeros(n);
      Sub(cells, cells, zeros_.Get<float>(), n);
      Muls(cells, cells, float_of(0x3D888889u), n);  // 1/15, up
      Mins(bits, bits, int32_t(kLargestBf16), n);
    } else {
      Muls(cells, cells, float_of(Wire::kReciprocal), n);
    }
    Adds(bits, bits, 0xFFFF, n);
    ShiftRightInts(bits, bits, 16, n);
    ShiftLeftInts(bits, bits, 16, n);
    Maxs(bits, bits, int32_t(kSmallestScale), n);
    Mins(bits, bits, int32_t(kLargestBf16), n);
    SendCells(scales_, bits);
    if (shape_.zero_point) SendCells(scales_ + tile_.scale_bytes, zeros_.Get<int32_t>());
    Duplicate(ones, 1.0f, n);
    Div(cells, ones, cells, n);
    PipeBarrier<PIPE_ALL>();
  }

  // The largest bf16 at or below each of lows_.
  __aicore__ inline void MakeZeros(int n) {
    Ints low = lows_.Get<int32_t>(), zero = zeros_.Get<int32_t>(), sign = a_.Get<int32_t>(), up = b_.Get<int32_t>();
    ShiftRightInts(sign, low, 31, n);
    ShiftLeftInts(zero, low, 1, n);
    ShiftRightInts(zero, zero, 1, n);
    Muls(up, sign, 0xFFFF, n);
    Add(zero, zero, up, n);
    ShiftRightInts(zero, zero, 16, n);
    ShiftLeftInts(zero, zero, 16, n);
    Mins(zero, zero, int32_t(kLargestBf16), n);
    ShiftLeftInts(sign, sign, 31, n);
    Add(zero, zero, sign, n);
  }

  // values_ times the scale (or its reciprocal) of each row or channel.
  __aicore__ inline void Multiply(int first, int rows, float tensor_factor) {
    if (shape_.granularity == kNone) return;
    LocalTensor<float> values = values_.Get<float>(), cells = cells_.Get<float>();
    if (shape_.granularity == kTensor) {
      Muls(values, values, tensor_factor, LanesOf(rows));
      return;
    }
    for (int row = 0; row < rows; ++row) {
      LocalTensor<float> of_row = values[row * pitch_];
      if (shape_.granularity == kChannel) {
        Mul(of_row, of_row, cells, shape_.dim);
      } else {
        Muls(of_row, of_row, cells.GetValue(shape_.granularity == kToken ? first + row : 0), shape_.dim);
      }
    }
  }

  // values_ plus or minus the zero point of each row or channel.
  __aicore__ inline void Shift(int first, int rows, bool up) {
    LocalTensor<float> values = values_.Get<float>(), zeros = zeros_.Get<float>();
    for (int row = 0; row < rows; ++row) {
      LocalTensor<float> of_row = values[row * pitch_];
      if (shape_.granularity == kChannel) {
        up ? Add(of_row, of_row, zeros, shape_.dim) : Sub(of_row, of_row, zeros, shape_.dim);
      } else {
        const float zero = zeros.GetValue(shape_.granularity == kToken ? first + row : 0);
        Adds(of_row, of_row, up ? zero : -zero, shape_.dim);
      }
    }
  }

  __aicore__ inline int CodePitch() { return pitch_ * kWire.bits / 8; }

  __aicore__ inline void Codes(int first, int rows) {
    const int n = LanesOf(rows);
    Load(first, rows);
    const float tensor_factor = shape_.granularity == kTensor ? reciprocal(tensor_scale_) : 1.0f;
    if (kInt4 && shape_.zero_point) {
      ZeroNans(n);
      Shift(first, rows, false);
    }
    Multiply(first, rows, tensor_factor);
    Unsigned(n);
    Bytes codes = out_.AllocTensor<uint8_t>();
    if constexpr (kInt4) {
      shape_.zero_point ? Steps(n) : SignedNibbles(n);
      PackNibbles(codes, n);
    } else {
      Finish<Wire>(codes, n);
    }
    Send(codes_ + uint64_t(first) * row_bytes_, codes, rows, row_bytes_, CodePitch());
  }

  __aicore__ inline void Values(int first, int rows) {
    const int n = LanesOf(rows);
    Bytes codes = Receive(codes_ + uint64_t(first) * row_bytes_, rows, row_bytes_, CodePitch());
    if constexpr (kInt4) {
      Nibbles(codes, !shape_.zero_point, n);
    } else {
      Widen<Wire>(codes, n);
    }
    in_.FreeTensor(codes);
    Multiply(first, rows, tensor_scale_);
    if (shape_.zero_point) {
      Shift(first, rows, true);
      Signs(n);
    }
    if (kScaledMemory) Muls(values_.Get<float>(), values_.Get<float>(), reciprocal(memory_scale_), n);
    Unsigned(n);
    Store(first, rows, n);
  }

  Launch launch_;  // without its data
  Shape shape_;
  TilePlace tile_;
  uint64_t base_, wire_, scales_, codes_;
  int64_t page_stride_;
  float memory_scale_, tensor_scale_;
  int pitch_, chunk_, row_bytes_;
  TPipe pipe_;
  TQue<QuePosition::VECIN, 1> in_;
  TQue<QuePosition::VECOUT, 1> out_;
  TBuf<QuePosition::VECCALC> cells_, lows_, zeros_;
  GlobalTensor<uint64_t> layers_;
  GlobalTensor<int32_t> ids_;
};

template <class Memory, class Wire, bool kEncode>
__aicore__ inline void run_core(GM_ADDR launch) {
  TileKernel<Memory, Wire> kernel;
  kernel.Init(launch);
  kernel.template Run<kEncode>();
}

}  // namespace kv

#ifndef KV_HOST_SHIM
#define KV_KERNELS(memory, Memory, wire, Wire)                                        \
  extern "C" __global__ __aicore__ void kv_encode_##memory##_##wire(GM_ADDR launch) { \
    kv::run_core<kv::Memory, kv::Wire, true>(launch);                                 \
  }                                                                                   \
  extern "C" __global__ __aicore__ void kv_decode_##memory##_##wire(GM_ADDR launch) { \
    kv::run_core<kv::Memory, kv::Wire, false>(launch);                                \
  }
#endif

KV_ALL_KERNELS
