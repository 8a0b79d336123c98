"""Memory does not grow over many steps with edits, errors, copies and checkpoints between them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

OBJECTS, BYTES = 500, 1 << 14  # what 10,000 steps may leave: far below one for each step or edit


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
    )
    assert done.returncode == 0, done.stderr[-4000:]
    objects, size = map(int, done.stdout.split())
    assert objects < OBJECTS
    assert size < BYTES
