# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench device`` on an emulated card, and where there is none."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from sage_kv_connector.cli.main import app


def test_an_emulated_card_is_measured_and_said_to_be_one() -> None:
    words = [
        "bench",
        "device",
        "--vendor",
        "ascend",
        "--emulated",
        "--total-bytes",
        "4194304",
        "--repeats",
        "1",
    ]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["emulated"] is True and "emulated" in result["runtime"] and result["verified"] is True
    for way in ("d2h", "h2d"):
        assert result[way]["gbytes_per_s"] > 0 and result[way]["plain_copy_gbytes_per_s"] > 0


def test_a_device_that_is_not_there_is_named() -> None:
    words = [
        "bench",
        "device",
        "--vendor",
        "hygon",
        "--emulated",
        "--device",
        "9",
        "--total-bytes",
        "1048576",
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert "--device is 9" in done.output
