# SPDX-License-Identifier: Apache-2.0
"""Vendors of other distributions: found by their entry point, imported when used, and no one's trouble but theirs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import pytest

from sage_kv_connector import vendors
from sage_kv_connector.hardware.probing.recording import RecordedMachine
from sage_kv_connector.hardware.probing.tool_output import ToolFormatError
from sage_kv_connector.hardware.report.descriptors import descriptors, vendors_of_torch_device
from sage_kv_connector.hardware.report.topology import probe
from sage_kv_connector.integrations.common.accelerator import device_of
from sage_kv_connector.vendors import VENDORS, BrokenVendor, available_runtimes, open_runtime, vendor_names
from sage_kv_connector.vendors.emulator import EmulatorSettings
from tests.hardware.recorded import RECORDINGS

DESCRIPTOR = """\
vendor: acme
title: Acme
pci_vendor: "ac3e"
pci_classes: ["12"]
pci_source: made up
nodes: /dev/acme*
tools: []
torch_devices: {acme: 1}
private_links: {AL: acme-link}
checked_on: nothing
runtime_api: {value: Acme runtime, source: made up}
chips:
  - {chip: A1, names: [A1*], links: [{kind: acme-link, cells: [AL]}, {kind: pcie}]}
"""
PROBE = """\
from sage_kv_connector.hardware.probing.findings import Findings, FoundDevice, FoundLink


def probe(machine, functions):
    devices = [FoundDevice(0, "A1"), FoundDevice(1, "A1")]
    return Findings(devices=devices, links=[FoundLink(0, 1, "AL", "acme-smi")])
"""
#: The same C interface under the newcomer's name: HIP's, as a vendor that ships its own HIP would have it.
RUNTIME = """\
from dataclasses import replace

from sage_kv_connector.vendors.hygon.runtime import HygonRuntime
from sage_kv_connector.vendors.hygon.runtime import INTERFACE as HIP

INTERFACE = replace(HIP, vendor="acme", sonames=("libacme.so",), folders=())


class AcmeRuntime(HygonRuntime):
    interface = INTERFACE


def create(library):
    return AcmeRuntime(library)
"""
HERE = Path(vendors.__file__).parent


class Site:
    """A place on the path with distributions that offer vendors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def offer(self, name: str, value: str, distribution: str = "acme-kv") -> None:
        info = self.folder / f"{distribution.replace('-', '_')}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[sage_kv_connector.vendors]\n{name} = {value}\n")
        vendors._packages.cache_clear()

    def package(self, **changed: str | None) -> None:
        """A whole vendor; ``changed`` are files' other texts by stem, None leaves a file out."""
        folder = self.folder / "acme_kv"
        folder.mkdir()
        (folder / "__init__.py").touch()
        for file, text in (("descriptor.yaml", DESCRIPTOR), ("probe.py", PROBE), ("runtime.py", RUNTIME)):
            chosen = changed.get(Path(file).stem, text)
            if chosen is not None:
                (folder / file).write_text(dedent(chosen))
        (folder / "emulator.cc").write_text((HERE / "hygon" / "emulator.cc").read_text())


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.syspath_prepend(str(tmp_path))
    _forget()
    yield Site(tmp_path)
    monkeypatch.undo()
    _forget()


def _forget() -> None:
    """A process looks for entry points once."""
    vendors._packages.cache_clear()
    descriptors.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "acme_kv"]:
        del sys.modules[name]


def test_built_in_vendors_are_the_folders_with_a_descriptor() -> None:
    assert vendor_names()[: len(VENDORS)] == VENDORS
    for vendor in VENDORS:
        assert {path.name for path in (HERE / vendor).iterdir()} >= {"abi.py", "probe.py", "runtime.py"}


def test_another_distribution_s_vendor_works_like_ours(site: Site) -> None:
    site.offer("acme", "acme_kv")
    site.package()
    assert "acme" in vendor_names() and "acme_kv" not in sys.modules
    runtime = open_runtime("acme", EmulatorSettings(devices=3))
    assert (runtime.vendor, runtime.device_count()) == ("acme", 3)
    assert descriptors("acme").title == "Acme"
    assert vendors_of_torch_device("acme") == ("acme",)
    assert "no HIP library could be loaded: libacme.so" in str(available_runtimes()["acme"])


def test_its_devices_and_its_own_link_are_in_the_profile(site: Site) -> None:
    site.offer("acme", "acme_kv")
    site.package()
    profile = probe(RecordedMachine(RECORDINGS / "host_only"))
    assert [(device.id, device.chip) for device in profile.devices] == [("acme0", "A1"), ("acme1", "A1")]
    assert [(link.a, link.b, link.kind) for link in profile.links][:1] == [("acme0", "acme1", "acme-link")]


def test_a_built_in_vendor_wins(site: Site) -> None:
    site.offer(VENDORS[0], "acme_kv")
    assert vendor_names() == VENDORS
    assert descriptors(VENDORS[0]).vendor == VENDORS[0]


@pytest.mark.parametrize(
    ("value", "changed", "problem"),
    [
        ("acme_gone", {}, "importing acme_gone.runtime raised ModuleNotFoundError"),
        ("json.decoder", {}, "importing json.decoder.runtime raised ModuleNotFoundError"),
        ("acme_kv", {"runtime": "1 / 0\n"}, "importing acme_kv.runtime raised ZeroDivisionError"),
        ("acme_kv", {"runtime": None}, "importing acme_kv.runtime raised ModuleNotFoundError"),
        ("acme_kv", {"runtime": "INTERFACE = 1\n"}, "acme_kv.runtime has no create"),
        (
            "acme_kv",
            {"runtime": "from sage_kv_connector.vendors.hygon.runtime import *\n"},
            "its INTERFACE says that the vendor is 'hygon'",
        ),
    ],
)
def test_a_bad_runtime_is_named_when_it_is_used(
    site: Site, value: str, changed: dict[str, str | None], problem: str
) -> None:
    site.offer("acme", value)
    site.package(**changed)
    with pytest.raises(BrokenVendor) as caught:
        open_runtime("acme")
    assert str(caught.value).startswith(
        f"vendor 'acme', entry point 'acme = {value}' of sage_kv_connector.vendors: {problem}"
    )
    available = available_runtimes()
    assert str(available["acme"]) == str(caught.value) and set(available) == {*VENDORS, "acme"}


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"descriptor": None}, "reading its descriptor.yaml raised FileNotFoundError"),
        ({"descriptor": "[]"}, "parsing its descriptor.yaml raised"),
        (
            {"descriptor": DESCRIPTOR.replace("pcie", "PCIe bus")},
            "parsing its descriptor.yaml raised ValidationError",
        ),
        ({"descriptor": DESCRIPTOR.replace("vendor: acme", "vendor: other")}, "the vendor is 'other'"),
        ({"probe": "probe = None\n"}, "its probe raised TypeError"),
        ({"probe": "import nothing_of_that_name\n"}, "importing acme_kv.probe raised ModuleNotFoundError"),
    ],
)
def test_a_bad_package_is_a_note_beside_the_other_vendors(
    site: Site, changed: dict[str, str | None], problem: str
) -> None:
    name = next(path.name for path in sorted(RECORDINGS.iterdir()) if path.name.startswith(VENDORS[0]))
    before = probe(RecordedMachine(RECORDINGS / name))
    site.offer("acme", "acme_kv")
    site.package(**changed)
    profile = probe(RecordedMachine(RECORDINGS / name))
    assert profile.devices == before.devices and profile.links == before.links
    (note,) = [note for note in profile.notes if note.about == "acme"]
    assert "entry point 'acme = acme_kv'" in note.text and problem in note.text


def test_a_tool_s_new_output_is_still_named_by_its_line(site: Site) -> None:
    """What a probe can't read stays the error that every vendor's is."""
    site.offer("acme", "acme_kv")
    raising = "from sage_kv_connector.hardware.probing.tool_output import ToolFormatError\n"
    raising += "def probe(machine, functions):\n    raise ToolFormatError('acme-smi', 3, 'odd', 'a table')\n"
    site.package(probe=raising)
    with pytest.raises(ToolFormatError, match="`acme-smi` line 3: 'odd': expected a table"):
        probe(RecordedMachine(RECORDINGS / "host_only"))


def test_a_torch_device_that_nobody_serves_names_who_is_broken(site: Site) -> None:
    site.offer("acme", "acme_kv")
    site.package(descriptor=None)
    tensor = SimpleNamespace(device=SimpleNamespace(type="acme", index=0))
    with pytest.raises(ValueError, match=r"allowed: cpu, cuda.*; vendor 'acme', entry point"):
        device_of([tensor])
