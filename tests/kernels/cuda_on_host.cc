// SPDX-License-Identifier: Apache-2.0
// All kernels of CUDA and HIP as plain C++, through their host shim.
#include "fp8_convert.cu"
#include "int4_pack.cu"
