"""Random edits and steps, compared with the reference: plain, with a sanitizer, under jemalloc."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from torch.nn import Parameter

from radam_kernels import RAdam
from tests.fuzz import edits, refused
from tests.fuzz.machine import SETTINGS, Machine, run
from tests.fuzz.worlds import errors_change_nothing
from tests.helpers import give_gradients

ROOT = Path(__file__).parents[2]
MINUTES = float(os.environ.get("RADAM_FUZZ_MINUTES", "1"))  # for each of the slow tests


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_thread")
def test_edits_and_steps_are_those_of_the_reference():
    short = settings(SETTINGS, max_examples=40, derandomize=True)
    before = dict(Machine.counts)
    run_state_machine_as_test(Machine, settings=short)
    assert all(Machine.counts[what] > before[what] for what in before)


def optimizer_of_many(backend: str) -> tuple[RAdam, Parameter, Parameter]:
    """Beside the two parameters that are returned, it has some of other dtypes and formats."""
    groups = [
        {"params": [edits.make_param(Random(seed)) for seed in range(4)]},
        {
            "params": [Parameter(torch.ones(70, dtype=torch.bfloat16))],
            "master_weights": 24,
            "state_dtype": "block8",
        },
    ]
    optimizer = RAdam(groups, backend=backend)
    p, q = refused.add_plain_group(optimizer)
    give_gradients(optimizer)
    for _ in range(2):
        optimizer.step()
    return optimizer, p, q


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("edit", refused.STEPS)
def test_a_step_after_such_an_edit_is_refused_and_changes_nothing(edit, backend):
    optimizer, p, q = optimizer_of_many(backend)
    refused.STEPS[edit](optimizer, p, q, optimizer.state[p])
    with pytest.raises((RuntimeError, ValueError)), errors_change_nothing(optimizer):
        optimizer.step()


@pytest.mark.parametrize("edit", refused.LOADS)
def test_such_a_state_dict_is_refused_and_changes_nothing(edit):
    optimizer, _, _ = optimizer_of_many("cpu")
    found = copy.deepcopy(optimizer.state_dict())
    refused.LOADS[edit](found, found["state"][max(found["state"])])
    with pytest.raises((RuntimeError, ValueError)), errors_change_nothing(optimizer):
        optimizer.load_state_dict(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_thread")
def test_on_new_sequences_every_time():
    print(run(MINUTES))


def run_with(libraries: str, in_use: str, packages: Path = ROOT, **environment: str) -> None:
    """Runs the machine in a process of its own with libraries loaded before all others.

    Args:
        in_use: an expression that tells whether they are.
        packages: the folder that has the radam_kernels to run.
    """
    code = f"""
import torch
from radam_kernels.modules import cpu
from tests.fuzz.machine import run
assert {in_use}
torch.set_num_threads(1)
print(run({MINUTES}))
"""
    environment |= {
        "LD_PRELOAD": libraries,
        "PYTHONPATH": os.pathsep.join([str(packages), str(ROOT)]),
    }
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        cwd=packages,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60 * MINUTES + 900,  # hypothesis shrinks what it finds
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    print(done.stdout)


@pytest.mark.slow
def test_the_cpu_kernel_and_its_host_under_sanitizers(tmp_path):
    for tool in ("g++", "cmake", "ninja"):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool} on PATH")
    libraries = []
    for name in ("libasan.so", "libstdc++.so.6"):  # the former looks for __cxa_throw at its start
        command = ["g++", f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        libraries.append(found.stdout.strip())
        if not os.path.isabs(libraries[-1]):
            pytest.skip(f"g++ has no {name}")
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    package = shutil.copytree(ROOT / "radam_kernels", tmp_path / "radam_kernels", ignore=ignored)
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
    configure = ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", "-DRADAM_CUDA=OFF"]
    configure += [f"-DCMAKE_CXX_FLAGS={flags} -g1", "-DCMAKE_CXX_COMPILER=g++"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_INSTALL_PREFIX={package}"]
    for command in (configure, ["cmake", "--build", tmp_path / "build", "--target", "install"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    run_with(
        ":".join(libraries),
        "b'__asan_report_store' in open(cpu.__file__, 'rb').read()",
        tmp_path,
        ASAN_OPTIONS="detect_leaks=0",  # Python does not free everything at its end
        UBSAN_OPTIONS="print_stacktrace=1",
        PYTHONMALLOC="malloc",
    )


@pytest.mark.slow
def test_under_jemalloc():
    folders = [Path("/usr/lib"), *Path("/usr/lib").glob("*-linux-gnu"), Path("/usr/lib64")]
    found = [path for folder in folders if (path := folder / "libjemalloc.so.2").exists()]
    if not found:
        pytest.skip("needs libjemalloc.so.2 (Debian: libjemalloc2)")
    in_use = "'libjemalloc' in open('/proc/self/maps').read()"
    run_with(str(found[0]), in_use, MALLOC_CONF="junk:true", PYTHONMALLOC="malloc")
