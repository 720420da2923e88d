# SPDX-License-Identifier: Apache-2.0
"""A peer that keeps KV in its memory for others: ``server`` keeps, ``client`` puts and gets.

Both stand on the transport's engine: a question says which keys, an ordinary transfer on the
same session moves their bytes.
"""
