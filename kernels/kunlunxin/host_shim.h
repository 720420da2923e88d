// SPDX-License-Identifier: Apache-2.0
// An emulation of exactly those XPU C++ built-ins that xpu_kernel.h uses, for tests on a CPU.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define __device__
#define __global__
#define __local__
#define __global_ptr__

inline int shim_core = 0, shim_cores = 1;
inline int core_id() { return shim_core; }
inline int core_num() { return shim_cores; }
inline int cluster_id() { return 0; }
inline int cluster_num() { return 1; }
inline void mfence_lm() {}
inline void GM2LM(const void* from, void* to, int bytes) { memcpy(to, from, bytes); }
inline void LM2GM(const void* from, void* to, int bytes) { memcpy(to, from, bytes); }

struct float32x16_t {
  float lane[16];
};
inline float32x16_t vload_lm_float32x16(const float* from) {
  float32x16_t vector;
  memcpy(vector.lane, from, sizeof(vector.lane));
  return vector;
}
inline void vstore_lm_float32x16(float* to, float32x16_t vector) { memcpy(to, vector.lane, sizeof(vector.lane)); }
inline float32x16_t vvmul_float32x16(float32x16_t a, float32x16_t b) {
  for (int i = 0; i < 16; ++i) a.lane[i] *= b.lane[i];
  return a;
}
inline float32x16_t svmul_float32x16(float a, float32x16_t b) {
  for (int i = 0; i < 16; ++i) b.lane[i] *= a;
  return b;
}
inline float32x16_t vvmax_float32x16(float32x16_t a, float32x16_t b) {
  for (int i = 0; i < 16; ++i) a.lane[i] = fmaxf(a.lane[i], b.lane[i]);
  return a;
}
