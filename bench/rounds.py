"""Measures one case on the CPU: the optimizers stay, and take turns with what memory can do.

bench/turns.py restarts them in every turn, since a GPU has no room for all at once and warms
them up in no time.
"""

import gc
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cases import Case, Setting, renew_gradients
from .clocks import HostClock
from .contenders import ADAM, CPU, CPU16, RADAM, Contender, Started
from .formula import wrong
from .limits import Limit
from .memory import left_out
from .others import Others
from .turns import ROUNDS, Row, brief, spread

DEVICE = torch.device("cpu")
JUDGED = {CPU, CPU16, ADAM, RADAM}  # what aims speak of: it has ROUNDS whatever they take
LEAST = 1  # rounds of the others, which are slow where tensors are large
STEPS = (2, 20)  # counted in a turn, at least and at most
TURN = 0.03  # seconds, unless the least take longer
SWEEP = 64 << 20  # bytes written before a step to find the caches cold


class _Player(NamedTuple):
    contender: Contender
    params: list[Tensor]
    started: Started
    seconds: list[float]


def measure(
    setting: Setting, contenders: Sequence[Contender], refused: Mapping[str, Row], seconds: float
) -> dict[str, Any]:
    """A case of the results, with a row for each contender: numbers, or why there are none.

    Args:
        refused: rows of those that are not to be measured.
        seconds: after which no round is begun but those that are due to everyone.
    """
    gc.collect()  # optimizers are in cycles: those of the last case are still there
    case, rows = setting.case, dict(refused)
    if setting.new_gradients or setting.cold:  # a streaming loop has neither
        contenders = [c for c in contenders if c.make]
    for contender in contenders:
        if reason := left_out(case, contender, DEVICE):
            rows.setdefault(contender.name, {"not_measured": reason})
    optimizers = [c for c in contenders if c.make and c.name not in rows]
    players = _start(case, optimizers, rows) if optimizers else []
    limits = _limits(contenders, players)
    gc.disable()
    try:
        with Others() as others:
            rounds = _play(setting, players, limits.values(), seconds)
    finally:
        gc.enable()
    found = {
        "elements": case.elements,
        "tensors": len(case.shapes),
        "gradients": "new" if setting.new_gradients else "held",
        "caches": "cold" if setting.cold else "warm",
        "rounds": rounds,
        "cores_of_others": others.cores,
    }
    times = {contender.name: seconds for contender, _, _, seconds in players}
    times |= {
        c.name: limits[c.bytes].seconds for c in contenders if not c.make and c.bytes in limits
    }
    for contender in contenders:
        name, limit = contender.name, limits.get(contender.bytes)
        if times.get(name):
            rows[name] = _row(contender, times[name], limit, case.elements)
        elif name not in rows:
            reason = limit.absent if limit else "no step of ours moves as many bytes here"
            rows[name] = {"not_measured": reason}
    _compare(rows)
    return {**found, "rows": {c.name: rows[c.name] for c in contenders}}


def _start(case: Case, contenders: Sequence[Contender], rows: dict[str, Row]) -> list[_Player]:
    """Those that can be timed; of the others, rows say why not.

    All share the parameters, but for flat ones, which move them.
    """
    players, params = [], case.make(DEVICE)
    held = 2 * sum(param.nbytes for param in params)
    for contender in contenders:
        name = contender.name
        if reason := left_out(case, contender, DEVICE, 0 if contender.flat else held):
            rows[name] = {"not_measured": reason}
            continue
        own = case.make(DEVICE) if contender.flat else params
        try:
            started = contender.start(own)
            options = (contender.debiased, contender.slack)
            fault = contender.radam and wrong(started.optimizer, started.step, own, *options)
        except Exception as error:
            rows[name] = {"not_measured": brief(error)}
            continue
        if fault:
            rows[name] = {"wrong": fault}
        else:
            players.append(_Player(contender, own, started, []))
    return players


def _limits(contenders: Sequence[Contender], players: Sequence[_Player]) -> dict[int, Limit]:
    """By the bytes of an element; on the very tensors of our first step of as many."""
    wanted = {c.bytes: c for c in contenders if not c.make}
    return {
        contender.bytes: Limit(wanted[contender.bytes], params, started.optimizer)
        for contender, params, started, _ in reversed(players)
        if contender.bytes in wanted and contender.name.startswith("radam_kernels")
    }


def _play(
    setting: Setting, players: Sequence[_Player], limits: Sequence[Limit], seconds: float
) -> int:
    """The number of rounds; the players and limits have their times."""
    clock = HostClock(SWEEP) if setting.cold else HostClock()
    begin, rounds = time.monotonic(), 0
    while players and (rounds < ROUNDS or time.monotonic() - begin < seconds):
        for limit in limits:
            limit.measure()
        for player in players:
            due = rounds < (ROUNDS if player.contender.name in JUDGED else LEAST)
            if due or time.monotonic() - begin < seconds:
                _turn(player, setting, clock)
        rounds += 1
    return rounds


def _turn(player: _Player, setting: Setting, clock: HostClock) -> None:
    """Counts all steps but the first, which brings the optimizer's memory near."""
    begin = time.monotonic()
    for i in range(1 + STEPS[1]):
        if setting.new_gradients:
            renew_gradients(player.params)
        sample = clock.sample(player.started.step, 0.0)
        if i > 0:
            player.seconds.append(sample.host)
        if i >= STEPS[0] and time.monotonic() - begin > TURN:
            break


def _row(contender: Contender, seconds: list[float], limit: Limit | None, elements: int) -> Row:
    ms, moved = spread(seconds, 1e3), contender.bytes * elements
    row = {"ms": ms, "bytes": moved, "gb_s": moved / ms["median"] / 1e6}
    return {**row, **limit.against(ms["median"] / 1e3, moved)} if limit else row


def _compare(rows: dict[str, Row]) -> None:
    """How many times as fast each is as torch's optimizers."""
    medians = {name: row["ms"]["median"] for name, row in rows.items() if "ms" in row}
    for name, own in medians.items():
        for key, peer in {"vs_adam_fused": ADAM, "vs_radam_foreach": RADAM}.items():
            rows[name][key] = medians[peer] / own if peer in medians else None
