"""Checkpoints of the demo, written with torch.distributed.checkpoint (DCP)."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from .train_processes import Processes, UserError
from .train_report import Run

PREFIX = "radam_train-"
RECORD = "record.json"
COMPLETE = ".metadata"  # DCP writes it last


class Checkpoints:
    """The checkpoints of a comparison in a folder; a rerun resumes at the newest complete one.

    A checkpoint is a folder of its own with the model, the optimizer and the generator of the
    batches as DCP writes them, and a JSON file with the settings and the records of all runs so
    far. Making, saving, loading and finishing are collective.

    Args:
        folder: made if missing, and locked until the `with` block ends.
        settings: what a checkpoint and a rerun must have in common, by command-line option.
        runs: the runs by optimizer; filled from the newest checkpoint.

    Raises:
        UserError: the folder cannot be written, is in use, or holds a checkpoint of other settings.
    """

    def __init__(
        self, folder: Path, settings: dict[str, str], runs: dict[str, Run], processes: Processes
    ) -> None:
        self._folder, self._settings = folder, settings
        self._runs, self._processes = runs, processes
        self._lock: int | None = None
        self._newest: Path | None = None
        self._newest, records = processes.from_first(self._open)
        runs.update({record["name"]: Run(**record) for record in records})
        # async_save communicates from a thread of its own, so not on the group of the training.
        self._group = _new_group() if processes.distributed else None
        self._saving: Future | None = None

    def load(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, draws: torch.Generator
    ) -> None:
        """Loads the newest checkpoint, whatever number of processes wrote it."""
        state = _state(model, optimizer, draws)
        with _no_warning_of_one_process():
            dcp.load(state, checkpoint_id=self._newest, process_group=self._group)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        draws.set_state(state["draws"])

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, draws: torch.Generator
    ) -> None:
        """Writes a checkpoint; under torchrun in the background, from a copy in memory."""
        self.finish()
        steps = sum(run.steps for run in self._runs.values())
        self._newest = self._folder / f"{PREFIX}{steps:08}"
        if self._processes.first:
            self._write_record(self._newest)
        state = _state(model, optimizer, draws)
        if self._processes.distributed:
            saving = dcp.async_save(state, checkpoint_id=self._newest, process_group=self._group)
            self._saving = cast("Future", saving)  # only with a stager it is something else
            return
        with _no_warning_of_one_process():
            dcp.save(state, checkpoint_id=self._newest)

    def finish(self) -> None:
        """Waits until the last checkpoint is complete, then removes the others."""
        if self._saving:
            self._saving.result()
            self._saving = None
        if self._processes.first:
            self._remove_others()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        self._unlock()

    def _open(self) -> tuple[Path | None, list[dict[str, Any]]]:
        """Locks the folder; returns the newest complete checkpoint and its runs."""
        try:
            self._lock_folder()
            return self._read()
        except (OSError, ValueError, KeyError) as error:
            self._unlock()
            raise UserError(
                f"--checkpoint {self._folder}: cannot resume: {error}; choose another folder"
            ) from error
        except BaseException:
            self._unlock()
            raise

    def _lock_folder(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(self._lock, f"{os.getpid():<20}".encode())
        except BlockingIOError as error:
            owner = (self._folder / "lock").read_text().strip()
            raise UserError(
                f"--checkpoint {self._folder}: process {owner} still trains with it; wait for "
                "it, end it, or choose another folder"
            ) from error
        except OSError as error:
            raise UserError(f"--checkpoint {self._folder}: {error.strerror}") from error

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _read(self) -> tuple[Path | None, list[dict[str, Any]]]:
        complete = [path for path in self._all() if (path / COMPLETE).exists()]
        self._newest = complete[-1] if complete else None
        records = []
        if self._newest:
            saved = json.loads((self._newest / RECORD).read_text())
            self._require_same(saved["settings"])
            records = saved["runs"]
        self._remove_others()
        return self._newest, records

    def _require_same(self, saved: dict[str, str]) -> None:
        pairs = [(name, saved.get(name), value) for name, value in self._settings.items()]
        others = [f"{name} {old} (now {new})" for name, old, new in pairs if old != new]
        if others:
            raise UserError(
                f"--checkpoint {self._folder}: holds a run with {', '.join(others)}; "
                "give the same, or choose another folder"
            )

    def _write_record(self, folder: Path) -> None:
        runs = [asdict(run) for run in self._runs.values()]
        folder.mkdir(exist_ok=True)  # DCP of another rank may be here first
        with (folder / RECORD).open("w") as file:
            json.dump({"settings": self._settings, "runs": runs}, file)
            file.flush()
            os.fsync(file.fileno())

    def _all(self) -> list[Path]:
        found = self._folder.glob(f"{PREFIX}{'[0-9]' * 8}")
        return sorted(path for path in found if path.is_dir() and not path.is_symlink())

    def _remove_others(self) -> None:
        for path in self._all():
            if path != self._newest:
                shutil.rmtree(path)


def _new_group() -> dist.ProcessGroup:
    """A group of all ranks, so that each of them is a member and gets a group."""
    return cast("dist.ProcessGroup", dist.new_group(backend="gloo"))


@contextmanager
def _no_warning_of_one_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        yield


def _state(
    model: nn.Module, optimizer: torch.optim.Optimizer, draws: torch.Generator
) -> dict[str, Any]:
    """All that training changes, by fully qualified names, as DCP reshards it."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, "draws": draws.get_state()}
