// SPDX-License-Identifier: Apache-2.0
// Kernels as functions of a host library, which emulated devices take for a module. The includer has
// kv::launch_on_host, which runs one launch.
#pragma once

#include "cuda/kv_launch.h"

#define KV_HOST_FUNCTION(name, Memory, Wire, encode)                                                             \
  extern "C" {                                                                                                   \
  __attribute__((visibility("default"))) void name(const void* launch, const unsigned* blocks, unsigned threads, \
                                                   unsigned) {                                                   \
    kv::launch_on_host<kv::Memory, kv::Wire, encode>(*static_cast<const kv::Launch*>(launch), blocks, threads);  \
  }                                                                                                              \
  __attribute__((visibility("default"))) extern const unsigned name##_argument_bytes = sizeof(kv::Launch);       \
  }
#define KV_KERNELS(memory, Memory, wire, Wire)                      \
  KV_HOST_FUNCTION(kv_encode_##memory##_##wire, Memory, Wire, true) \
  KV_HOST_FUNCTION(kv_decode_##memory##_##wire, Memory, Wire, false)
