# SPDX-License-Identifier: Apache-2.0
"""The control thread, and where peers can be reached."""
