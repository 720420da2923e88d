# SPDX-License-Identifier: Apache-2.0
"""Same node, host memory: see ``backend``."""
