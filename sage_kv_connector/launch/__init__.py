# SPDX-License-Identifier: Apache-2.0
"""Server processes as a library, for the roof (``bench``, ``demo``, ``cli``) and for tests."""
