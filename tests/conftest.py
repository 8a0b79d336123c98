"""Lets the Triton backend run on a machine without a GPU, says what "the same bits" means, and runs
scripts that may crash."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of every element, with one pattern for all NaNs."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    tensor = torch.where(tensor.isnan(), torch.nan, tensor).contiguous()
    return tensor.view(_BITS[tensor.element_size()])


@pytest.fixture(scope="session")
def same_bits():
    """Whether two tensors hold the same bits: NaN is NaN, -0.0 is not 0.0."""

    def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(_bits(a.detach().cpu()), _bits(b.detach().cpu()))
        )

    return same_bits


# Imports all once, then runs each script that it reads in a fork of itself.
_FORKING = """
import json, os, sys, tempfile, time, traceback
import torch
import radam_kernels
torch.set_num_threads(1)
for backend in ("cpu", "reference"):  # what torch imports late
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    radam_kernels.RAdam([param], backend=backend).step()

def run(script, output):
    code = 1
    try:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

def wait(child, timeout):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return f"more than {timeout} s"

for line in sys.stdin:
    script, timeout = json.loads(line)
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if not child:
            run(script, output)
        code = wait(child, timeout)
        output.seek(0)
        print(json.dumps([code, output.read()]), flush=True)
"""


class Processes:
    """Runs scripts in processes of their own, which have torch and radam_kernels imported.

    Freed memory is overwritten there, so that its use shows.
    """

    def __init__(self) -> None:
        root = Path(__file__).parents[1]
        overwrite = {"PYTHONMALLOC": "debug", "MALLOC_PERTURB_": "165"}
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", _FORKING],
            cwd=root,
            env={**os.environ, **overwrite},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, timeout: float = 60) -> tuple[int | str, str]:
        """The exit code, negative for a signal, and the output; all of it is over then."""
        print(json.dumps([script, timeout]), file=self.process.stdin, flush=True)
        code, output = json.loads(self.process.stdout.readline())
        return code, output


@pytest.fixture(scope="session")
def processes():
    """Processes for scripts that may crash, hang or be killed."""
    made = Processes()
    yield made
    made.process.stdin.close()
    made.process.wait()


@pytest.fixture
def succeeds(processes):
    """Fails the test unless a script ends well in a process of its own."""

    def succeeds(script: str, timeout: float = 60) -> str:
        code, output = processes.run(script, timeout)
        assert code == 0, f"exit code {code}\n{output[-4000:]}"
        return output

    return succeeds
