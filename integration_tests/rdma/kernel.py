# SPDX-License-Identifier: Apache-2.0
"""The guest's kernel and its first files, made once of Debian's packages and kept in the cache.

Debian's kernel has rxe and leaves siw out: that module is compiled from Debian's own source of the same version.
"""

from __future__ import annotations

import fcntl
import gzip
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts import environment

CACHE = environment.CACHE / "guest"
PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "/bin/busybox": "busybox-static",
    "cpio": "cpio",
    "depmod": "kmod",
    "make": "make",
    "gcc-12": "gcc-12",
    "rdma": "iproute2",
}
#: What the guest's first program loads: to reach this machine's files, then for RDMA. rxe makes its sums with
#: crc32_generic, which nothing pulls in.
MODULES = (
    "virtio_pci", "virtio_net", "virtio_rng", "9pnet_virtio", "9p", "overlay", "dummy", "veth",
    "crc32_generic", "libcrc32c", "rdma_rxe", "ib_uverbs", "rdma_ucm",
)  # fmt: skip
SIW = "drivers/infiniband/sw/siw"
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
while read module; do insmod "$module" || echo "guest: $module is not loaded"; done < /modules
how=trans=virtio,version=9p2000.L,msize=1048576
mount -t 9p -o $how,cache=loose,ro machine /machine
mount -t tmpfs memory /memory; mkdir -p /memory/changed /memory/work
mount -t overlay -o lowerdir=/machine,upperdir=/memory/changed,workdir=/memory/work root /root
mount -t proc proc /root/proc; mount -t sysfs sys /root/sys; mount -t devtmpfs dev /root/dev
mkdir -p /root/dev/pts /root/dev/shm /root/guest
mount -t devpts pts /root/dev/pts; mount -t tmpfs shm /root/dev/shm; mount -t tmpfs run /root/run
ln -sf /proc/self/fd /root/dev/fd
mount -t 9p -o $how out /root/guest
chroot /root /bin/sh /guest/run > /root/guest/log 2>&1
echo $? > /root/guest/status
sync
poweroff -f
"""


class GuestError(RuntimeError):
    """The guest could not be made or started, or did not end in time."""


def lacks() -> str:
    """How to install what is missing to start a guest, "" if nothing is."""
    missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    return f"apt-get install {' '.join(missing)}" if missing else ""


def kernel() -> tuple[Path, Path]:
    """The kernel, and its first files. Raises GuestError."""
    if why := lacks():
        raise GuestError(f"a guest needs Debian packages that are not here: {why}")
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Not the one for clouds, which has neither rxe nor 9p.
        image = _depends("linux-image-amd64", "linux-image-")
        folder = CACHE / image
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as made:
                _make(image, Path(made))
                (Path(made) / "kernel").rename(folder)
        initrd = folder / "initrd"
        if not initrd.exists() or initrd.stat().st_mtime < Path(__file__).stat().st_mtime:
            _pack(folder, initrd)
    return next((folder / "boot").glob("vmlinuz-*")), initrd


def _make(image: str, made: Path) -> None:
    """Unpacks the kernel into ``made/kernel``, and compiles siw for it."""
    headers = image.replace("-image-", "-headers-")
    packages = [image, headers, *(_depends(headers, name) for name in ("linux-headers-", "linux-kbuild-"))]
    source = f"linux-source-{image.removeprefix('linux-image-').rsplit('.', 1)[0]}"
    print(f"fetching {image} and {source} for the guest", file=sys.stderr)
    for package in (*packages, source):
        _output("apt-get", "download", package, cwd=made)
        (deb,) = made.glob("*.deb")
        _output("dpkg-deb", "-x", str(deb), "kernel" if package == image else "sources", cwd=made)
        deb.unlink()
    tree = made / "sources/usr/src"
    _output("tar", "-xJf", f"{tree / source}.tar.xz", f"{source}/{SIW}", cwd=made)
    makefile = tree / headers / "Makefile"
    makefile.write_text(makefile.read_text().replace("/usr/src", str(tree)))
    code = made / source / SIW
    _output("make", "-C", str(tree / headers), f"M={code}", "CONFIG_RDMA_SIW=m", "modules", cwd=made)
    modules = next((made / "kernel/lib/modules").iterdir())
    (modules / "kernel" / SIW).mkdir(parents=True)
    shutil.copy(code / "siw.ko", modules / "kernel" / SIW)
    _output("depmod", "-b", str(made / "kernel"), modules.name, cwd=made)


def _pack(folder: Path, image: Path) -> None:
    """busybox, the modules in their order, and INIT."""
    release = next((folder / "lib/modules").iterdir()).name
    with tempfile.TemporaryDirectory(dir=CACHE) as made:
        root = Path(made)
        for name in ("bin", "proc", "sys", "dev", "machine", "memory", "root", "modules.d"):
            (root / name).mkdir()
        shutil.copy("/bin/busybox", root / "bin/busybox")
        files: dict[str, None] = {}
        for module in (*MODULES, "siw"):
            told = _output("modprobe", "-d", str(folder), "-S", release, "--show-depends", module)
            files |= {line.split()[1]: None for line in told.splitlines() if line.startswith("insmod ")}
        for file in files:
            shutil.copy(file, root / "modules.d")
        (root / "modules").write_text("".join(f"/modules.d/{Path(file).name}\n" for file in files))
        (root / "init").write_text(INIT)
        (root / "init").chmod(0o755)
        names = "\n".join(str(path.relative_to(root)) for path in [root, *root.rglob("*")])
        cpio = ["cpio", "-o", "-H", "newc", "--quiet"]
        packed = subprocess.run(cpio, input=names.encode(), cwd=root, check=True, capture_output=True)
        image.write_bytes(gzip.compress(packed.stdout, 1))


def _depends(package: str, start: str) -> str:
    """The first package that ``package`` depends on whose name begins so. Raises GuestError."""
    told = _output("apt-cache", "depends", package)
    found = [line.split()[1] for line in told.splitlines() if line.strip().startswith(f"Depends: {start}")]
    if not found:
        raise GuestError(f"{package} depends on no {start}*; apt-get update may help")
    return found[0]


def _output(*command: str, cwd: Path | None = None) -> str:
    try:
        return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout
    except subprocess.CalledProcessError as error:
        raise GuestError(f"{shlex.join(command)} failed: {error.stderr.strip()}") from error
