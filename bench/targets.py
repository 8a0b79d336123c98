"""How this RAdam compares with torch's optimizers on the CPU: `python -m bench.targets`.

Whole `step()` calls in float32. The optimizers take turns of a few steps, round after round, so
that a slow moment of a shared machine hits all of them; the first step of a turn warms the caches
and is not counted (in the rows "cold", a sweep over 64 MB empties them before every step instead,
as a backward pass would). The table shows medians and, in brackets, the spread from the 20th to the
80th percentile. Correctness first: all start from the same parameters, and the RAdams must agree
after the first steps.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import radam_kernels
from radam_kernels.modules import cpu

from .folders import ROOT
from .machine import commit

OURS, RADAM, ADAM = "radam_kernels.RAdam", "torch RAdam(foreach)", "torch Adam(fused)"
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    OURS: radam_kernels.RAdam,
    RADAM: lambda params: torch.optim.RAdam(params, foreach=True),
    ADAM: lambda params: torch.optim.Adam(params, fused=True),
}


class Case(NamedTuple):
    elements: int  # of a tensor
    tensors: int
    new_gradients: bool = False  # at each step, as after zero_grad(set_to_none=True)
    cold: bool = False  # empty the caches before each step
    radam_aim: float | None = None  # least ratio against torch's RAdam, where one is set
    adam_aim: float | None = None


CASES = {
    "one tensor of 64M": Case(1 << 26, 1, radam_aim=4.0, adam_aim=0.97),
    "one tensor of 64K": Case(1 << 16, 1, adam_aim=2.0),
    "1,000 tensors of 64": Case(64, 1000, radam_aim=30.0, adam_aim=8.0),
    "1,000 of 64, gradients new": Case(64, 1000, new_gradients=True, radam_aim=20.0, adam_aim=7.0),
    "1,000 of 64, new, cold": Case(64, 1000, new_gradients=True, cold=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=12, help="for each case (%(default)s)")
    parser.add_argument("--memory", choices=OPTIMIZERS, help="print that optimizer's peak and stop")
    args = parser.parse_args()
    if args.memory:
        print(f"{extra_memory(args.memory):.0f}")
        return
    print(f"{_cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"radam_kernels at {commit()}, sources {cpu.fingerprint}, {cpu.instruction_sets[0]}\n")
    print(
        f"{'case':28}{'optimizer':22}{'ms a step':>10}{'spread':>18}{'ours faster':>13}{'aim':>7}"
    )
    for title, case in CASES.items():
        times = measure(case, args.seconds)
        ours = statistics.median(times[OURS])
        for name, aim in zip(OPTIMIZERS, (None, case.radam_aim, case.adam_aim), strict=True):
            low, *_, high = (1e3 * t for t in statistics.quantiles(times[name], n=5))
            mid = statistics.median(times[name])
            print(
                f"{title if name == OURS else '':28}{name:22}{1e3 * mid:10.3f}"
                f"{f'({low:.3f}-{high:.3f})':>18}"
                + ("" if name == OURS else f"{mid / ours:12.2f}x")
                + (f"{aim:6.2f}x" if aim else "")
            )
    print(
        "\nmemory beyond parameters, gradients and two moments, one tensor of 64M (peak, measured)"
    )
    for name in OPTIMIZERS:
        report = [sys.executable, "-m", "bench.targets", "--memory", name]
        print(f"  {name:22}{subprocess.check_output(report, text=True, cwd=ROOT).strip():>8} MB")


def measure(case: Case, seconds: float) -> dict[str, list[float]]:
    """Seconds of each counted step of each optimizer."""
    optimizers = {}
    for name, make in OPTIMIZERS.items():
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(case.elements, generator=generator) for _ in range(2 * case.tensors)]
        params = [tensor.requires_grad_() for tensor in tensors[::2]]
        for param, grad in zip(params, tensors[1::2], strict=True):
            param.grad = grad
        optimizers[name] = (params, make(params))
        for _ in range(7):  # past the threshold
            optimizers[name][1].step()
    for ours, theirs in zip(optimizers[OURS][0], optimizers[RADAM][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

    sweep = torch.zeros(1 << 24) if case.cold else None
    turn = 2 if case.elements * case.tensors > 1 << 20 else 15
    times: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    begin = time.perf_counter()
    while len(times[OURS]) < 5 or time.perf_counter() - begin < seconds:
        for name, (params, optimizer) in optimizers.items():
            for i in range(turn):
                if case.new_gradients:
                    for param in params:
                        param.grad = param.grad.clone()
                if sweep is not None:
                    sweep.add_(1)
                before = time.perf_counter()
                optimizer.step()
                if i > 0:
                    times[name].append(time.perf_counter() - before)
    return times


def extra_memory(name: str, size: int = 1 << 26) -> float:
    """Megabytes that steps need at their peak beyond parameters, gradients and moments (Linux)."""
    for numel in (1, size):  # a first step loads code, which is not the question
        param = torch.ones(numel).requires_grad_()
        param.grad = torch.ones(numel)
        before = _peak()
        optimizer = OPTIMIZERS[name]([param])
        for _ in range(7):
            optimizer.step()
    return (_peak() - before - 2 * param.nbytes) / 1e6


def _peak() -> int:
    """Bytes of memory that this process has had at once, at most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


if __name__ == "__main__":
    main()
