# SPDX-License-Identifier: Apache-2.0
"""What an engine writes down of its transfers: see ``recorder``."""
