# SPDX-License-Identifier: Apache-2.0
"""Through an installed Mooncake transfer engine: see ``backend``."""
