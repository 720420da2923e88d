# SPDX-License-Identifier: Apache-2.0
"""Shared libraries that a peer's wheel wants of the system, and the Debian packages that have them."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

#: Library → Debian package, as in Debian 12 and Ubuntu 22.04 to 24.04.
DEBIAN_PACKAGES = {
    "libcurl.so.4": "libcurl4",
    "libibverbs.so.1": "libibverbs1",
    "libmlx5.so.1": "ibverbs-providers",
    "libnl-3.so.200": "libnl-3-200",
    "libnl-route-3.so.200": "libnl-route-3-200",
    "libnuma.so.1": "libnuma1",
    "librdmacm.so.1": "librdmacm1",
    "liburing.so.2": "liburing2",
}
#: Libraries of drivers, which a machine without the device does well without.
_OF_DRIVERS = ("libcuda", "libcudart", "libnvidia", "libascend", "libhip")


def missing_libraries(module: str) -> list[str]:
    """Libraries that an installed package's extensions link to and this machine lacks; none if it is not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations or shutil.which("ldd") is None:
        return []
    extensions = (
        path for place in spec.submodule_search_locations for path in sorted(Path(place).rglob("*.so*"))
    )
    found = {name for path in extensions for name in _not_found(path)}
    return sorted(name for name in found if not name.startswith(_OF_DRIVERS))


def what_to_install(missing: list[str]) -> str:
    """A sentence for people; empty if nothing is missing."""
    if not missing:
        return ""
    packages = sorted({DEBIAN_PACKAGES[name] for name in missing if name in DEBIAN_PACKAGES})
    unknown = [name for name in missing if name not in DEBIAN_PACKAGES]
    advice = f"; apt-get install {' '.join(packages)}" if packages else ""
    others = f"; no package is known for {', '.join(unknown)}" if unknown else ""
    return f"this machine lacks {', '.join(missing)}{advice}{others}"


def _not_found(path: Path) -> list[str]:
    shown = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=False).stdout
    return [line.split()[0] for line in shown.splitlines() if line.rstrip().endswith("=> not found")]
