# SPDX-License-Identifier: Apache-2.0
"""What vendors' probes stand on: reading files and tools, findings, descriptors, the profile they fill."""
