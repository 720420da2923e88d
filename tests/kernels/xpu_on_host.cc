// SPDX-License-Identifier: Apache-2.0
// All XPU C++ kernels over their host shim.
#include "xpu_kernel.xpu"
