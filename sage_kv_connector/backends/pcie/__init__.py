# SPDX-License-Identifier: Apache-2.0
"""Same node, device to device: see ``backend``."""
