"""Does the runs that are not kept yet, in processes of one thread, and keeps each when it ends."""

from __future__ import annotations

import json
import multiprocessing
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ..machine import facts
from .experiment import Experiment, Row, Run
from .reach import code_digest
from .worker import begin, timed


class Kept(NamedTuple):
    """A finished run, as it lies in its file."""

    digest: str  # of its arguments and of the code that made it
    rows: list[Row]
    seconds: float
    made: dict[str, str]  # date, commit, sources and versions at that time


def kept_file(folder: Path, experiment: Experiment, run: Run) -> Path:
    """Where a run is kept."""
    if not re.fullmatch(r"[\w.=+-]+", run.key):
        raise ValueError(f"key: expected letters, digits and any of . = + -, got {run.key!r}")
    return folder / experiment.name / f"{run.key}.json"


def read_kept(folder: Path, experiment: Experiment, run: Run) -> Kept | None:
    """A run that is kept; None if there is none, or it is of other arguments or other code."""
    try:
        kept = Kept(**json.loads(kept_file(folder, experiment, run).read_text()))
    except FileNotFoundError:
        return None
    return kept if kept.digest == digest(run) else None


def do_missing(
    experiments: Sequence[Experiment], folder: Path, *, quick: bool, jobs: int
) -> dict[str, dict[str, BaseException]]:
    """Does all runs of the experiments that are not kept in `folder`, `jobs` of them at a time.

    A run that fails does not disturb the others; what was raised is returned by experiment and
    key. Where a process dies, or at an interrupt, unfinished runs are lost and finished ones kept.
    """
    planned = [(experiment, run) for experiment in experiments for run in experiment.runs(quick)]
    for experiment in experiments:
        keys = [run.key for of, run in planned if of is experiment]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"{experiment.name}: each run needs a key of its own; twice: {twice}")
    missing = [pair for pair in planned if not read_kept(folder, *pair)]
    failed: dict[str, dict[str, BaseException]] = {}
    if not missing:
        return failed
    made = _made()
    with (
        tqdm(total=len(planned), initial=len(planned) - len(missing), unit="run") as bar,
        _pool(min(jobs, len(missing))) as pool,
    ):
        futures: dict[Future, tuple[Experiment, Run]] = {
            pool.submit(timed, run): (experiment, run) for experiment, run in missing
        }
        for future in as_completed(futures):
            experiment, run = futures[future]
            bar.set_postfix_str(f"{experiment.name} {run.key}")
            bar.update()
            if error := future.exception():
                failed.setdefault(experiment.name, {})[run.key] = error
                bar.write(f"failed: {experiment.name} {run.key}: {error!r}{error.__cause__ or ''}")
                continue
            rows, seconds = future.result()
            keep(kept_file(folder, experiment, run), Kept(digest(run), rows, seconds, made))
    return failed


def plain(value: Any) -> Any:
    """One of numpy's numbers as one of Python's, for JSON."""
    return value.item()


def digest(run: Run) -> str:
    """Of a run's arguments and of the code that it reaches."""
    arguments = json.dumps(run.arguments, sort_keys=True)
    return sha256(f"{arguments}{code_digest(run.function)}".encode()).hexdigest()[:12]


def _made() -> dict[str, str]:
    found = facts(torch.device("cpu"))
    versions = {name: version(name) for name in ("torch", "numpy", "scipy")}
    return {key: found[key] for key in ("date", "commit", "sources")} | versions


def keep(path: Path, kept: Kept) -> None:
    """Writes the file whole or not at all: an interrupt must not leave half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(kept._asdict(), default=plain))
    part.replace(path)


@contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=begin)
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
