"""Executes the runs that have no kept result, in single-threaded processes, and keeps each one."""

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from hashlib import sha256
from operator import methodcaller
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from .code_digest import code_digest
from .experiment import Experiment, Row, Run
from .provenance import run_provenance
from .worker import initialize, timed


class Kept(NamedTuple):
    """The content of a finished run's file."""

    digest: str  # of the run's arguments and code
    rows: list[Row]
    seconds: float
    provenance: dict[str, str]


def kept_path(folder: Path, experiment: Experiment, run: Run) -> Path:
    return folder / experiment.name / f"{run.key}.json"


def read_kept(folder: Path, experiment: Experiment, run: Run) -> Kept | None:
    """The kept result of a run; None if there is none, or if arguments or code have changed."""
    try:
        kept = Kept(**json.loads(kept_path(folder, experiment, run).read_text()))
    except FileNotFoundError:
        return None
    return kept if kept.digest == digest(run) else None


def keep(path: Path, kept: Kept) -> None:
    """Writes the file atomically: an interrupt leaves no truncated file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(kept._asdict(), default=methodcaller("item")))  # NumPy scalars
    part.replace(path)


def digest(run: Run) -> str:
    """Of a run's arguments and of the code that it depends on."""
    arguments = json.dumps(run.arguments, sort_keys=True)
    return sha256(f"{arguments}{code_digest(run.function)}".encode()).hexdigest()[:12]


def execute_missing(
    experiments: Sequence[Experiment], folder: Path, *, quick: bool, jobs: int
) -> dict[str, dict[str, BaseException]]:
    """Executes all runs that have no valid result in `folder`, `jobs` of them at a time.

    A failed run does not affect the others; exceptions are returned by experiment and key. If a
    process dies or the user interrupts, unfinished runs are lost and finished ones are kept.
    """
    planned = [(experiment, run) for experiment in experiments for run in experiment.runs(quick)]
    missing = [pair for pair in planned if not read_kept(folder, *pair)]
    failed: dict[str, dict[str, BaseException]] = {}
    if not missing:
        return failed
    provenance = run_provenance()
    with _pool(jobs) as pool:
        futures = {pool.submit(timed, run): (experiment, run) for experiment, run in missing}
        done = len(planned) - len(missing)
        bar = tqdm(as_completed(futures), total=len(planned), initial=done, unit="run")
        for future in bar:
            experiment, run = futures[future]
            bar.set_postfix_str(f"{experiment.name} {run.key}")
            if error := future.exception():
                failed.setdefault(experiment.name, {})[run.key] = error
                bar.write(f"failed: {experiment.name} {run.key}: {error!r}{error.__cause__ or ''}")
                continue
            kept = Kept(digest(run), *future.result(), provenance)
            keep(kept_path(folder, experiment, run), kept)
    return failed


@contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes with one thread each; at an exception they are terminated."""
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=initialize)
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
