# SPDX-License-Identifier: Apache-2.0
"""``DeviceKernels`` of HIP."""

from sage_kv_connector.kernels.cuda.kernels import Kernels as Kernels
