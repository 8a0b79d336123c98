"""Everything that needs a GPU, in stages: `python -m bench gpu`.

Each stage has a time limit, and all but `tune` fit into ten minutes. No network is needed. Results
go to bench/results/<device>, logs to its folder `logs`; stages.json tells what came of each stage.
A stage that succeeded with these sources is not run again, unless it is named.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pandas as pd
import torch

from radam_kernels.fingerprint import measured_fingerprint

from .. import cases, results

FILE = "stages.json"
TOOLS = ("memcheck", "racecheck", "initcheck")
RESERVE = 15  # seconds that a measurement has to end and write its table
WRONG = 86  # the exit status that compute-sanitizer is told to give for an error that it finds
PROFILED = (cases.size(28), cases.size(28, "bfloat16"))
METRICS = {
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "of the peak bandwidth",
    "gpu__time_duration.sum": "duration",
    "launch__registers_per_thread": "registers",
}


class Outcome(NamedTuple):
    status: str  # ok, failed or skipped
    reason: str


def ok(reason: str) -> Outcome:
    return Outcome("ok", reason)


def failed(reason: str) -> Outcome:
    return Outcome("failed", reason)


def skipped(reason: str) -> Outcome:
    return Outcome("skipped", reason)


@dataclass
class Run:
    """Where the stages run, and how."""

    out: Path
    dry: bool = False
    deadline: float = 0.0  # of the current stage, by time.monotonic()
    environment: dict[str, str] = field(default_factory=dict)  # beside what is there

    @property
    def logs(self) -> Path:
        return self.out / "logs"

    def call(self, log: str, command: Sequence[object], **environment: str) -> int:
        """Runs a command with its output in a log, for no longer than the stage has left.

        Returns its exit status, or 124 where time ran out.
        """
        left = self.deadline - time.monotonic()
        self.logs.mkdir(parents=True, exist_ok=True)
        with (self.logs / f"{log}.log").open("w") as output:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=results.ROOT,
                env={**os.environ, **self.environment, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its children end with it
            )
            try:
                return process.wait(max(left, 0))
            except subprocess.TimeoutExpired:
                return 124
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, 9)
                    process.wait()

    def why(self, log: str, status: int) -> str:
        """The status of a command that failed, and the last line of its log."""
        lines = (self.logs / f"{log}.log").read_text(errors="replace").strip().splitlines() or [""]
        return "out of time" if status == 124 else f"exit status {status}: {lines[-1][:200]}"

    def tests(self, name: str) -> dict[str, int]:
        """Counts of a junit file; none where there is no such file."""
        try:
            root = ElementTree.parse(self.logs / name).getroot()
        except (OSError, ElementTree.ParseError):
            return {}
        [suite] = root.iter("testsuite")
        return {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}


def build(run: Run) -> Outcome:
    """Builds the kernels for this GPU's architecture only, and lets the doctor try them."""
    missing = [name for name in ("cmake", "ninja", "nvcc") if not shutil.which(name)]
    if run.dry:
        return ok(f"dry run: nothing built; missing: {', '.join(missing) or 'nothing'}")
    arch = "{}{}-real".format(*torch.cuda.get_device_capability())
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    status = run.call("build", [*pip, "-e", "."], RADAM_CUDA_ARCHS=arch)
    if status:
        return failed(run.why("build", status))
    status = run.call("doctor", [sys.executable, "-m", "radam_kernels", "doctor"])
    return failed(run.why("doctor", status)) if status else ok(f"for {arch}")


def test(run: Run) -> Outcome:
    """The tests that need a GPU."""
    junit = run.logs / "tests.xml"
    words = ["-m", "gpu", "--junitxml", junit, "--continue-on-collection-errors"]
    environment = {}
    if importlib.util.find_spec("xdist") and not run.dry:
        jobs = 5
        words += ["-n", jobs]
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    status = run.call("test", _pytest(*words, *["--collect-only"] * run.dry), **environment)
    if run.dry and status in (0, 5):
        return ok("dry run: the tests were collected")
    counts = run.tests("tests.xml")
    ran = counts.get("tests", 0) - counts.get("skipped", 0)
    if status or not ran:
        return failed(f"{run.why('test', status)}; {counts or 'no test ran'}")
    return ok(f"{ran} passed, {counts['skipped']} skipped")


def sanitize(run: Run) -> Outcome:
    """compute-sanitizer on the tests so marked, all tools at the same time."""
    if run.dry or not shutil.which("compute-sanitizer"):
        return skipped("dry run" if run.dry else "compute-sanitizer is not on the PATH")

    command = ["compute-sanitizer", "--report-api-errors", "no", "--error-exitcode", WRONG]

    def one(tool: str) -> Outcome:
        junit = run.logs / f"{tool}.xml"
        # torch's allocator would hide what is out of a tensor's bounds but inside its pool.
        status = run.call(
            tool,
            [*command, "--tool", tool, *_pytest("-m", "sanitize", "--junitxml", junit)],
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
        counts = run.tests(junit.name)
        if status == 0 and counts.get("tests", 0) > counts.get("skipped", 0):
            return ok(f"{tool}: {counts['tests']} tests")
        # Where it can't attach to this GPU, no test has run.
        verdict = failed if status in (WRONG, 124) or counts.get("tests") else skipped
        return verdict(f"{tool}: {run.why(tool, status)}")

    with ThreadPoolExecutor(len(TOOLS)) as pool:
        found = list(pool.map(one, TOOLS))
    statuses = {outcome.status for outcome in found}
    worst = next(status for status in ("failed", "ok", "skipped") if status in statuses)
    return Outcome(worst, "; ".join(outcome.reason for outcome in found))


def times(run: Run) -> Outcome:
    """The benchmark: results.json, which is rewritten after each case."""
    return _measure(
        run, "time", "bench", "report", "--device", "cuda", "--resume", "--out", run.out
    )


def tune(run: Run) -> Outcome:
    """Variants of the kernels: tune.json."""
    interpreted = {"TRITON_INTERPRET": "1"} if run.dry else {}
    return _measure(run, "tune", "bench.gpu.tune", "--out", run.out, **interpreted)


def _measure(run: Run, log: str, *words: object, **environment: str) -> Outcome:
    # It ends by itself before the stage would be stopped, and says what it had no time for.
    minutes = (run.deadline - time.monotonic() - RESERVE) / 60
    limit = ["--dry-run"] if run.dry else ["--minutes", minutes]
    status = run.call(log, [sys.executable, "-m", *words, *limit], **environment)
    return failed(run.why(log, status)) if status else ok(f"{log}.log")


def ncu(run: Run) -> Outcome:
    """What Nsight Compute says of one step."""
    # Clocks are left alone: others may share this GPU.
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv"]
    command += ["-k", "regex:radam_step_kernel", "--metrics", ",".join(METRICS)]
    found = []
    for case in PROFILED:
        outcome = _profile(run, "ncu", [*command, "--log-file", run.logs / "ncu.csv"], case)
        if outcome.status != "ok":
            return outcome
        lines = (run.logs / "ncu.csv").read_text().splitlines()
        header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
        if header is None:
            return skipped(f"ncu saw no radam_step_kernel: {lines[-1:]}")
        table = pd.read_csv(run.logs / "ncu.csv", skiprows=header)
        values = [
            f"{row['Metric Value']} {row['Metric Unit']} {METRICS[row['Metric Name']]}"
            for _, row in table.iterrows()
        ]
        found.append(f"{case}: {', '.join(values)}")
    return ok("; ".join(found))


def nsys(run: Run) -> Outcome:
    """A trace of one step by Nsight Systems."""
    command = ["nsys", "profile", "--trace=cuda,nvtx", "--stats=true", "--force-overwrite=true"]
    return _profile(run, "nsys", [*command, f"--output={run.logs / 'nsys'}"], PROFILED[0])


def _profile(run: Run, tool: str, command: Sequence[object], case: str) -> Outcome:
    if run.dry or not shutil.which(tool):
        return skipped("dry run" if run.dry else f"{tool} is not on the PATH")
    step = [sys.executable, "-m", "bench", "report", "--device", "cuda", "--once", case]
    status = run.call(tool, [*command, *step])
    return skipped(run.why(tool, status)) if status else ok(f"{tool}.log")


def _pytest(*words: object) -> list[object]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]


# By name, in order, with the seconds that each may take.
STAGES: dict[str, tuple[Callable[[Run], Outcome], float]] = {
    "build": (build, 120),
    "test": (test, 150),
    "sanitize": (sanitize, 100),
    "time": (times, 180),
    "ncu": (ncu, 40),
    "nsys": (nsys, 40),
    "tune": (tune, 300),
}
NOT_BY_DEFAULT = ("tune",)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench gpu", description=__doc__.partition(":")[0])
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)} (all but tune)"
    )
    parser.add_argument("--out", type=Path, help="folder (bench/results/<device>)")
    parser.add_argument("--dry-run", action="store_true", help="all, without a GPU, in a minute")
    parser.add_argument("--minutes", type=float, default=10, help="in all (%(default)s)")
    args = parser.parse_args(arguments)
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    if not args.dry_run and not torch.cuda.is_available():
        print("torch finds no GPU; --dry-run tries the stages without one", file=sys.stderr)
        return 2
    if args.dry_run:
        out = args.out or Path(tempfile.mkdtemp())
    else:
        out = args.out or results.results_folder(torch.cuda.get_device_name())
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out.resolve(), args.dry_run)
    if args.dry_run:
        run.environment["CUDA_VISIBLE_DEVICES"] = ""
        chosen = args.stages or list(STAGES)
    else:
        chosen = args.stages or [name for name in STAGES if name not in NOT_BY_DEFAULT]
    return go_through(chosen, run, 60 * args.minutes, again=bool(args.stages))


def go_through(chosen: Sequence[str], run: Run, seconds: float, again: bool) -> int:
    """Runs stages in turn; returns 1 if one has failed. `again`: also those that were ok before."""
    begin, file = time.monotonic(), run.out / FILE
    sources = measured_fingerprint(results.ROOT)
    try:
        kept = json.loads(file.read_text())
    except (OSError, ValueError):
        kept = {}
    for name in chosen:
        stage, limit = STAGES[name]
        if run.dry:  # tests run it with an interpreted Triton, and on busy machines
            limit *= 3
        old = kept.get(name, {})
        if not again and (old.get("status"), old.get("sources")) == ("ok", sources):
            print(f"{name}: ok before with these sources")
            continue
        now = time.monotonic()
        run.deadline = min(now + limit, begin + seconds)
        print(f"{name} ...", flush=True)
        outcome = stage(run) if run.deadline > now else failed("out of time")
        took = round(time.monotonic() - now)
        print(f"{name}: {outcome.status} in {took} s: {outcome.reason}", flush=True)
        kept[name] = {**outcome._asdict(), "seconds": took, "sources": sources}
        results.write(file, kept)
    print(f"logs and results: {run.out}")
    return int(any(kept[name]["status"] == "failed" for name in chosen))


if __name__ == "__main__":
    sys.exit(main())
