# SPDX-License-Identifier: Apache-2.0
"""Any two machines: see ``backend``."""
