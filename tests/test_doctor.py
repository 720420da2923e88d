# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt doctor`` on a machine that has what the tests need."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest

from sage_kv_connector import doctor
from sage_kv_connector.config import CONFIG_FILE_ENV, SECRET_ENV, SECRET_FILE_ENV
from sage_kv_connector.devices.runtime import DeviceRuntime, RuntimeUnavailable
from sage_kv_connector.doctor import examine
from sage_kv_connector.telemetry.reading.token import reading_token, token_of_secret
from tests.vendors.kernels import VENDORS_OF_KERNELS
from tests.vendors.rig import Rig


def test_what_works_here_is_found_and_nothing_else_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    found = {one.name: one for one in examine()}
    assert [one for one in found.values() if one.state == "broken"] == []
    assert {found[name].state for name in ("python", "data plane", "backend shm", "backend tcp")} == {"ok"}
    assert found["backend pcie"].state == "missing"
    expected = "missing" if find_spec("sagellm_comm") is None else "ok"
    assert found["sage"].state == expected


def test_the_routers_version_is_told() -> None:
    if find_spec("vllm_router") is None:
        pytest.skip("vllm-router is not installed here")
    (found,) = (one for one in examine() if one.name == "vllm router")
    assert re.fullmatch(r"vllm-router \d+(\.\d+)+\S*", found.detail)


def test_a_secret_is_found_wherever_engines_take_it_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SECRET_ENV, raising=False)
    monkeypatch.delenv(SECRET_FILE_ENV, raising=False)
    secret, options = tmp_path / "secret", tmp_path / "kv_transport.yaml"
    secret.write_text("a secret of thirty-two characters")
    secret.chmod(0o600)
    options.write_text(f"secret_file: {secret}\n")
    assert {one.name: one.state for one in examine()}["secret"] == "missing" and reading_token() == ""
    monkeypatch.setenv(CONFIG_FILE_ENV, str(options))
    assert {one.name: one.state for one in examine()}["secret"] == "ok"
    assert reading_token() == token_of_secret(secret.read_bytes())


@pytest.mark.skipif(find_spec("sagellm_comm") is None, reason="the SAGE packages want Python 3.11")
def test_a_sage_cli_built_in_another_way_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    from sage_kv_connector.cli import sage_app

    def refuse(app: object) -> None:
        raise LookupError("no group 'llm' with a command 'serve'")

    monkeypatch.setattr(sage_app, "_add_option", refuse)
    (sage,) = [one for one in examine() if one.name == "sage"]
    assert sage.state == "broken" and "no group 'llm' with a command 'serve'" in sage.detail


#: What a vendor promises of its kernels says how a peer's KV is converted.
BY_FEATURE = "read in place or staged"


@pytest.mark.parametrize(
    ("vendor", "kernels", "state", "said"),
    [
        *((vendor, True, "ok", BY_FEATURE) for vendor in VENDORS_OF_KERNELS),
        (
            "ascend",
            False,
            "missing",
            "the CPU, since .* launches no kernels; .* is staged .* launches no kernels",
        ),
        ("kunlunxin", True, "ok", "kernels for host; .* is staged .* opens no memory of other processes"),
    ],
)
def test_what_converts_kv_on_a_device_is_said(
    monkeypatch: pytest.MonkeyPatch, vendor: str, kernels: bool, state: str, said: str
) -> None:
    def only(name: str) -> DeviceRuntime:
        if name != vendor:
            raise RuntimeUnavailable("not here")
        runtime: Any = Rig(name, kernels, devices=1).runtime
        if "opens no memory" in said:  # an older library
            del runtime._c["xpu_ipc_open_memhandle"]
        return cast(DeviceRuntime, runtime)

    monkeypatch.setattr(doctor, "open_runtime", only)
    found = next(finding for finding in doctor.examine() if finding.name == "device kernels")
    if said == BY_FEATURE:
        reads = only(vendor).features.kernels_read_peers
        how = "on this node is read in place" if reads else "is staged .* read no memory of other processes"
        said = f"kernels for host; .* {how}"
    assert found.state == state and re.search(f"emulated.*{said}", found.detail), found


def test_a_machine_without_accelerators_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> DeviceRuntime:
        raise RuntimeUnavailable("not here")

    monkeypatch.setattr(doctor, "open_runtime", none)
    found = next(finding for finding in doctor.examine() if finding.name == "device kernels")
    assert found.state == "missing" and "no accelerator here" in found.detail
