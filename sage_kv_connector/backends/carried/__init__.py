# SPDX-License-Identifier: Apache-2.0
"""What the backends over an installed transfer library share: see ``library`` and ``backend``."""
