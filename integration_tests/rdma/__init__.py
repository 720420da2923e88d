# SPDX-License-Identifier: Apache-2.0
"""RDMA where there is no RDMA: soft-RoCE and siw in a virtual machine (``guest``), and what is run there."""
