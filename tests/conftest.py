"""The devices that a run of tests sees, and processes for scripts that may crash."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Hides all GPUs, unless the run asks for GPU tests: then others pass on every machine.

    Runs before any test file is imported, so before triton and the CUDA driver read these.
    Processes that tests start inherit them.
    """
    if asks_for_gpu_tests(config.option.markexpr):
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests in the folders bench, frameworks and paper."""
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder in ("bench", "frameworks", "paper"):
            item.add_marker(folder)


def selects(expression: str, *marks: str) -> bool:
    """Whether a marker expression (`-m`) selects a test with these marks."""
    try:
        # The syntax is Python's, with markers as names.
        return bool(eval(expression or "True", {}, defaultdict(bool, dict.fromkeys(marks, True))))
    except SyntaxError:  # which pytest is about to report
        return False


def asks_for_gpu_tests(expression: str) -> bool:
    """Whether a marker expression selects tests of a GPU, and no others."""
    others = [(), ("slow",), ("bench",), ("paper",), ("distributed",), ("frameworks",)]
    asks = selects(expression, "gpu") or selects(expression, "gpu", "sanitize")
    return asks and not any(selects(expression, *marks) for marks in others)


class Processes:
    """Runs scripts in processes of their own, which have torch and radam_kernels imported.

    Freed memory is overwritten there, so that its use shows.

    Args:
        modules: further modules to have imported.
    """

    def __init__(self, *modules: str) -> None:
        root = Path(__file__).parents[1]
        overwrite = {"PYTHONMALLOC": "debug", "MALLOC_PERTURB_": "165"}
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "tests.fork_server", *modules],
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

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Processes for scripts that may crash, hang or be killed."""
    made = Processes()
    yield made
    made.close()


@pytest.fixture
def succeeds(processes: Processes) -> Callable[..., str]:
    """Runs a script in a process of its own, and fails the test unless it exits with 0."""

    def succeeds(script: str, timeout: float = 60) -> str:
        code, output = processes.run(script, timeout)
        assert code == 0, f"exit code {code}\n{output[-4000:]}"
        return output

    return succeeds
