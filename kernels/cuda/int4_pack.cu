// SPDX-License-Identifier: Apache-2.0
// Kernels of int4, two codes a byte.
#include "kv_convert.cuh"

#ifdef KV_WIRE
KV_KERNELS_TO(KV_WIRE, KV_WIRE_TYPE)
#else
KV_KERNELS_TO(int4, Int4Wire)
#endif
