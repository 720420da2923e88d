// SPDX-License-Identifier: Apache-2.0
// An emulation of exactly those XPU C++ built-ins that xpu_kernel.xpu uses, and launches on the host, for emulated
// devices and tests: cores run one after the other.
#pragma once

#include <stdint.h>
#include <string.h>

#define __device__
#define __global_ptr__

// Streams run kernels beside one another.
inline thread_local int shim_core = 0, shim_cores = 1, shim_cluster = 0, shim_clusters = 1;
inline int core_id() { return shim_core; }
inline int core_num() { return shim_cores; }
inline int cluster_id() { return shim_cluster; }
inline int cluster_num() { return shim_clusters; }
inline void mfence_lm() {}
inline void GM2LM(const void* from, void* to, int bytes) { memcpy(to, from, bytes); }
inline void LM2GM(const void* from, void* to, int bytes) { memcpy(to, from, bytes); }

#define KV_HOST_ARGUMENT uint64_t  // the address of a Launch
#include "host_functions.h"

namespace kv {

struct CoreMemory;
template <class Memory, class Wire, bool kEncode>
void run_core(uint64_t address, CoreMemory* lm);

template <class Memory, class Wire, bool kEncode, class Core = CoreMemory>
void launch_on_host(uint64_t launch, const unsigned blocks[2], unsigned threads) {
  Core lm;
  shim_clusters = int(blocks[0]);
  shim_cores = int(threads);
  for (shim_cluster = 0; shim_cluster < shim_clusters; ++shim_cluster) {
    for (shim_core = 0; shim_core < shim_cores; ++shim_core) run_core<Memory, Wire, kEncode>(launch, &lm);
  }
}

}  // namespace kv
