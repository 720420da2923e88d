# SPDX-License-Identifier: Apache-2.0
"""Through an installed NIXL: see ``backend``."""
