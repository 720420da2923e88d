# SPDX-License-Identifier: Apache-2.0
"""What poses as ACL's library."""

from __future__ import annotations

from pathlib import Path

import pytest

from sage_kv_connector.devices.runtime import RuntimeUnavailable
from sage_kv_connector.vendors import open_runtime
from tests.vendors.rig import loads


def test_a_library_that_is_not_the_vendors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the right name without the functions is named with what it lacks."""
    (tmp_path / "lib64").mkdir()
    libm = next(Path("/").glob("lib/*/libm.so.6"), None)
    if libm is None or loads("ascend"):
        pytest.skip("needs a libm to pose as ACL")
    (tmp_path / "lib64" / "libascendcl.so").symlink_to(libm)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    with pytest.raises(RuntimeUnavailable, match="has no function aclInit"):
        open_runtime("ascend")
