"""Where the time of a step goes: `python -m bench profile`.

Steps a case under torch.profiler, on a GPU or the CPU, prints the stages of a step
(radam_kernels.plan and .update) with their time on the host, and writes a trace for
ui.perfetto.dev. The profiler itself takes time, so compare shares; the step without it is timed
beside it. Where NVIDIA's nsys is on the PATH and torch finds a GPU, it then profiles training
(python -m radam_kernels train), sums kernels and stages, and leaves a report for Nsight Systems.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import radam_kernels

from .cases import all_cases, renew_gradients, small
from .tables import duration

WARM_UP, STEPS = 7, 50


def main(arguments: Sequence[str] | None = None) -> int:
    every = {case.name: case for case in all_cases()}
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser("python -m bench profile", description=__doc__.split(":")[0])
    parser.add_argument("--case", default=small(1000), choices=every, metavar="CASE")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--trace", type=Path, default=Path("step_trace.json"), help="(%(default)s)")
    args = parser.parse_args(arguments)
    case = every[args.case]
    params = case.make(torch.device(args.device))
    optimizer = radam_kernels.RAdam(params)

    def median(steps: int) -> float:
        times = []
        for _ in range(steps):
            if case.new_gradients:
                renew_gradients(params)
            begin = time.perf_counter()
            optimizer.step()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    median(WARM_UP)
    plain = median(STEPS)
    activities = {ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])}
    with profile(activities=activities) as profiler:
        profiled = median(STEPS)
    profiler.export_chrome_trace(str(args.trace))
    stages = [event for event in profiler.key_averages() if "adam" in event.key.lower()]
    for event in stages:
        print(f"{event.key:40}{duration(event.cpu_time_total / 1e6 / STEPS):>10} a step")
    print(f"{case.name} on {args.device}, host: {duration(plain)} a step, ", end="")
    print(f"{duration(profiled)} under the profiler. Trace: {args.trace}")
    return nsys(args.trace.with_suffix("")) if gpu else 0


def nsys(report: Path) -> int:
    """Profiles training, if nsys is there."""
    if not shutil.which("nsys"):
        print("nsys is not on the PATH: NVIDIA Nsight Systems shows what the GPU does")
        return 0
    with tempfile.TemporaryDirectory() as out:
        words = ["nsys", "profile", "--trace=cuda,nvtx", "--force-overwrite=true"]
        words += [f"--output={report}", sys.executable, "-m", "radam_kernels", "train"]
        subprocess.run([*words, "--device", "cuda", "--steps", "30", "--out", out], check=True)
    sums = ["--report", "cuda_gpu_kern_sum", "--report", "nvtx_sum", f"{report}.nsys-rep"]
    return subprocess.run(["nsys", "stats", "--force-export=true", *sums]).returncode
