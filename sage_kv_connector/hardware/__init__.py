# SPDX-License-Identifier: Apache-2.0
"""What this machine has for moving KV: devices, links, and what to set for them.

``topology.probe`` finds it, ``profile.HardwareProfile`` is what it answers, ``recommend`` turns
that into options, ``measure`` replaces table values by timed ones.
"""
