# SPDX-License-Identifier: Apache-2.0
"""What composes the vendors' probes: topology, links, timed values, recommended options."""
