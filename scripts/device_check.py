# SPDX-License-Identifier: Apache-2.0
"""Everything that wants a real NVIDIA card, in one command for a machine that has one and no network.

    python3 scripts/device_check.py --prepare [--python 3.12] [--architecture sm_90]   where there is a network
    python3 scripts/device_check.py [--vendor nvidia] [--limit 480] [--report FILE]    on the machine with the card
    python3 scripts/device_check.py --emulated                                         a rehearsal, on an emulated card

``--prepare`` fetches the packages that such a machine lacks and compiles the kernels, into build/device-check,
which has to travel with the checkout. Each phase prints one line of JSON when it ends, the most valuable first, and
has a time limit of its own; what fails does not stop the others. Exit status 1 if a phase failed. It wants Python
with NumPy, CMake, ninja, nanobind and a C++ compiler; what else the package needs comes from build/device-check.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "device-check"
WHEELS, SITE, CACHE = BUILD / "wheels", BUILD / "site", BUILD / "cache"
#: What the package needs of others where it runs an engine by itself.
PACKAGES = ("msgspec", "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions",
            "cryptography", "cffi", "pycparser", "pyyaml")  # fmt: skip
KERNEL_WIRES = ("bf16", "fp8_e4m3", "int4", "fp8_e5m2", "fp16", "fp32")


class Phase(NamedTuple):
    """``limit_s``: when it is ended by force."""

    name: str
    limit_s: float


#: In their order. The phases themselves are in ``scripts/device_phases.py``.
PHASES = (
    Phase("build", 150),
    Phase("golden", 60),
    Phase("kernels", 60),
    Phase("hand_over_1k", 60),
    Phase("hand_over_8k", 60),
    Phase("copies", 40),
    Phase("stream", 60),
    Phase("hand_over_32k", 120),
    Phase("runtime", 60),
)


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--vendor", default="nvidia")
    words.add_argument(
        "--emulated", action="store_true", help="rehearse on an emulated card, with little data"
    )
    words.add_argument("--limit", type=float, default=480, help="seconds of all phases together")
    words.add_argument("--only", nargs="*", metavar="PHASE", help="these phases")
    words.add_argument(
        "--report", type=Path, default=BUILD / "report.jsonl", help="the lines, kept as they come"
    )
    words.add_argument("--prepare", action="store_true")
    words.add_argument("--python", default="3.12", help="of the machine with the card (--prepare)")
    words.add_argument("--architecture", default="sm_90", help="of its card (--prepare)")
    words.add_argument("--json", action="store_true", help="lines are JSON in any case")
    given = words.parse_args()
    unknown = set(given.only or ()) - {phase.name for phase in PHASES}
    if unknown:
        words.error(
            f"--only {' '.join(sorted(unknown))}: allowed: {', '.join(phase.name for phase in PHASES)}"
        )
    return prepare(given) if given.prepare else check(given)


def prepare(given: argparse.Namespace) -> int:
    """Wheels for the other machine's Python, and its card's kernels, on this one."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in (17, 28, 34)] + ["manylinux2014_x86_64", "any"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
               "--python-version", given.python, "--implementation", "cp", "--dest", str(WHEELS)]  # fmt: skip
    for platform in platforms[:-1]:
        command += ["--platform", platform]
    subprocess.run([*command, *PACKAGES], check=True)
    environment = os.environ | {"SAGE_KVT_CACHE": str(CACHE)}
    code = (
        "import sys; from sage_kv_connector.kernels.cuda.compiler import compiled\n"
        "for wire in sys.argv[2:]: print(wire, len(compiled('bf16', wire, sys.argv[1])), 'bytes')"
    )
    subprocess.run(
        [sys.executable, "-c", code, given.architecture, *KERNEL_WIRES], check=True, env=environment, cwd=ROOT
    )
    size = sum(path.stat().st_size for path in BUILD.rglob("*") if path.is_file())
    print(f"{BUILD.relative_to(ROOT)}: {size / 2**20:.1f} MiB to carry")
    return 0


def check(given: argparse.Namespace) -> int:
    given.report.parent.mkdir(parents=True, exist_ok=True)
    given.report.write_text("")
    chosen = [phase for phase in PHASES if not given.only or phase.name in given.only]
    end = time.monotonic() + given.limit
    failed = 0
    for phase in chosen:
        left = end - time.monotonic()
        row = {"phase": phase.name, "emulated": given.emulated}
        if left < 5:
            row |= {"ok": False, "why": f"no time is left of {given.limit:.0f} s"}
        else:
            row |= run(phase, min(phase.limit_s, left), given)
        line = json.dumps(row)
        print(line, flush=True)
        with given.report.open("a") as file:
            file.write(line + "\n")
        failed += not row["ok"]
    return int(failed > 0)


def run(phase: Phase, limit_s: float, given: argparse.Namespace) -> dict[str, Any]:
    begun = time.monotonic()
    try:
        found = build(limit_s, given.emulated) if phase.name == "build" else measured(phase, limit_s, given)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError, OSError, ValueError) as error:
        said = getattr(error, "stderr", None) or getattr(error, "output", None) or ""
        said = said.decode(errors="replace") if isinstance(said, bytes) else said
        found = {"ok": False, "why": f"{type(error).__name__}: {str(error)[:200]} {said.strip()[-600:]}"}
    return {"seconds": round(time.monotonic() - begun, 1), **found}


def build(limit_s: float, emulated: bool) -> dict[str, Any]:
    """The package as a tree of links with the extension in it, and the packages that were carried.

    A rehearsal takes the extension that this Python has, which the same CMakeLists.txt made.
    """
    tree = SITE / "sage_kv_connector"
    shutil.rmtree(SITE, ignore_errors=True)
    tree.mkdir(parents=True)
    for entry in [
        *(ROOT / "sage_kv_connector").iterdir(),
        *(ROOT / n for n in ("vendors", "kernels", "presets")),
    ]:
        if not entry.name.startswith(("_data_plane.c", "__pycache__")):
            (tree / entry.name).symlink_to(entry)
    wheels = [] if emulated else sorted(map(str, WHEELS.glob("*.whl")))
    if wheels:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*pip, "--target", str(SITE), *wheels], check=True, capture_output=True, timeout=60)
    output = BUILD / "cmake"
    configure = ["cmake", "-S", str(ROOT), "-B", str(output), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
                 f"-DPython_EXECUTABLE={sys.executable}", "-DSKBUILD=ON"]  # fmt: skip
    subprocess.run(configure, check=True, capture_output=True, timeout=60)
    if emulated:
        ask = "from sage_kv_connector import _data_plane; print(_data_plane.__file__)"
        done = subprocess.run(
            [sys.executable, "-c", ask], check=True, capture_output=True, text=True, timeout=60
        )
        extension = Path(done.stdout.strip())
    else:
        subprocess.run(["cmake", "--build", str(output)], check=True, capture_output=True, timeout=limit_s)
        (extension,) = output.glob("_data_plane*.so")
    (tree / extension.name).symlink_to(extension)
    return {"ok": True, "built": not emulated, "extension": extension.name, "wheels": len(wheels)}


def measured(phase: Phase, limit_s: float, given: argparse.Namespace) -> dict[str, Any]:
    """A phase in a process of its own, which prints one object."""
    command = [sys.executable, "-m", "scripts.device_phases", phase.name, given.vendor]
    command += ["--emulated"] if given.emulated else []
    paths = [str(SITE), str(ROOT)] if SITE.exists() else [str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    if not given.emulated:
        environment["SAGE_KVT_CACHE"] = str(CACHE)
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
