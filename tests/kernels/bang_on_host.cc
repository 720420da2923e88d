// SPDX-License-Identifier: Apache-2.0
// All BANG C kernels over their host shim.
#include "bang_kernel.mlu"
