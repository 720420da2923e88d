# SPDX-License-Identifier: Apache-2.0
"""Run every parser of a peer's bytes under libFuzzer (tests/fuzz), in turns, and say what was found.

    make fuzz ARGS="[--frames N] [--targets NAME,…] [--json] [--keep]"

``--frames`` inputs are shared among the targets, fewer for those that take longer. C++ runs under
AddressSanitizer and UBSan, Python under its own checks of what may come out. An input that breaks something is kept,
and the command that runs it again is printed; the exit status is 1 then. ``--keep`` puts inputs that reach something
new into tests/fuzz/corpus.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.parsers import PARSERS, seeds_of

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests" / "fuzz" / "corpus"
BUILD = ROOT / "build" / "fuzz"
CSRC = "sage_kv_connector/csrc"
#: C++ targets, and the sources that they are about.
NATIVE = {
    "tcp_frames": (f"{CSRC}/tcp/receive.cc", f"{CSRC}/tcp/frame.cc", f"{CSRC}/window.cc"),
    "shm_ring": (f"{CSRC}/shm/ring.cc", f"{CSRC}/shm/receive.cc", f"{CSRC}/shm/placement.cc"),
    "shm_rendezvous": (f"{CSRC}/shm/shm_endpoint.cc",),
    "path": (f"{CSRC}/path/receive.cc", f"{CSRC}/path/send.cc", f"{CSRC}/rdma/notes.cc"),
    "carried": (f"{CSRC}/carried/carried_endpoint.cc", f"{CSRC}/carried/notes.cc", f"{CSRC}/carried/wire.cc"),
    "part_streams": (f"{CSRC}/parts/part_encoder.cc", f"{CSRC}/parts/part_decoder.cc"),
}
TARGETS = (*NATIVE, *PARSERS)
#: Of the inputs, beside one for each other target: what takes longer gets less.
SHARE = {"subscriptions": 0.1, "path": 0.3, "carried": 0.3, "shm_ring": 0.4, "handshake": 0.5}
#: Kept of a target: so many inputs of at most so many bytes.
KEPT, KEPT_BYTES = 48, 256
LIMITS = (
    "-timeout=10",
    "-rss_limit_mb=2048",
    "-max_len=1024",
    "-len_control=10",
    "-entropic=0",
    "-print_final_stats=1",
)


class Found(NamedTuple):
    """What came of one target. ``edges``: of the code, ``lines``: reached and all, of the parser's sources."""

    target: str
    inputs: int
    seconds: float
    crashes: int
    edges: int
    lines: tuple[int, int]
    replay: str

    def row(self) -> dict[str, object]:
        rate = round(self.inputs / self.seconds) if self.seconds else 0
        return {**self._asdict(), "seconds": round(self.seconds, 1), "inputs_s": rate}


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--frames", type=int, default=1_000_000, help="inputs over all targets")
    options.add_argument("--targets", default=",".join(TARGETS), help="names, with commas (default: all)")
    options.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    options.add_argument(
        "--keep", action="store_true", help="add what reached something new to tests/fuzz/corpus"
    )
    given = options.parse_args()
    targets = given.targets.split(",")
    if unknown := [name for name in targets if name not in TARGETS]:
        options.error(f"--targets: {', '.join(unknown)} not among {', '.join(TARGETS)}")
    if given.frames < len(targets):
        options.error(f"--frames is {given.frames}, must be at least one for each of {len(targets)} targets")
    build()
    begun = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(fuzz, targets, shared(given.frames, targets)))
    seconds = time.monotonic() - begun
    if given.keep:
        for name in targets:
            keep(name)
    show(found, seconds)
    crashes = sum(one.crashes for one in found)
    if given.json:
        rows = [one.row() for one in found]
        print(json.dumps({"inputs": sum(one.inputs for one in found), "crashes": crashes, "targets": rows}))
    return 1 if crashes else 0


def shared(inputs: int, targets: list[str]) -> list[int]:
    """So many inputs for each target, ``inputs`` or a few more in all."""
    shares = [SHARE.get(name, 1.0) for name in targets]
    return [-int(-inputs * share // sum(shares)) for share in shares]


def build() -> None:
    if shutil.which("clang++") is None:
        sys.exit(
            "clang++ was not found: install it with compiler-rt (Debian/Ubuntu: apt-get install clang llvm)"
        )
    cmake = ["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", "-DSAGE_KVT_FUZZ=ON"]
    cmake += [
        "-DSAGE_KVT_SANITIZE=address,undefined",
        "-DCMAKE_CXX_COMPILER=clang++",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
    ]
    subprocess.run(cmake, check=True, stdout=sys.stderr)
    subprocess.run(["cmake", "--build", BUILD], check=True, stdout=sys.stderr)


def command(name: str) -> list[str]:
    if name in NATIVE:
        return [str(BUILD / "tests" / "fuzz" / f"fuzz_{name}")]
    return [sys.executable, "-m", "tests.fuzz.run_parser", name]


def environment(name: str) -> dict[str, str]:
    # Little is kept of what was freed, so that memory is used again while it is in the cache.
    sanitizer = "malloc_context_size=3:quarantine_size_mb=4:allocator_may_return_null=1"
    return os.environ | {"ASAN_OPTIONS": sanitizer, "LLVM_PROFILE_FILE": str(BUILD / f"{name}.profraw")}


def fuzz(name: str, inputs: int) -> Found:
    folder = unpacked(name)
    artifacts = BUILD / "crashes" / name
    artifacts.mkdir(parents=True, exist_ok=True)
    before = set(artifacts.iterdir())
    say(f"{name}: {inputs} inputs")
    begun = time.monotonic()
    words = [*command(name), *LIMITS, f"-runs={inputs}", f"-artifact_prefix={artifacts}/", str(folder)]
    done = subprocess.run(
        words, cwd=ROOT, env=environment(name), capture_output=True, text=True, errors="replace"
    )
    seconds = time.monotonic() - begun
    ran = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    edges = re.findall(r"cov: (\d+)", done.stderr)
    broken = sorted(set(artifacts.iterdir()) - before)
    replay = ""
    if done.returncode != 0:
        say(f"{name} failed with status {done.returncode}:\n{done.stderr[-6000:]}")
        replay = " ".join([*command(name), *map(str, broken)])
        say(f"again: {replay}")
    return Found(
        name,
        int(ran[1]) if ran else 0,
        seconds,
        int(done.returncode != 0),
        int(edges[-1]) if edges else 0,
        lines_of(name, folder),
        replay,
    )


def unpacked(name: str) -> Path:
    """A folder with the kept inputs, one a file, and with real messages as they are encoded now."""
    folder = BUILD / "corpus" / name
    folder.mkdir(parents=True, exist_ok=True)
    inputs = [base64.b64decode(line) for line in kept(name)] + (seeds_of(name) if name in PARSERS else [])
    for number, data in enumerate(inputs):
        (folder / f"kept-{number}").write_bytes(data)
    return folder


def kept(name: str) -> list[str]:
    path = CORPUS / f"{name}.txt"
    return path.read_text().split() if path.exists() else []


def keep(name: str) -> None:
    """Inputs of all sizes of those that together reach what all reach."""
    folder = BUILD / "corpus" / name
    if name in NATIVE:
        merged = BUILD / "merged" / name
        shutil.rmtree(merged, ignore_errors=True)
        merged.mkdir(parents=True)
        words = [*command(name), *LIMITS, "-merge=1", str(merged), str(folder)]
        subprocess.run(words, cwd=ROOT, env=environment(name), check=True, capture_output=True)
        folder = merged
    inputs = sorted((path.read_bytes() for path in folder.iterdir()), key=lambda data: (len(data), data))
    spread = [data for data in inputs if len(data) <= KEPT_BYTES]
    chosen = spread[:: max(1, -(-len(spread) // KEPT))]
    CORPUS.mkdir(exist_ok=True)
    lines = "".join(base64.b64encode(data).decode() + "\n" for data in chosen)
    (CORPUS / f"{name}.txt").write_text(lines)


def lines_of(name: str, folder: Path) -> tuple[int, int]:
    """Lines of the parser's own sources that were reached, and that there are."""
    if name not in NATIVE:
        words = [sys.executable, "-m", "tests.fuzz.reached_lines", name, str(folder)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        reached, there = map(int, done.stdout.split())
        return reached, there
    if shutil.which("llvm-cov") is None or not (BUILD / f"{name}.profraw").exists():
        return 0, 0
    profile = BUILD / f"{name}.profdata"
    subprocess.run(["llvm-profdata", "merge", "-o", profile, BUILD / f"{name}.profraw"], check=True)
    words = ["llvm-cov", "export", "-summary-only", f"-instr-profile={profile}", *command(name)]
    words += [str(ROOT / source) for source in NATIVE[name]]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    counts = json.loads(done.stdout)["data"][0]["totals"]["lines"]
    return counts["covered"], counts["count"]


def show(found: list[Found], seconds: float) -> None:
    say(
        f"{'target':20} {'inputs':>10} {'inputs/s':>9} {'crashes':>8} {'edges':>6} {'lines of the parser':>20}"
    )
    for one in found:
        reached, there = one.lines
        lines = f"{reached} of {there}" if there else "not counted"
        rate = one.inputs / one.seconds if one.seconds else 0
        say(f"{one.target:20} {one.inputs:10} {rate:9.0f} {one.crashes:8} {one.edges:6} {lines:>20}")
    total = sum(one.inputs for one in found)
    say(f"{total} inputs in {seconds:.0f} s, {sum(one.crashes for one in found)} crashes")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
