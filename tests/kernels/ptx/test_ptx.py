"""The PTX that nvcc and Triton make of the kernels, executed on the CPU, gives the right bits.

`pytest -m slow` runs this; check.py says what it compares, and what it can't show. It runs in a
process of its own, because conftest.py has set Triton to interpret in this one.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from radam_kernels.backends import triton_
from tests.kernels.ptx.check import norm_sums, steps
from tests.kernels.ptx.faults import FAULTS

ROOT = Path(__file__).parents[3]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the interpreter takes fma() from glibc"),
]


def need(backend: str) -> None:
    """Skips a test without the compiler of a backend's kernels."""
    if backend == "cuda":
        for tool in ("nvcc", "c++filt"):
            if shutil.which(tool) is None:
                pytest.skip(f"no {tool} on PATH")
    else:
        pytest.importorskip("triton", reason="triton is not installed")
        if not triton_.COMPILES_EXACTLY:
            pytest.skip("this Triton flushes subnormals, and is refused")


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], None]]:
    """Runs one of check.py's checks, and fails with what it finds."""
    folder = tmp_path_factory.mktemp("ptx")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "triton")
    log = folder / "stderr.txt"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.ptx.check", "--serve"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    def check(name: str) -> None:
        try:
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            report = json.loads(process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            pytest.fail(f"the interpreter's process has ended:\n{log.read_text()[-4000:]}")
        if report["wrong"]:
            pytest.fail("\n".join([*report["wrong"][:5], *report["notes"]]), pytrace=False)

    yield check
    process.stdin.close()
    process.wait()


def test_the_interpreters_own_arithmetic_is_exact(check):
    check("arithmetic")


@pytest.mark.parametrize("step", steps(), ids=lambda step: step.replace(" ", "-"))
def test_a_step_kernel_gives_the_bits_of_the_reference(check, step):
    need(step.split()[0])
    check(step)


@pytest.mark.parametrize("norm", norm_sums(), ids=lambda norm: norm.replace(" ", "-"))
def test_the_kernels_of_a_norm_add_up_every_element(check, norm):
    need(norm.split()[0])
    check(norm)


def test_counts_advance_as_they_do_on_the_host(check):
    need("cuda")
    check("cuda advance")


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_an_upload_arrives_whole(check, backend):
    need(backend)
    check(f"{backend} upload")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.backend}-{f.name.replace(' ', '-')}")
def test_a_planted_fault_is_seen(check, fault):
    need(fault.backend)
    check(f"fault: {fault.name}")
