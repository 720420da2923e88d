# SPDX-License-Identifier: Apache-2.0
"""Two machines with RDMA network cards: see ``backend``."""
