# SPDX-License-Identifier: Apache-2.0
"""Which of SAGE's packages are here, and whether they take our comm backend."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

#: Distributions that take something of ours: the comm backend, the plugin of the command line.
PACKAGES = ("isagellm-comm", "isage-cli")


def installed_packages() -> dict[str, str]:
    """Distribution → version, of those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_comm_backend() -> None:
    """Register the comm backend, where sageLLM is installed. Raises what stands in the way."""
    if PACKAGES[0] in installed_packages():
        from sage_kv_connector.integrations.sage import comm_backend

        comm_backend.register()
