# SPDX-License-Identifier: Apache-2.0
"""How KV is written on the wire: formats, their arithmetic, and who carries it out."""
