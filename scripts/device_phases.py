# SPDX-License-Identifier: Apache-2.0
"""One phase of ``scripts/device_check.py``, in a process of its own: prints one object."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sage_kv_connector.bench.device import bench_device
from sage_kv_connector.bench.device_cache import CacheShape
from sage_kv_connector.bench.device_golden import golden_differences
from sage_kv_connector.bench.device_kernels import bench_kernels
from sage_kv_connector.bench.device_pair import Case, DevicePair
from sage_kv_connector.bench.device_stream import bench_stream
from sage_kv_connector.devices.runtime import CopyKind, DeviceRuntime
from sage_kv_connector.vendors import open_runtime
from sage_kv_connector.vendors.emulator import EmulatorSettings

ROOT = Path(__file__).resolve().parents[1]
#: The way, its backend, the wire; of the plain copy beside it the direction.
WAYS = (
    (Case("direct", "pcie", 16, "auto"), CopyKind.DEVICE_TO_DEVICE),
    (Case("direct fp8_e4m3", "pcie", 16, "fp8_e4m3"), CopyKind.DEVICE_TO_DEVICE),
    (Case("direct int4", "pcie", 16, "int4"), CopyKind.DEVICE_TO_DEVICE),
    (Case("staged", "shm", 16, "auto"), CopyKind.DEVICE_TO_HOST),
    (Case("staged tcp", "tcp", 16, "auto"), CopyKind.DEVICE_TO_HOST),
    (Case("fp8_e4m3", "shm", 16, "fp8_e4m3"), CopyKind.DEVICE_TO_HOST),
    (Case("int4", "shm", 16, "int4"), CopyKind.DEVICE_TO_HOST),
)
REPEATS = 3


class Machine:
    """``vendor`` and whether it is an emulator, on which everything is small."""

    def __init__(self, vendor: str, emulated: bool) -> None:
        self.vendor, self.emulated = vendor, emulated

    def runtime(self) -> DeviceRuntime:
        return open_runtime(self.vendor, EmulatorSettings(memory_bytes=256 << 20) if self.emulated else None)

    def golden(self) -> dict[str, Any]:
        *wrong, checked = golden_differences(self.runtime(), 0, ["bf16"])
        return {"ok": not wrong, "wrong": wrong[:10], "checked": checked}

    def kernels(self) -> dict[str, Any]:
        tokens, layers, repeats = (256, 1, 1) if self.emulated else (32768, 4, 7)
        found = bench_kernels(self.runtime(), 0, tokens, layers, repeats, queued=1 if self.emulated else 10)
        return {"ok": found["verified"], **found}

    def copies(self) -> dict[str, Any]:
        total, repeats = (8 << 20, 1) if self.emulated else (1 << 30, 7)
        found = bench_device(self.runtime(), 0, 65536, total, repeats)
        return {"ok": found["verified"], **found}

    def stream(self) -> dict[str, Any]:
        shape = CacheShape(256, 4, 16) if self.emulated else CacheShape(2048, 80, 16)
        size, passes = (4 << 20, 1) if self.emulated else (256 << 20, 5)
        rows = [
            bench_stream(self.vendor, shape, dtype, passes, emulated=self.emulated, layer_bytes=size)
            for dtype in ("auto", "fp8_e4m3")
        ]
        return {"ok": True, "rows": rows}

    def hand_over(self, tokens: int) -> dict[str, Any]:
        source = CacheShape(min(tokens, 256) if self.emulated else tokens, 2 if self.emulated else 80, 16)
        rows = []
        for case, kind in WAYS:
            try:
                rows.append(self._handed_over(source, case, kind))
            except Exception as error:  # the other ways are still worth their time
                rows.append({"way": case.name, "ok": False, "why": f"{type(error).__name__}: {error}"[:300]})
        return {"ok": all(row["ok"] for row in rows), "tokens": source.tokens, "layers": source.layers,
                "kv_bytes": source.layers * source.layer_bytes, "rows": rows}  # fmt: skip

    def _handed_over(self, source: CacheShape, case: Case, kind: CopyKind) -> dict[str, Any]:
        with DevicePair(self.vendor, source, case, emulated=self.emulated) as pair:
            pair.hand_over()  # connects
            stats, seconds = min((pair.hand_over() for _ in range(REPEATS)), key=lambda each: each[1])
            wrong = pair.ask("decode", "check", 1 if source.tokens < 4096 else 16)
            plain = pair.ask("decode", "copy", int(kind), stats.nbytes)
        kv = source.layers * source.layer_bytes
        return {
            "way": case.name, "ok": wrong == 0, "wrong_bytes": wrong, "backend": case.backend, "mode": stats.mode,
            "wire_dtype": stats.wire_dtype, "wire_bytes": stats.nbytes, "seconds": seconds,
            "kv_gbytes_per_s": kv / seconds / 1e9, "plain_copy_s": plain, "of_plain_copy": plain / seconds,
        }  # fmt: skip

    def runtime_tests(self) -> dict[str, Any]:
        """The contract tests of runtimes: on a card, or on the vendor's emulator."""
        what = "tests/vendors/test_copies.py" if self.emulated else "tests/vendors/test_on_devices.py"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", what, "-k", self.vendor]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        said = done.stdout.strip().splitlines()
        return {"ok": done.returncode == 0, "said": said[-1] if said else done.stderr[-300:]}


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("phase")
    words.add_argument("vendor")
    words.add_argument("--emulated", action="store_true")
    given = words.parse_args()
    machine = Machine(given.vendor, given.emulated)
    phases: dict[str, Callable[[], dict[str, Any]]] = {
        "golden": machine.golden,
        "kernels": machine.kernels,
        "copies": machine.copies,
        "stream": machine.stream,
        "runtime": machine.runtime_tests,
        "hand_over_1k": lambda: machine.hand_over(1024),
        "hand_over_8k": lambda: machine.hand_over(8192),
        "hand_over_32k": lambda: machine.hand_over(32768),
    }
    print(json.dumps(phases[given.phase]()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
