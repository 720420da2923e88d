# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
import os
import resource

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says what else the machine does; benchmarks measure.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

# What a login shell may have: descriptors that tests leave open show here as on every machine.
DESCRIPTORS = 1024
_, _most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, _most))
#: Of them: what lies in cycles (engines with emulated machines) is collected then.
MANY = 256


@pytest.fixture
def collected() -> None:
    """For tests that count what the process holds: what earlier ones left in cycles does not go meanwhile."""
    gc.collect()


def pytest_runtest_teardown() -> None:
    if len(os.listdir("/proc/self/fd")) > MANY:
        gc.collect()
