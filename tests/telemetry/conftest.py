# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from sage_kv_connector.telemetry.recording.publishing import DIRECTORY_ENV


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where engines of this test publish."""
    where = tmp_path / "telemetry"
    monkeypatch.setenv(DIRECTORY_ENV, str(where))
    return where
