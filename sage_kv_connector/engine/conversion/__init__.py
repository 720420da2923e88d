# SPDX-License-Identifier: Apache-2.0
"""From pages to wire formats and back: the plan, staging memory, jobs on host and device."""
