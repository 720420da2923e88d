// SPDX-License-Identifier: Apache-2.0
// Kernels as functions of a host library, which emulated devices take for a module. The includer has
// kv::launch_on_host, which runs one launch. KV_HOST_ARGUMENT: the type of a kernel's argument, unless it is a Launch.
#pragma once

#include "cuda/kv_launch.h"

#ifndef KV_HOST_ARGUMENT
#define KV_HOST_ARGUMENT kv::Launch
#endif

#define KV_HOST_FUNCTION(name, Memory, Wire, encode)                                                                  \
  extern "C" {                                                                                                        \
  __attribute__((visibility("default"))) void name(const void* launch, const unsigned* blocks, unsigned threads,      \
                                                   unsigned) {                                                        \
    kv::launch_on_host<kv::Memory, kv::Wire, encode>(*static_cast<const KV_HOST_ARGUMENT*>(launch), blocks, threads); \
  }                                                                                                                   \
  __attribute__((visibility("default"))) extern const unsigned name##_argument_bytes = sizeof(KV_HOST_ARGUMENT);      \
  }
#define KV_KERNELS(memory, Memory, wire, Wire)                      \
  KV_HOST_FUNCTION(kv_encode_##memory##_##wire, Memory, Wire, true) \
  KV_HOST_FUNCTION(kv_decode_##memory##_##wire, Memory, Wire, false)
