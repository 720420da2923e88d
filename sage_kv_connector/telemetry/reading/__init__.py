# SPDX-License-Identifier: Apache-2.0
"""How snapshots are read: from the engines of a machine, as Prometheus, JSON, a page or a terminal."""
