// SPDX-License-Identifier: Apache-2.0
// An emulation of exactly those BANG C intrinsics that bang_kernel.mlu uses, and launches on the host, for emulated
// devices and tests: tasks run one after the other.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define __mlu_func__ inline
#define __nram__ static thread_local  // streams run kernels beside one another

inline thread_local int taskId = 0, taskDim = 1;

enum mluMemcpyDirection_t { GDRAM2NRAM, NRAM2GDRAM };
inline void __memcpy(void* to, const void* from, int bytes, mluMemcpyDirection_t) { memcpy(to, from, bytes); }

inline void __bang_write_value(float* to, int count, float value) {
  for (int i = 0; i < count; ++i) to[i] = value;
}
inline void __bang_mul(float* to, const float* a, const float* b, int count) {
  for (int i = 0; i < count; ++i) to[i] = a[i] * b[i];
}
inline void __bang_mul_scalar(float* to, const float* a, float b, int count) {
  for (int i = 0; i < count; ++i) to[i] = a[i] * b;
}
inline void __bang_maximum(float* to, const float* a, const float* b, int count) {
  for (int i = 0; i < count; ++i) to[i] = fmaxf(a[i], b[i]);
}
// The largest value in to[0], its index as an integer in to[1].
inline void __bang_argmax(float* to, const float* a, int count) {
  uint32_t index = 0;
  for (int i = 1; i < count; ++i) index = a[i] > a[index] ? i : index;
  to[0] = a[index];
  memcpy(to + 1, &index, 4);
}

#include "host_functions.h"

namespace kv {

template <class Memory, class Wire, bool kEncode>
void run_task(const Launch& launch);

template <class Memory, class Wire, bool kEncode>
void launch_on_host(const Launch& launch, const unsigned blocks[2], unsigned) {
  taskDim = int(blocks[0] * blocks[1]);
  for (taskId = 0; taskId < taskDim; ++taskId) run_task<Memory, Wire, kEncode>(launch);
}

}  // namespace kv
