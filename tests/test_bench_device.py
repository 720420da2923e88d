# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench device`` on an emulated card, and where there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from sage_kv_connector.bench import device_golden
from sage_kv_connector.bench.device_golden import golden_differences
from sage_kv_connector.cli.main import app
from sage_kv_connector.kernels.golden import GoldenVector, golden_vectors
from sage_kv_connector.vendors import open_runtime
from sage_kv_connector.vendors.emulator import EmulatorSettings


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


def test_kernels_are_measured_and_compared() -> None:
    done = CliRunner().invoke(app, ["bench", "convert", "--device", "hip", "--emulated", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["emulated"] and result["verified"] and "emulated" in result["runtime"]
    assert {row["verb"] for row in result["results"]} == {"encode", "decode"}
    assert all(row["of_copy"] > 0 and row["bit_identical"] for row in result["results"])


def test_kernels_of_a_vendor_without_some_are_named() -> None:
    done = CliRunner().invoke(app, ["bench", "convert", "--device", "cuda"])
    assert done.exit_code == 1 and "libcuda.so.1" in done.output


@pytest.mark.parametrize("vendor", ["nvidia", "hygon"])
def test_golden_vectors_on_an_emulated_device(vendor: str) -> None:
    runtime = open_runtime(vendor, EmulatorSettings(devices=1))
    *wrong, last = golden_differences(runtime, 0, ["bf16", "fp8_e5m2"])
    assert wrong == [] and int(last.split()[0]) > 400


def test_a_golden_vector_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(wire: str) -> Iterator[GoldenVector]:
        for vector in golden_vectors(wire):
            tile = vector.tile.copy()
            tile[-1] ^= 1
            yield vector._replace(tile=tile)

    monkeypatch.setattr(device_golden, "golden_vectors", changed)
    runtime = open_runtime("nvidia", EmulatorSettings(devices=1))
    *wrong, _ = golden_differences(runtime, 0, ["bf16"], ["bf16"])
    assert any("encoded from bf16" in one for one in wrong)
    assert any("decoded to bf16" in one for one in wrong)
