"""Memory does not grow over many steps with edits, errors, copies and checkpoints between them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# What so many steps may leave: less than one object for each round of edits, which are 12.
STEPS_AN_OBJECT, BYTES = 24, 1 << 14


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "steps"), [("cpu", 10_000), ("reference", 2_000)])
def test_steps_leave_nothing_behind(backend, steps):
    # Freed memory that malloc keeps for a thread counts as in use.
    exact = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.leaks", backend, str(steps)],
        cwd=Path(__file__).parents[2],
        env=os.environ | exact,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    objects, size = map(int, done.stdout.split())
    assert objects < steps // STEPS_AN_OBJECT
    assert size < BYTES
