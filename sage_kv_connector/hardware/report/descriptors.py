# SPDX-License-Identifier: Apache-2.0
"""All vendors' descriptors together: by vendor, by chip, by what torch calls their cards."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from sage_kv_connector.hardware.probing.accelerator_descriptor import (
    AcceleratorDescriptor,
    AnyLinkKind,
    VendorDescriptors,
    parse_descriptors,
)
from sage_kv_connector.vendors import BrokenVendor, descriptor_text, third_party, vendor_names


@cache
def descriptors(vendor: str) -> VendorDescriptors:
    """A vendor's table.

    Raises ValueError for a vendor without one, ValidationError for a bad file of ours, BrokenVendor for a
    third party's.
    """
    if vendor not in vendor_names():
        raise ValueError(f"vendor {vendor!r} has no descriptor; allowed: {', '.join(vendor_names())}")
    text = descriptor_text(vendor)
    with third_party(vendor, "parsing its descriptor.yaml"):
        table = parse_descriptors(text)
    if table.vendor != vendor:
        raise BrokenVendor(vendor, f"its descriptor.yaml says that the vendor is {table.vendor!r}")
    return table


def known_descriptors() -> Iterator[tuple[str, VendorDescriptors | BrokenVendor]]:
    """Every vendor, with its table or with what is wrong with it."""
    for vendor in vendor_names():
        try:
            yield vendor, descriptors(vendor)
        except BrokenVendor as error:
            yield vendor, error


def all_descriptors() -> Iterator[VendorDescriptors]:
    """Every vendor's table, but for third parties' that can't be read."""
    for _, table in known_descriptors():
        if isinstance(table, VendorDescriptors):
            yield table


def broken_vendors() -> list[str]:
    """What is wrong with third parties' vendors whose table can't be read."""
    return [str(table) for _, table in known_descriptors() if isinstance(table, BrokenVendor)]


def find_descriptor(vendor: str, pci_device: str | None, name: str) -> AcceleratorDescriptor | None:
    """A chip's descriptor, by PCI device id, else by the name that tools print.

    The id comes first because drivers print names that several chips share ("Ascend910").
    """
    chips = descriptors(vendor).chips
    if pci_device is not None:
        sharing = [chip for chip in chips if pci_device.lower() in chip.pci_devices]
        named = [chip for chip in sharing if chip.is_named(name)]
        if sharing:
            return (named or sharing)[0]
    return next((chip for chip in chips if chip.is_named(name)), None)


def private_links() -> dict[str, AnyLinkKind]:
    """Words of topology tools that mean a link which a vendor made for its own devices."""
    return {word: kind for table in all_descriptors() for word, kind in table.private_links.items()}


def vendors_of_torch_device(device_type: str, build: str | None = None) -> tuple[str, ...]:
    """Vendors whose cards torch calls so, in the order to try them.

    ``build``: the one that torch says it was made for; then only its vendors.
    """
    tables = [table for table in all_descriptors() if device_type in table.torch_devices]
    made_for = [table for table in tables if build is not None and table.torch_build == build]
    turns = {table.vendor: table.torch_devices[device_type] for table in made_for or tables}
    return tuple(sorted(turns, key=lambda vendor: turns[vendor]))


def torch_devices() -> tuple[str, ...]:
    """Every device type of torch that some vendor's cards have."""
    return tuple(sorted({name for table in all_descriptors() for name in table.torch_devices}))


def torch_builds() -> tuple[str, ...]:
    """Attributes of ``torch.version`` that say for whose cards torch was made."""
    return tuple(sorted({table.torch_build for table in all_descriptors() if table.torch_build}))
