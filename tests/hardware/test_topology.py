# SPDX-License-Identifier: Apache-2.0
"""What ``probe`` makes of a machine of each vendor, whole and with one thing broken."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from sage_kv_connector.hardware.probing.profile import HardwareProfile, published_schema
from sage_kv_connector.hardware.probing.recording import RecordedMachine
from sage_kv_connector.hardware.probing.tool_output import ToolFormatError
from sage_kv_connector.hardware.report.recommend import recommend
from sage_kv_connector.hardware.report.topology import probe
from sage_kv_connector.vendors import VENDORS
from tests.hardware.recorded import NAMES, copied, file_of_call, notes, profile_of, recordings_of


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_fits_the_published_schema(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    profile = profile_of(name).model_copy(deep=True)
    profile.recommendation = recommend(profile)
    document = json.loads(profile.model_dump_json())
    jsonschema.Draft202012Validator(published_schema()).validate(document)
    assert HardwareProfile.model_validate(document) == profile
    del document["platform"]["kernel"]
    with pytest.raises(jsonschema.ValidationError, match="kernel"):
        jsonschema.Draft202012Validator(published_schema()).validate(document)


def test_wsl2() -> None:
    profile = profile_of("wsl2")
    assert profile.platform.wsl2 and len(profile.devices) == 1
    assert "not in sysfs here" in notes(profile)


def test_soft_roce_is_shown_as_what_it_is() -> None:
    (port,) = profile_of("soft_roce").rdma
    # The driver's rate is a constant; perftest said "Mtu: 1024" on this guest.
    assert port.software and port.active and port.bytes_per_s is None and port.interface == "eth0"
    assert port.max_packet_bytes is not None and port.max_packet_bytes.value == 1024


BROKEN = [case for vendor in VENDORS for case in import_module(f"tests.vendors.{vendor}.samples").BROKEN]


@pytest.mark.parametrize(("name", "call", "old", "new", "says"), BROKEN)
def test_a_broken_recording_is_named_by_its_line(
    name: str, call: tuple[str, ...], old: str, new: str, says: str, tmp_path: Path
) -> None:
    recording = copied(name, tmp_path)
    path = file_of_call(recording, *call)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ToolFormatError, match=says) as caught:
        probe(RecordedMachine(recording))
    assert caught.value.command == " ".join(call)


@pytest.mark.parametrize("vendor", VENDORS)
def test_every_vendor_has_a_recording_in_which_its_devices_are_found(vendor: str) -> None:
    found = {device.vendor for name in recordings_of(vendor) for device in profile_of(name).devices}
    assert found == {vendor}
