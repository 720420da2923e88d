// SPDX-License-Identifier: Apache-2.0
// The XPU kernels over their host shim: cores one after the other.
#include "kunlunxin/decode.xpu"
#include "kunlunxin/encode.xpu"

extern "C" int kv_launch(const kv::CoreLaunch* launch, int decode) {
  shim_cores = 3;
  for (shim_core = 0; shim_core < shim_cores; ++shim_core) decode ? kv_decode(*launch) : kv_encode(*launch);
  return 0;
}
