"""A noisy quadratic from its optimum: where RAdam's first steps are better, and where worse."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from . import style
from .chains import LAST_MOMENTUM, walk
from .experiment import Experiment, Row, Run, Verdict
from .intervals import mean_interval

LR, BETA1, BETA2 = 0.01, 0.9, 0.999
SCALES = (0.1, 1.0, 10.0)  # s, the standard deviation of the noise
OPTIMIZERS = ("Adam", "RAdam", "RAdam, waiting")
SPAN = 1000  # steps, the memory of beta2, over which losses are compared
ALL = -1  # stands for the mean over these, where a step is asked for
FULL = {"chains": 20_000, "steps": 5_000, "points": 40}


def momentum_loss(scale: float, step: int) -> float:
    """E x^2 / 2 after a step of RAdam up to LAST_MOMENTUM, in closed form.

    These steps are linear in the noise, `x_t = x_(t-1) - lr m_t / (1 - beta1^t)` with
    `m_t = beta1 m_(t-1) + (1 - beta1) (x_(t-1) + s z_t)`: so x_t is a sum of z_i times weights,
    and its variance is the sum of their squares.
    """
    x, m = np.zeros(step), np.zeros(step)
    for t in range(1, step + 1):
        m = BETA1 * m + (1 - BETA1) * (x + scale * np.eye(step)[t - 1])
        x = x - LR * m / (1 - BETA1**t)
    return 0.5 * float(x @ x)


def first_adam_loss(scale: float) -> float:
    """E x^2 / 2 after Adam's first step: it has the length lr, whatever the gradient."""
    return 0.5 * LR**2


def stationary_loss(scale: float) -> float:
    """E x^2 / 2 in the end, for either: that of SGD with momentum at the rate lr psi.

    For a rate a, `E x^2 = a s^2 (1 + beta1) / (2 (1 + beta1) - a (1 - beta1))`; psi is taken as
    constant, `1 / sqrt(s^2 + E x^2)`, which is solved by iteration.
    """
    square = 0.0
    for _ in range(200):
        rate = LR / sqrt(scale**2 + square)
        square = rate * scale**2 * (1 + BETA1) / (2 * (1 + BETA1) - rate * (1 - BETA1))
    return 0.5 * square


def noisy(scale: float, chains: int, seed: int) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """The gradient x + s z. All optimizers see the same z, so that they compare in pairs."""
    generator = np.random.default_rng(seed)  # torch's own wants seeds of many bits

    def gradient(t: int, x: torch.Tensor) -> torch.Tensor:
        return x + scale * torch.from_numpy(generator.standard_normal(chains))

    return gradient


def losses(scale: float, chains: int, steps: int, points: int, seed: int) -> list[Row]:
    """Loss x^2 / 2 at some steps, and its mean over the first SPAN steps minus Adam's."""
    span = min(SPAN, steps)
    recorded = {*range(1, LAST_MOMENTUM + 1), *map(round, np.geomspace(1, steps, points))}
    rows: list[Row] = []
    mean_loss = {}
    for optimizer in OPTIMIZERS:
        total = torch.zeros(chains, dtype=torch.float64)
        path = walk(
            optimizer, torch.zeros_like(total), noisy(scale, chains, seed), steps,
            lr=lambda t: LR, betas=(BETA1, BETA2),
        )  # fmt: skip
        for t, x in enumerate(path, start=1):
            loss = 0.5 * x * x
            if t <= span:
                total += loss
            if t in recorded:
                rows.append(_row(optimizer, scale, chains, t, loss.numpy()))
        mean_loss[optimizer] = total.numpy() / span
        rows.append(_row(optimizer, scale, chains, ALL, mean_loss[optimizer] - mean_loss["Adam"]))
    return rows


def _row(optimizer: str, scale: float, chains: int, step: int, values: np.ndarray) -> Row:
    mean, half = mean_interval(values)
    return {
        "scale": scale, "optimizer": optimizer, "chains": chains, "step": step,
        "loss": mean, "half": half,
    }  # fmt: skip


def runs(quick: bool) -> list[Run]:
    size = {"chains": 2_000, "steps": 200, "points": 12} if quick else FULL
    return [
        Run(f"scale={s}", losses, {"scale": s, "seed": seed, **size})
        for seed, s in enumerate(SCALES)
    ]


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    at = rows.set_index(["optimizer", "scale", "step"])

    def told(optimizer: str, scale: float) -> str:
        loss, half = at.loc[(optimizer, scale, ALL), ["loss", "half"]]
        return f"{loss:+.2g} ± {half:.1g}"

    def below(optimizer: str, scale: float) -> bool | None:
        loss, half = at.loc[(optimizer, scale, ALL), ["loss", "half"]]
        return None if abs(loss) <= half else bool(loss < 0)

    theory = [
        (at.loc[("RAdam", s, t)], momentum_loss(s, t))
        for s in SCALES
        for t in range(1, LAST_MOMENTUM + 1)
    ]
    off = max(abs(row["loss"] / loss - 1) for row, loss in theory)
    away = max(abs(row["loss"] - loss) / row["half"] for row, loss in theory)
    small, large = SCALES[0], SCALES[-1]
    small_start, large_start = (
        sqrt(momentum_loss(s, LAST_MOMENTUM) / at.loc[("Adam", s, LAST_MOMENTUM), "loss"])
        for s in (small, large)
    )
    steps = min(SPAN, rows["step"].max())
    return [
        Verdict(
            away < 2,
            f"The closed form holds for RAdam's first {LAST_MOMENTUM} steps: it is within {off:.1%}"
            f" of what was measured, and at most {away:.1f} times the half of a 95% interval away.",
        ),
        Verdict(
            below("RAdam", small),
            f"Small gradients, s = {small}: at step {LAST_MOMENTUM} RAdam is "
            f"{small_start:.2f} times as far from the optimum as Adam; mean loss over the first "
            f"{steps} steps, RAdam minus Adam: {told('RAdam', small)} (95%).",
        ),
        Verdict(
            below("RAdam", large),
            f"Large gradients, s = {large}: its first steps are not normalised, and RAdam loses: "
            f"at step {LAST_MOMENTUM} it is {large_start:.1f} times as far away as Adam; RAdam "
            f"minus Adam: {told('RAdam', large)}.",
        ),
        Verdict(
            below("RAdam, waiting", large),
            "Large gradients, and RAdam that waits in its first steps "
            f"(`degenerated_to_sgd=False`): minus Adam {told('RAdam, waiting', large)}.",
        ),
    ]


def draw(rows: pd.DataFrame) -> Figure:
    figure, axes = style.panels(len(SCALES))
    strokes = {"RAdam, waiting": {"ls": "--", "lw": 1}}
    colors = style.OPTIMIZERS | {"RAdam, waiting": style.VERMILION}
    for ax, scale in zip(axes, SCALES, strict=True):
        for optimizer in OPTIMIZERS:
            of = rows[(rows["scale"] == scale) & (rows["optimizer"] == optimizer)]
            of = of[(of["step"] != ALL) & (of["loss"] > 0)]
            style.band(
                ax, of["step"], of["loss"], of["half"],
                color=colors[optimizer], label=optimizer, **strokes.get(optimizer, {}),
            )  # fmt: skip
        early = range(1, LAST_MOMENTUM + 1)
        ax.plot(
            [*early, 1], [*(momentum_loss(scale, t) for t in early), first_adam_loss(scale)],
            "x", color=style.BLACK, ms=5, label="theory, first steps",
        )  # fmt: skip
        ax.axhline(stationary_loss(scale), color="#777777", ls=":", label="theory, in the end")
        ax.set(xscale="log", yscale="log", xlabel="step t", title=f"s = {scale:g}")
    axes[0].set_ylabel("E x² / 2")
    style.legend(axes[0])
    return figure


EXPERIMENT = Experiment(
    name="noise",
    title="Toy 1: a noisy quadratic, begun at its optimum",
    claim=(
        "From a good place, x = 0 of x²/2 with gradients x + s z and z from N(0, 1), RAdam's first "
        "steps lead less far away than Adam's (sections 3 and 4; the closed form is ours)."
    ),
    runs=runs,
    judge=judge,
    draw=draw,
)
