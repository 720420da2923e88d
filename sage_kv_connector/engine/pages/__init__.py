# SPDX-License-Identifier: Apache-2.0
"""Where a producer's bytes come from, and where a consumer's go: pages, items, plain memory."""
