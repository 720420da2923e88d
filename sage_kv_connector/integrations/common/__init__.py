# SPDX-License-Identifier: Apache-2.0
"""What several engines' integrations share; it knows none of them."""
