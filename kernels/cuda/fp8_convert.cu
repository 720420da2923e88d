// SPDX-License-Identifier: Apache-2.0
// Kernels of the wire formats without packing: casts to fp32, fp16, bf16, and fp8.
#include "kv_convert.cuh"

#ifdef KV_WIRE
KV_KERNELS_TO(KV_WIRE, KV_WIRE_TYPE)
#else
KV_KERNELS_TO(fp32, Fp32Wire)
KV_KERNELS_TO(fp16, Fp16Wire)
KV_KERNELS_TO(bf16, Bf16Wire)
KV_KERNELS_TO(fp8_e4m3, Fp8E4m3Wire)
KV_KERNELS_TO(fp8_e5m2, Fp8E5m2Wire)
#endif
