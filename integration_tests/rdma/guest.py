# SPDX-License-Identifier: Apache-2.0
"""A Debian kernel with soft-RoCE (rxe) and soft-iWARP (siw) in QEMU, over this machine's own files.

    python -m integration_tests.rdma.guest [--device rxe|siw] [--timeout S] [--memory-mib N] -- COMMAND [ARG ...]

The guest's root is this machine's, read-only under a layer in its memory, so that what was built here runs there
unchanged. ``$OUT`` is a folder that both share. Processors are emulated (no KVM is needed): it proves that things are
right, and ratios within one guest; no time in it means anything by itself.

Needs Debian's packages of ``kernel.lacks``; those of the kernel are fetched into the cache, once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from integration_tests.rdma.kernel import GuestError, kernel

ADDRESS = "10.7.0.1"
DEVICES = ("rxe", "siw")
MEMORY_MIB = 3072


class Ran(NamedTuple):
    """``status``: the command's; ``log``: what it printed."""

    status: int
    log: str


def run(
    command: list[str],
    folder: Path,
    *,
    device: str = "rxe",
    cwd: Path | None = None,
    timeout_s: float = 300,
    processors: int = 2,
    memory_mib: int = MEMORY_MIB,
) -> Ran:
    """Run ``command`` with an RDMA device at ``ADDRESS``; ``folder`` is its ``$OUT``. Raises GuestError."""
    vmlinuz, initrd = kernel()
    (folder / "run").write_text(_script(command, device, cwd or Path.cwd()))
    (folder / "status").unlink(missing_ok=True)
    (folder / "log").write_text("")
    arguments = [
        "qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max",
        "-smp", str(processors), "-m", str(memory_mib), "-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio",
        "-kernel", str(vmlinuz), "-initrd", str(initrd),
        "-append", "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable",
        "-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net,romfile=",
        *_shared("machine", Path("/"), ",readonly=on"), *_shared("out", folder),
    ]  # fmt: skip
    console = folder / "console"
    with console.open("wb") as out:
        try:
            subprocess.run(arguments, stdout=out, stderr=out, stdin=subprocess.DEVNULL, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise GuestError(f"the guest took more than {timeout_s:g} s; {_tail(folder)}") from None
    status = folder / "status"
    if not status.exists():
        raise GuestError(f"the guest ended without an answer; {_tail(folder)}")
    return Ran(int(status.read_text()), (folder / "log").read_text(errors="replace"))


def _shared(tag: str, folder: Path, more: str = "") -> list[str]:
    return [
        "-fsdev", f"local,id={tag},path={folder},security_model=none,multidevs=remap{more}",
        "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}",
    ]  # fmt: skip


def _tail(folder: Path) -> str:
    said = (folder / "log").read_text(errors="replace") + (folder / "console").read_text(errors="replace")
    return "the last it said:\n" + "\n".join(said.splitlines()[-20:])


def _script(command: list[str], device: str, cwd: Path) -> str:
    environment = {
        "HOME": os.environ.get("HOME", "/root"),
        "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        "OUT": "/guest",
    }
    said = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment.items())
    return f"""{said}
ip link set lo up; ip link set eth0 up; ip addr add {ADDRESS}/24 dev eth0
rdma link add {device}0 type {device} netdev eth0 || exit 125
ulimit -l unlimited
cd {shlex.quote(str(cwd))}
{shlex.join(command)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=DEVICES, default="rxe")
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--memory-mib", type=int, default=MEMORY_MIB)
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sage-kvt-guest-") as name:
        try:
            ran = run(
                given.command,
                Path(name),
                device=given.device,
                timeout_s=given.timeout,
                memory_mib=given.memory_mib,
            )
        except GuestError as error:
            print(error, file=sys.stderr)
            return 125
    print(ran.log, end="")
    return ran.status


if __name__ == "__main__":
    sys.exit(main())
