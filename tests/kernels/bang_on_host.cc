// SPDX-License-Identifier: Apache-2.0
// The BANG C kernel over its host shim: tasks one after the other.
#include "cambricon/bang_kernel.mlu"

extern "C" int kv_launch(const kv::CoreLaunch* launch, int decode) {
  taskDim = 3;
  for (taskId = 0; taskId < taskDim; ++taskId) decode ? kv_decode(*launch) : kv_encode(*launch);
  return 0;
}
