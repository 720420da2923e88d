# SPDX-License-Identifier: Apache-2.0
"""The rdma backend's tests over soft-RoCE and siw, each in a guest of its own.

    python -m integration_tests.rdma.suite [--device rxe] [--full] [--json]

The C++ tests of every backend run over each device, with those of paths (tests/cpp/rdma_test.cc). With ``--full`` the
tests of the backends' contract follow (tests/backends), which take a guest half an hour, and two engines of vLLM. In an
environment that counts lines, the C++ tests count theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from integration_tests.rdma.guest import ADDRESS, DEVICES, run
from integration_tests.rdma.kernel import GuestError, lacks
from sage_kv_connector.launch.tiny_model import build as build_model
from scripts.environment import ROOT

COUNTS = "SAGE_KVT_COUNTED" in os.environ
BUILD = ROOT / "build" / ("measured/rdma" if COUNTS else "rdma")
PROGRAMS = ("transfer_test", "paged_test", "part_streams_test", "races_test", "rdma_test")
#: What in_guest.sh tells the end of.
ENDS = (*PROGRAMS, "two_cards")
TIMEOUT_S, FULL_TIMEOUT_S = 600, 3600
ENGINES_MEMORY_MIB = 6000


def build() -> None:
    """The C++ tests, without a sanitizer: an emulated processor is slow enough."""
    out = subprocess.DEVNULL if "--json" in sys.argv else sys.stderr
    configure = ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "-DSAGE_KVT_TESTS=ON"]
    configure.append(f"-DSAGE_KVT_COVERAGE={'ON' if COUNTS else 'OFF'}")
    subprocess.run(configure, check=True, stdout=out)
    subprocess.run(["cmake", "--build", str(BUILD), "--target", *PROGRAMS], check=True, stdout=out)


def tested(device: str, *, full: bool) -> dict[str, Any]:
    """``passed``, ``failed``, ``skipped``, ``minutes``; ``failures``: of each its name and what was said."""
    begun = time.monotonic()
    command = [
        "sh",
        "integration_tests/rdma/in_guest.sh",
        str(BUILD / "tests/cpp"),
        " ".join(PROGRAMS),
        device,
    ]
    if full:
        command += ["-k", "rdma", "tests/backends"]
    with tempfile.TemporaryDirectory(prefix="sage-kvt-guest-") as name:
        folder = Path(name)
        counted = folder / "counted" / BUILD.relative_to("/")
        _copy_counts(BUILD, counted)  # a guest adds to those of the one before
        ran = run(command, folder, device=device, cwd=ROOT, timeout_s=FULL_TIMEOUT_S if full else TIMEOUT_S)
        _copy_counts(counted, BUILD)
        counts, failures = _programs(folder)
        if full:
            for more, failed in (_pytest(folder, ran.log), _engines(device)):
                counts, failures = counts + more, failures | failed
    return {
        **{what: counts[what] for what in ("passed", "failed", "skipped")},
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "failures": failures,
    }


def _copy_counts(source: Path, target: Path) -> None:
    for path in source.rglob("*.gcda"):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _programs(folder: Path) -> tuple[Counter[str], dict[str, str]]:
    ended = {}
    for line in (folder / "programs").read_text().splitlines():
        name, status = line.split()
        ended[name] = int(status)
    failures = {
        name: (folder / f"{name}.log").read_text(errors="replace")[-2000:]
        for name in ENDS
        if ended.get(name) != 0
    }
    left_out = [name for name in ENDS if "left out" in (folder / f"{name}.log").read_text(errors="replace")]
    failures |= dict.fromkeys(left_out, "the guest has no RDMA device")
    return Counter(passed=len(ENDS) - len(failures), failed=len(failures)), failures


def _pytest(folder: Path, log: str) -> tuple[Counter[str], dict[str, str]]:
    file = folder / "pytest.xml"
    if not file.exists():
        return Counter(failed=1), {"pytest": log[-4000:]}
    counts: Counter[str] = Counter()
    failures = {}
    for case in ElementTree.parse(file).iter("testcase"):
        told = next(iter(case), None)
        what = "passed" if told is None else "skipped" if told.tag == "skipped" else "failed"
        counts[what] += 1
        if what == "failed" and told is not None:
            failures[f"{case.get('classname')}::{case.get('name')}"] = (told.text or "")[-2000:]
    if not counts["passed"]:
        return counts + Counter(failed=1), failures | {"pytest": log[-4000:]}
    return counts, failures


def _engines(device: str) -> tuple[Counter[str], dict[str, str]]:
    """vLLM's own hand-over by the device: the tokens of one engine, and by no other way."""
    with tempfile.TemporaryDirectory(prefix="sage-kvt-guest-") as name:
        folder = Path(name)
        command = [
            sys.executable,
            "-m",
            "integration_tests.rdma.vllm_pair",
            str(build_model(folder, "small")),
            ADDRESS,
        ]
        ran = run(
            command, folder, device=device, cwd=ROOT, timeout_s=FULL_TIMEOUT_S, memory_mib=ENGINES_MEMORY_MIB
        )
    try:
        found = json.loads(ran.log.splitlines()[-1])
        right = found["right"] == found["prompts"] and found["ways"] == ["rdma (rdma)"] and found["bytes"] > 0
    except (ValueError, LookupError, TypeError):
        right = False
    if right:
        return Counter(passed=1), {}
    return Counter(failed=1), {"vllm": ran.log[-4000:]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=DEVICES, help="one of them alone")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if why := lacks():
        print(f"RDMA is not tested, a guest needs: {why}", file=sys.stderr)
        return int("CI" in os.environ)
    build()
    found = {}
    for device in [given.device] if given.device else DEVICES:
        try:
            found[device] = tested(device, full=given.full)
        except GuestError as error:
            found[device] = {"passed": 0, "failed": 1, "skipped": 0, "failures": {"guest": str(error)}}
    if given.json:
        print(json.dumps(found))
    else:
        for device, one in found.items():
            print(f"{device}: {one['passed']} passed, {one['failed']} failed, {one['skipped']} skipped")
            for name, said in one["failures"].items():
                print(f"-- {name}\n{said}")
    return int(any(one["failed"] for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
