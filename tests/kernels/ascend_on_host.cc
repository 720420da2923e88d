// SPDX-License-Identifier: Apache-2.0
// All Ascend C kernels over their host shim.
#include "ascend_kernel.cc"
