# SPDX-License-Identifier: Apache-2.0
"""Ask the kernel for Intel's AMX tiles before vLLM's CPU attention uses them.

Linux gives tile registers to a process only after it asked (arch_prctl
ARCH_REQ_XCOMP_PERM, https://docs.kernel.org/arch/x86/xstate.html). In vLLM 0.32 only
the prefill path of its CPU kernels asks; a decode server whose first forward pass is
a decode step, which is what a hand-over leads to, dies of SIGILL on such a machine.
"""

from __future__ import annotations

import ctypes
import platform
import sys

_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


def request_amx_tiles() -> bool:
    """True if tiles may be used from now on; False where the machine or the kernel has none."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)) == 0
