"""Where the time of a step goes, by its stages: `python -m bench.step_profile [--trace FILE]`.

Steps one of bench/cases.py's lists under torch.profiler, on a GPU or the CPU, prints what share of
a step each stage takes on the host, and writes a trace for chrome://tracing or ui.perfetto.dev. The
profiler itself takes time, so the share of a stage is the news, and the step without a profiler is
timed beside it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import radam_kernels

from .cases import cases, renew_gradients

STAGES = ("plan", "update")
WHOLE = "Optimizer.step#RAdam.step"  # torch's own range
WARM = 7


def main(arguments: list[str] | None = None) -> int:
    every = {case.name: case for case in cases(dry_run=False)}
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--case", default="1,000 tensors of 64 float32", help="(%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--steps", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--new-gradients", action="store_true", help="at each step")
    parser.add_argument("--trace", type=Path, default=Path("step_trace.json"), help="(%(default)s)")
    args = parser.parse_args(arguments)
    if args.case not in every:
        parser.error(f"--case: expected one of {list(every)}, got {args.case!r}")
    params = every[args.case].make(torch.device(args.device))
    optimizer = radam_kernels.RAdam(params, backend=args.backend)

    def step() -> None:
        if args.new_gradients:
            renew_gradients(params)
        begin = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - begin)

    times: list[float] = []
    plain = measure(step, times, args.steps)
    activities = [ProfilerActivity.CPU]
    if args.device != "cpu":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        profiled = measure(step, times, args.steps, warm=0)
    profiler.export_chrome_trace(str(args.trace))
    print(f"{args.case} on {args.device}, {len(params)} tensors, medians of {args.steps} steps")
    print(f"step(): {1e6 * plain:.1f} us on the host; {1e6 * profiled:.1f} us under the profiler\n")
    print("\n".join(lines(stage_times(profiler))))
    print(f"\ntrace: {args.trace}")
    return 0


def measure(step: Callable[[], None], times: list[float], steps: int, warm: int = WARM) -> float:
    """The median of what the steps put into `times`, after some to warm up."""
    for _ in range(warm):
        step()
    times.clear()
    for _ in range(steps):
        step()
    return statistics.median(times)


def stage_times(profiler: profile) -> dict[str, float]:
    """Seconds of each stage in a step on the host, and of the whole step, medians."""
    names = {f"radam_kernels.{stage}": stage for stage in STAGES} | {WHOLE: "step()"}
    found: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.name in names and event.device_type == torch.autograd.DeviceType.CPU:
            found.setdefault(names[event.name], []).append(event.cpu_time_total / 1e6)
    return {name: statistics.median(times) for name, times in found.items()}


def lines(found: dict[str, float]) -> list[str]:
    """A row for each stage, and one for what is in none of them: torch's wrapper, mostly."""
    whole = found["step()"]
    rows = [(stage, found[stage]) for stage in STAGES if stage in found]
    rows += [("the rest", whole - sum(seconds for _, seconds in rows)), ("step()", whole)]
    head = f"{'stage':12}{'us':>10}{'share':>8}"
    return [head, *(f"{name:12}{1e6 * s:10.1f}{s / whole:8.0%}" for name, s in rows)]


if __name__ == "__main__":
    raise SystemExit(main())
