# SPDX-License-Identifier: Apache-2.0
"""Authenticated connections to peers: messages, handshake, questions."""
