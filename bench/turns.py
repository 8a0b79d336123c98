"""Measures one case: the optimizers take turns, round after round, so that a drift hits all."""

import gc
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cases import Case, renew_gradients
from .clocks import Clock, find_lead
from .contenders import ADAM, RADAM, Contender, Started, copy_name
from .formula import wrong

Row = dict[str, Any]
ROUNDS = 5
STEPS = (3, 20)  # timed in a turn, at least and at most
OUT_OF_TIME = "out of time"


class DeviceLostError(RuntimeError):
    """The device answers no more: nothing that follows can be measured in this process."""


class _Samples:
    """What the turns of one contender gave."""

    def __init__(self) -> None:
        self.device: list[float] = []
        self.host: list[float] = []
        self.host_new: list[float] = []
        self.waited = 0
        self.extra: int | None = None

    def row(self) -> Row:
        row: Row = {"device_ms": spread(self.device, 1e3), "host_us": spread(self.host, 1e6)}
        if self.host_new:
            row["host_new_us"] = spread(self.host_new, 1e6)
        # Nothing to do about a step of more launches than the queue holds, but to say it.
        row["host_bound"] = self.waited > len(self.device) // 2
        if self.extra is not None:
            row["extra_bytes"] = self.extra
        return row


def measure(
    case: Case,
    contenders: Sequence[Contender],
    clock: Clock,
    device: torch.device,
    *,
    deadline: float,
    seconds: float,
    refused: dict[str, Row],
) -> dict[str, Row]:
    """A row for each contender: numbers, or the reason why there are none.

    Args:
        deadline: of time.monotonic(); what is not measured by then is marked as such.
        seconds: after which no new round is begun.
        refused: rows of those that are not to be measured.

    Raises:
        DeviceLostError: after an error that the device does not recover from.
    """
    refused = dict(refused)
    samples = {c.name: _Samples() for c in contenders}
    begin = time.monotonic()
    try:
        params = case.make(device)
        for turn in range(ROUNDS):
            for contender in contenders:
                if time.monotonic() > deadline:
                    break
                if contender.name not in refused:
                    share = min(seconds / ROUNDS / len(contenders), deadline - time.monotonic())
                    row = _attempt(
                        contender, case, params, clock, samples[contender.name], share, turn == 0
                    )
                    refused.update({contender.name: row} if row else {})
            if time.monotonic() > min(deadline, begin + seconds):
                break
    except torch.OutOfMemoryError as error:
        refused = {c.name: {"not_measured": brief(error)} for c in contenders}
    params = []
    _free(device)
    rows = {
        name: refused[name] if name in refused
        else found.row() if found.device
        else {"not_measured": OUT_OF_TIME}
        for name, found in samples.items()
    }  # fmt: skip
    return compare(rows, contenders, case.elements)


def compare(rows: dict[str, Row], contenders: Sequence[Contender], elements: int) -> dict[str, Row]:
    """The rows with their bandwidths, and their ratios to the copy and to torch's optimizers."""

    def median(name: str) -> float | None:
        return rows.get(name, {}).get("device_ms", {}).get("median")

    for contender in contenders:
        row = rows[contender.name]
        row["bytes_per_element"] = contender.bytes
        if not (own := median(contender.name)):
            continue
        row["gb_s"] = contender.bytes * elements / own / 1e6
        for key, peer in {
            "copy_share": copy_name(contender.bytes),
            "vs_adam_fused": ADAM,
            "vs_radam_foreach": RADAM,
        }.items():
            row[key] = theirs / own if (theirs := median(peer)) else None
    return rows


def _attempt(
    contender: Contender,
    case: Case,
    params: list[Tensor],
    clock: Clock,
    samples: _Samples,
    seconds: float,
    first: bool,
) -> Row | None:
    """A turn; the reason if it failed. Frees what it took."""
    row: Row | None = None
    device = params[0].device
    try:
        started = contender.start(params)
        if first and contender.radam and (fault := wrong(started.optimizer, started.step, params)):
            return {"wrong": fault}
        _turn(started, case, params, clock, samples, seconds, contender.graph)
    except Exception as error:
        row = {"not_measured": brief(error)}
        try:
            clock.synchronize()
        except Exception as lost:
            raise DeviceLostError(
                f"{contender.name}, {case.name}: the device failed: {brief(lost)}"
            ) from error
    finally:
        started = None
        _free(device)
    return row


def _turn(
    started: Started,
    case: Case,
    params: list[Tensor],
    clock: Clock,
    samples: _Samples,
    seconds: float,
    fixed_gradients: bool,
) -> None:
    cuda = params[0].device.type == "cuda"
    lead = find_lead(clock, started.step)
    clock.synchronize()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        begin = time.monotonic()
        for i in range(STEPS[1]):
            sample = clock.sample(started.step, lead)
            samples.device.append(sample.device)
            samples.host.append(sample.host)
            samples.waited += sample.waited
            if i + 1 >= STEPS[0] and time.monotonic() - begin > seconds:
                break
        if cuda:
            samples.extra = torch.cuda.max_memory_allocated() - before
        if case.host and started.optimizer and not fixed_gradients:
            for i in range(STEPS[1]):
                renew_gradients(params)
                samples.host_new.append(clock.sample(started.step, lead).host)
                if i + 1 >= STEPS[0] and time.monotonic() - begin > 2 * seconds:
                    break
    finally:
        gc.enable()


def _free(device: torch.device) -> None:
    gc.collect()  # optimizers and graphs are in cycles
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        if free < total // 2:
            torch.cuda.empty_cache()


def spread(seconds: list[float], unit: float) -> dict[str, float | int]:
    """The median, and how far the middle three fifths reach."""
    if len(seconds) == 1:
        low = high = seconds[0]
    else:
        low, *_, high = statistics.quantiles(seconds, n=5, method="inclusive")
    middle = statistics.median(seconds)
    return {
        "median": unit * middle, "p20": unit * low, "p80": unit * high, "count": len(seconds)
    }  # fmt: skip


def brief(error: BaseException) -> str:
    """An error as one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
