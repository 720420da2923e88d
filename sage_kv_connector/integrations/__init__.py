# SPDX-License-Identifier: Apache-2.0
"""How inference engines reach the transport. Each folder imports its engine; nothing else does."""
