# SPDX-License-Identifier: Apache-2.0
"""Sessions, producer and consumer of KV transfers over any backend; docs/protocol.md is the wire format."""
