"""Measures steps, on the CPU and on GPUs: in each round the optimizers take turns.

So a drift of the machine meets all of them. Between them runs what memory can do, on the same
tensors (bench/roofline.py).
"""

import gc
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from torch import Tensor

from .cases import Case, renew_gradients
from .clocks import HOST_SWEEP, CudaClock, HostClock, Sample, find_lead
from .correctness import MEASURED, NOT_MEASURED, WRONG, brief, wrong
from .optimizers import ADAM, DRY_RUN, FLOAT32, PLAIN, RADAM, Optimizer, Session
from .roofline import COPY, STREAM, limit, limit_name

Row = dict[str, Any]

ROUNDS, MOST_ROUNDS = 5, 50  # the first are for what the goals speak of; others have one at least
STEPS = (2, 20)  # timed in a turn, at least and at most
OUT_OF_TIME, DEVICE_FAILED = "out of time", "the device failed"  # reasons
SLOW = 1 << 25  # elements; beyond it a CPU times only what tells most
LARGE = 1 << 22  # elements that no cache of a CPU holds, with their gradients and moments
FREE_PART = 0.8  # of the memory that is free
DISTURBED = 0.3  # cores that other processes kept busy
RATIOS = {
    "vs_adam_fused": ADAM,
    "vs_radam_foreach": RADAM,
    "vs_plain": PLAIN,
    "vs_float32": FLOAT32,
}


class DeviceLostError(RuntimeError):
    """The device has failed: nothing that follows can be measured in this process."""


class OtherWork:
    """How many cores other processes kept busy on average, inside a `with`."""

    cores = 0.0

    def __enter__(self) -> "OtherWork":
        self._process = psutil.Process()
        self._since_the_last_call()
        return self

    def __exit__(self, *_: object) -> None:
        self.cores = max(0.0, self._since_the_last_call())

    def _since_the_last_call(self) -> float:
        every = psutil.cpu_count() * psutil.cpu_percent()
        return (every - self._process.cpu_percent()) / 100


@dataclass
class _Player:
    """An optimizer or a limit, and what its turns gave."""

    row: Optimizer
    bytes: int  # for each element
    refused: Row
    session: Session | None = None
    samples: list[Sample] = field(default_factory=list)
    extra_bytes: int | None = None

    def optimizer(self) -> torch.optim.Optimizer | None:
        return self.session and self.session.optimizer


def measure(
    case: Case,
    optimizers: Sequence[Optimizer],
    device: torch.device,
    *,
    seconds: float,
    deadline: float = math.inf,
    refused: Mapping[str, Row] | None = None,
    dry_run: bool = False,
) -> list[Row]:
    """A row for each optimizer and limit: numbers, or the reason why there are none.

    On the CPU optimizers stay between their turns. A GPU lacks the room and warms them up in no
    time: there each turn starts its optimizer.

    Args:
        seconds: after which no turn begins but those that are due to everyone.
        deadline: of time.monotonic(), after which no turn begins and nothing is allocated.
        refused: the status and reason of those that are not to be measured.
        dry_run: takes the path of a GPU on the CPU.

    Raises:
        DeviceLostError: after an error that the device does not recover from.
    """
    gc.collect()  # optimizers are in cycles: those of the last case are still there
    gc.freeze()  # what exists now stays: collecting the optimizers of each turn is quick then
    kind = DRY_RUN if dry_run else device.type
    players = _players(case, optimizers, refused or {}, kind, deadline)
    rounds, keep = 0, kind == "cpu"
    with OtherWork() as others:
        try:
            if not all(player.refused for player in players):
                rounds = _Turns(case, players, device, keep).play(seconds, deadline)
        except torch.OutOfMemoryError as error:
            for player in players:
                player.refused = {"status": NOT_MEASURED, "reason": brief(error)}
        finally:
            gc.unfreeze()
    caches = "warm" if keep and not case.cold else "cold"
    facts = {**describe(case), "caches": caches, "rounds": rounds, "cores_of_others": others.cores}
    return compare([{**facts, **_row(case, player, keep)} for player in players])


def _players(
    case: Case,
    optimizers: Sequence[Optimizer],
    refused: Mapping[str, Row],
    kind: str,
    deadline: float,
) -> list[_Player]:
    """The optimizers, and after the first measured RAdam that moves so many bytes their limit."""
    # In cold caches the loop waits for its own tables, and is no limit of small tensors.
    limited = (not case.cold or case.elements >= LARGE) and case.max_norm is None
    players: list[_Player] = []
    moved: set[int] = set()  # bytes whose limit is there
    for row in optimizers:
        player = _Player(row, case.moved(row.traffic), refusal(case, row, kind, refused, deadline))
        players.append(player)
        streamed = kind != "cpu" or row.form not in ("tier", "float32")  # of two dtypes at most
        if limited and streamed and row.radam and not player.refused and player.bytes not in moved:
            moved.add(player.bytes)
            loop = limit(player.bytes, STREAM if kind == "cpu" else COPY, player.optimizer)
            players.append(_Player(loop, player.bytes, {}))
    return players


class _Turns:
    """The rounds of one case; keep: optimizers stay between their turns."""

    def __init__(
        self, case: Case, players: Sequence[_Player], device: torch.device, keep: bool
    ) -> None:
        self._case, self._players, self._device, self._keep = case, players, device, keep
        self._params = case.make(device)
        sweep = HOST_SWEEP if case.cold else 1
        self._clock = CudaClock(device) if device.type == "cuda" else HostClock(sweep)

    def play(self, seconds: float, deadline: float) -> int:
        """Fills the players' samples; returns the number of rounds."""
        end, rounds = time.monotonic() + seconds, 0
        share = seconds / ROUNDS / len(self._players)
        while rounds < MOST_ROUNDS and not all(player.refused for player in self._players):
            if rounds >= ROUNDS and time.monotonic() > end:
                break
            for player in self._players:
                now = time.monotonic()
                due = rounds < (ROUNDS if player.row.level == 0 else 1)
                if now > deadline:
                    return rounds
                if not player.refused and (due or now < end):
                    self._turn(player, min(share, deadline - now))
            rounds += 1
        return rounds

    def _turn(self, player: _Player, seconds: float) -> None:
        """Samples of one optimizer, or the reason why it has none."""
        row = player.row
        try:
            if not player.session:
                player.session = row.start(self._params_of(row), max_norm=self._case.max_norm)
                # The norm that torch's clipping computes is low: 0.5% at 2^26.
                checked = row.backend if self._case.max_norm else row.radam
                if checked and not player.samples and (fault := wrong(row, player.session)):
                    player.refused = {"status": WRONG, "reason": fault}
            if not player.refused:
                self._sample(player, player.session, seconds)
        except Exception as error:
            player.refused = {"status": NOT_MEASURED, "reason": brief(error)}
            try:
                self._clock.synchronize()
            except Exception as lost:
                name = f"{row.name}, {self._case.name}"
                raise DeviceLostError(f"{name}: {DEVICE_FAILED}: {brief(lost)}") from error
        if player.refused or not self._keep:
            player.session = None
            gc.collect()  # optimizers and graphs are in cycles
            if self._device.type == "cuda":
                left, total = torch.cuda.mem_get_info()
                if left < total // 2:
                    torch.cuda.empty_cache()

    def _params_of(self, row: Optimizer) -> Sequence[Tensor]:
        if row.form == "plain":
            return replace(self._case, sharded=False).make(self._device)
        if row.form == "float32":
            return replace(self._case, dtype=torch.float32).make(self._device)
        if row.form == "flat":  # it would move the parameters of the others
            return self._case.make(self._device)
        return self._params

    def _sample(self, player: _Player, session: Session, seconds: float) -> None:
        clock, cuda = self._clock, self._device.type == "cuda"
        lead = find_lead(clock, session.step)  # the first step brings the optimizer's memory near
        clock.synchronize()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        gc.disable()
        try:
            begin = time.monotonic()
            for i in range(STEPS[1]):
                if self._case.new_gradients:
                    renew_gradients(session.params)
                player.samples.append(clock.sample(session.step, lead))
                if i + 1 >= STEPS[0] and time.monotonic() - begin > seconds:
                    break
        finally:
            gc.enable()
        if cuda and not self._case.new_gradients:
            player.extra_bytes = torch.cuda.max_memory_allocated() - before


def _row(case: Case, player: _Player, keep: bool) -> Row:
    row: Row = {"optimizer": player.row.name, "bytes": player.bytes * case.elements}
    if player.refused:
        return {**row, **player.refused}
    if not player.samples:
        return {**row, "status": NOT_MEASURED, "reason": OUT_OF_TIME}
    row |= numbers(row["bytes"], [sample.device for sample in player.samples])
    if case.grad_dtype and not player.row.any_gradient:
        row["note"] = "its step converts the gradients first"
    if not keep:
        row |= spread([sample.host for sample in player.samples], 1e6, "host_us")
        # Nothing to do about a step of more launches than the queue holds, but to say it.
        row["host_bound"] = sum(s.waited for s in player.samples) > len(player.samples) // 2
        row["extra_bytes"] = player.extra_bytes
    return row


def numbers(moved: int, seconds: Sequence[float]) -> Row:
    """What a row says of steps that were measured."""
    row = {"status": MEASURED, "reason": "", "count": len(seconds), **spread(seconds, 1e3, "ms")}
    return {**row, "gb_s": moved / row["ms"] / 1e6}


def spread(values: Sequence[float], unit: float, key: str) -> Row:
    """The median, and how far the middle three fifths reach."""
    low = high = values[0]
    if len(values) > 1:
        low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    middle = statistics.median(values)
    return {key: unit * middle, f"{key}_p20": unit * low, f"{key}_p80": unit * high}


def describe(case: Case) -> Row:
    """What the rows of a case have in common."""
    return {
        "case": case.name,
        "kind": case.kind,
        "dtype": str(case.dtype).removeprefix("torch."),
        "elements": case.elements,
        "tensors": len(case.shapes),
        "gradients": "new" if case.new_gradients else "held",
    }


def compare(rows: list[Row]) -> list[Row]:
    """Adds shares of the limit, and how many times as fast each is as torch's optimizers."""
    by_name = {row["optimizer"]: row for row in rows if "ms" in row}
    for row in by_name.values():
        for kind in (STREAM, COPY):
            if found := by_name.get(limit_name(row["bytes"] // row["elements"], kind)):
                row["limit_gb_s"] = found["gb_s"]
                row["limit_share"] = found["ms"] / row["ms"]
        for key, peer in RATIOS.items():
            row[key] = by_name[peer]["ms"] / row["ms"] if peer in by_name else None
        if "host_us" in row and "host_us" in by_name.get(ADAM, {}):
            row["host_vs_adam_fused"] = by_name[ADAM]["host_us"] / row["host_us"]
    return rows


def refusal(
    case: Case,
    row: Optimizer,
    kind: str,
    refused: Mapping[str, Row],
    deadline: float = math.inf,
) -> Row:
    """The status and the reason of an optimizer that is not measured on a case, or nothing."""
    reason = left_out(case, row, kind) or OUT_OF_TIME * (time.monotonic() > deadline)
    return {"status": NOT_MEASURED, "reason": reason} if reason else refused.get(row.name, {})


def left_out(case: Case, row: Optimizer, kind: str) -> str:
    """Why an optimizer is not measured on a case, or nothing; `kind` is of device, or DRY_RUN."""
    if reason := row.absent(kind):
        return reason
    if case.kind == "training" and (row.level > 1 or row.form):
        return "time: not measured within training"
    if case.kind == "memory" and row.form == "compiled":
        return "compiling takes memory of its own"
    if row.form == "compiled" and (kind != "cpu" or len(case.shapes) > 1):
        return "time: compiled for one tensor on a CPU only"
    if row.form == "graph" and case.new_gradients:
        return "a graph reads gradients where they were captured"
    if case.sharded and (row.form == "flat" or row.package):
        return "sharded parameters: only ours and torch's take them"  # DeepSpeed's crashes
    if kind != "cpu":
        return ""  # a GPU's allocator says itself what does not fit
    if case.elements > SLOW and (row.level > 1 or row.form == "flat"):
        return f"time: measured up to {SLOW >> 20}M elements only"
    # Parameters, gradients, moments and temporaries; torch's fused steps and ours have none.
    size = case.dtype.itemsize
    temporaries = 0 if row.backend or "fused" in row.name else 3 * max(4, size)
    need = case.elements * (2 * size + (row.traffic(size) - 3 * size) // 2 + temporaries)
    most = FREE_PART * psutil.virtual_memory().available
    if need > most:
        return f"memory: needs {need / 1e9:.1f} GB, {most / 1e9:.1f} GB may be taken"
    return ""
