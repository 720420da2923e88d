// SPDX-License-Identifier: Apache-2.0
// The Ascend C kernel over its host shim: cores one after the other.
#include "ascend/ascend_kernel.cc"

extern "C" int kv_launch(kv::CoreLaunch* launch, int decode) {
  AscendC::block_count = 3;
  for (AscendC::block_index = 0; AscendC::block_index < 3; ++AscendC::block_index) {
    decode ? kv_decode(reinterpret_cast<GM_ADDR>(launch)) : kv_encode(reinterpret_cast<GM_ADDR>(launch));
  }
  return 0;
}
