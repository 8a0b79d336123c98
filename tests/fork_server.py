"""Imports all once, then runs each script that it reads in a fork of itself.

`python -m tests.fork_server MODULE...`, with further modules to import.
"""

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TextIO

import torch

import radam_kernels


def run_in_fork(call: Callable[[], object], output: TextIO) -> int:
    """Calls in a fork of this process, which exits with 1 after an exception; returns its id."""
    if child := os.fork():
        return child
    code = 1
    try:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        # torch makes a new thread pool in a fork. Two threads of autograd must not do it at once.
        torch.set_num_threads(1)
        call()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run_script(script: str) -> None:
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})


def _wait(child: int, timeout: float) -> int | str:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"more than {timeout} s"


def main() -> None:
    for module in sys.argv[1:]:
        import_module(module)
    torch.set_num_threads(1)
    for backend in ("cpu", "reference"):  # what torch imports late
        param = torch.nn.Parameter(torch.ones(2))
        param.grad = torch.ones(2)
        radam_kernels.RAdam([param], backend=backend).step()
    for line in sys.stdin:
        script, timeout = json.loads(line)
        with tempfile.TemporaryFile("w+") as output:
            child = run_in_fork(partial(_run_script, script), output)
            result = _wait(child, timeout)
            output.seek(0)
            print(json.dumps([result, output.read()]), flush=True)


if __name__ == "__main__":
    main()
