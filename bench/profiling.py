"""Where the time of a step goes: `python -m bench profile`.

Steps a case under torch.profiler, on a GPU or the CPU, prints what share of a step each stage takes
on the host, and writes a trace for chrome://tracing or ui.perfetto.dev. The profiler itself takes
time, so compare shares; the step without it is timed beside it. Where NVIDIA's nsys is on the PATH
and torch finds a GPU, it then profiles training (python -m radam_kernels train), sums kernels and
stages, and leaves a report for Nsight Systems.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import radam_kernels

from .cases import all_cases, renew_gradients, small
from .tables import duration, markdown

STAGES = ("plan", "update")
WHOLE = "Optimizer.step#RAdam.step"  # torch's own range
WARM_UP = 7


def main(arguments: Sequence[str] | None = None) -> int:
    every = {case.name: case for case in all_cases()}
    parser = argparse.ArgumentParser("python -m bench profile", description=__doc__.split(":")[0])
    parser.add_argument("--case", default=small(1000), help="(%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--steps", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--trace", type=Path, default=Path("step_trace.json"), help="(%(default)s)")
    args = parser.parse_args(arguments)
    if args.case not in every:
        parser.error(f"--case: expected one of {list(every)}, got {args.case!r}")
    case = every[args.case]
    params = case.make(torch.device(args.device))
    optimizer = radam_kernels.RAdam(params, backend=args.backend)
    times: list[float] = []

    def step() -> None:
        if case.new_gradients:
            renew_gradients(params)
        begin = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - begin)

    plain = median(step, times, args.steps, WARM_UP)
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + (args.device != "cpu")]
    with profile(activities=activities) as profiler:
        profiled = median(step, times, args.steps)
    profiler.export_chrome_trace(str(args.trace))
    print(f"{case.name} on {args.device}, medians of {args.steps} steps, on the host")
    print(f"step(): {duration(plain)}; {duration(profiled)} under the profiler\n")
    print(table(stage_times(profiler)))
    print(f"\ntrace: {args.trace}")
    return nsys(args.trace.with_suffix("")) if args.device != "cpu" else 0


def median(step: Callable[[], None], times: list[float], steps: int, warm_up: int = 0) -> float:
    """Of what the steps put into `times`, after some to warm up."""
    for _ in range(warm_up):
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


def table(found: dict[str, float]) -> str:
    """A row for each stage, and one for what is in none of them: torch's wrapper, mostly."""
    whole = found["step()"]
    rest = whole - sum(found[stage] for stage in STAGES)
    rows = {stage: found[stage] for stage in STAGES} | {"the rest": rest, "step()": whole}
    return markdown(
        [{"stage": k, "time": duration(s), "share": f"{s / whole:.0%}"} for k, s in rows.items()]
    )


def nsys(report: Path) -> int:
    """Profiles training, if nsys is there."""
    if not shutil.which("nsys"):
        print("nsys is not on the PATH: install NVIDIA Nsight Systems for the GPU's side")
        return 0
    with tempfile.TemporaryDirectory() as out:
        words = ["nsys", "profile", "--trace=cuda,nvtx", "--force-overwrite=true"]
        words += [f"--output={report}", sys.executable, "-m", "radam_kernels", "train"]
        done = subprocess.run([*words, "--device", "cuda", "--steps", "30", "--out", out])
    if done.returncode:
        return done.returncode
    sums = ["--report", "cuda_gpu_kern_sum", "--report", "nvtx_sum"]
    return subprocess.run(
        ["nsys", "stats", "--force-export=true", *sums, f"{report}.nsys-rep"]
    ).returncode
