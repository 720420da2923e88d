# SPDX-License-Identifier: Apache-2.0
"""Which C++ folder may include which: a backend's lanes stand on the shared ones and never on each other's."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC, KERNELS = ROOT / "sage_kv_connector" / "csrc", ROOT / "kernels" / "cpu"
#: Lanes, windows, connections, events: what lies in csrc itself.
SHARED = "csrc"
#: What Python sees; it includes anything.
ROOF = "bindings"
#: Folder → folders and headers that it may include beside its own. One that is not here is a backend's.
MAY = {
    SHARED: (),
    "cpu": (),
    "conversion": ("cpu", "event.h"),
    "parts": (SHARED, "conversion", "paged"),
    "carried": (SHARED, "tcp", "path"),
    "rdma": (SHARED, "tcp", "path"),
}
BACKENDS_MAY = (SHARED,)


def sources() -> list[Path]:
    found = [*CSRC.rglob("*.cc"), *CSRC.rglob("*.h"), *KERNELS.glob("*.cc"), *KERNELS.glob("*.h")]
    assert len(found) > 40
    return found


def folder_of(path: Path) -> str:
    return ROOF if path.stem == ROOF else path.parent.name


def test_includes_keep_their_order() -> None:
    headers = {
        str(path.relative_to(KERNELS if path.is_relative_to(KERNELS) else CSRC)): folder_of(path)
        for path in sources()
        if path.suffix == ".h"
    }
    wrong = []
    for path in sources():
        folder = folder_of(path)
        may = (folder, *MAY.get(folder, BACKENDS_MAY))
        for included in re.findall(r'^\s*#\s*include "([^"]+)"', path.read_text(), re.MULTILINE):
            if folder != ROOF and included not in may and headers[included] not in may:
                wrong.append(f"{path.relative_to(ROOT)} includes {included}")
    assert wrong == []
