"""A noisy quadratic, started at its optimum: how far the first steps lead away."""

from math import sqrt

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from ..harness import plots
from ..harness.experiment import Row, Run, Verdict
from ..harness.statistics import Mean, mean_interval
from .simulation import log_spaced_steps, trajectory

TITLE = "Toy 1: a noisy quadratic, started at its optimum"
CLAIM = (
    "Started at the optimum x = 0 of x²/2, with gradients x + s z and z from N(0, 1), RAdam's "
    "first steps lead less far away than Adam's (sections 3 and 4; the closed form is ours)."
)
LR, BETA1, BETA2 = 0.01, 0.9, 0.999
SCALES = (0.1, 1.0, 10.0)  # s, the standard deviation of the noise
OPTIMIZERS = ("Adam", "RAdam", "RAdam, waiting")
SPAN = 1000  # steps over which losses are compared: 1 / (1 - BETA2)
LAST_MOMENTUM = 5  # the last step before rho_t exceeds the package's default threshold
ALL = -1  # in place of a step, for the mean loss over these
FULL = {"chains": 20_000, "steps": 5_000, "points": 40}


def momentum_loss(scale: float, step: int) -> float:
    """E x^2 / 2 after a step of RAdam up to LAST_MOMENTUM, in closed form.

    These steps are linear in the noise, `x_t = x_(t-1) - lr m_t / (1 - beta1^t)` with
    `m_t = beta1 m_(t-1) + (1 - beta1) (x_(t-1) + s z_t)`, so x_t is a weighted sum of the z_i,
    and its variance is the sum of the squared weights.
    """
    x, m = np.zeros(step), np.zeros(step)
    for t in range(1, step + 1):
        m = BETA1 * m + (1 - BETA1) * (x + scale * np.eye(step)[t - 1])
        x = x - LR * m / (1 - BETA1**t)
    return 0.5 * float(x @ x)


def stationary_loss(scale: float) -> float:
    """E x^2 / 2 in the limit, for all optimizers: that of SGD with momentum at the rate lr psi.

    For a rate a, `E x^2 = a s^2 (1 + beta1) / (2 (1 + beta1) - a (1 - beta1))`. psi is taken as the
    constant `1 / sqrt(s^2 + E x^2)`; E x^2 is found by fixed-point iteration.
    """
    square = 0.0
    for _ in range(200):
        rate = LR / sqrt(scale**2 + square)
        square = rate * scale**2 * (1 + BETA1) / (2 * (1 + BETA1) - rate * (1 - BETA1))
    return 0.5 * square


def losses(scale: float, chains: int, steps: int, points: int, seed: int) -> list[Row]:
    """Loss x^2 / 2 at some steps, and the paired difference of its mean over SPAN from Adam's."""
    span = min(SPAN, steps)
    recorded = {*range(1, LAST_MOMENTUM + 1), *log_spaced_steps(1, steps, points)}
    rows: list[Row] = []

    def gradient(t: int, x: torch.Tensor) -> torch.Tensor:
        return x + scale * torch.from_numpy(generator.standard_normal(chains))

    def add_row(optimizer: str, step: int, values: np.ndarray) -> None:
        mean, half = mean_interval(values)
        of = {"scale": scale, "optimizer": optimizer, "chains": chains, "step": step}
        rows.append({**of, "loss": mean, "half": half})

    mean_loss = {}
    for optimizer in OPTIMIZERS:
        generator = np.random.default_rng(seed)  # all see the same noise: they compare in pairs
        start, total = torch.zeros(2, chains, dtype=torch.float64)
        path = trajectory(optimizer, start, gradient, steps, lr=lambda t: LR, betas=(BETA1, BETA2))
        for t, x in enumerate(path, start=1):
            loss = 0.5 * x * x
            if t <= span:
                total += loss
            if t in recorded:
                add_row(optimizer, t, loss.numpy())
        mean_loss[optimizer] = total.numpy() / span
        add_row(optimizer, ALL, mean_loss[optimizer] - mean_loss["Adam"])
    return rows


def runs(quick: bool) -> list[Run]:
    size = {"chains": 2_000, "steps": 200, "points": 12} if quick else FULL
    return [Run(losses, {"scale": s, "seed": seed, **size}) for seed, s in enumerate(SCALES)]


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    at = rows.set_index(["optimizer", "scale", "step"])
    first = rows[(rows["optimizer"] == "RAdam") & rows["step"].between(1, LAST_MOMENTUM)]
    theory = [momentum_loss(*place) for place in zip(first["scale"], first["step"], strict=True)]
    off = (first["loss"] / theory - 1).abs().max()
    away = ((first["loss"] - theory).abs() / first["half"]).max()
    small, large = SCALES[0], SCALES[-1]
    small_start, large_start = (
        sqrt(momentum_loss(scale, LAST_MOMENTUM) / at.loc[("Adam", scale, LAST_MOMENTUM), "loss"])
        for scale in (small, large)
    )
    small_difference, large_difference, waiting_difference = (
        Mean(*at.loc[(optimizer, scale, ALL), ["loss", "half"]])
        for optimizer, scale in (("RAdam", small), ("RAdam", large), ("RAdam, waiting", large))
    )

    def text(difference: Mean) -> str:
        return f"{difference.mean:+.2g} ± {difference.half:.1g}"

    steps = min(SPAN, rows["step"].max())
    return [
        Verdict(
            away < 2,
            f"The closed form holds for RAdam's first {LAST_MOMENTUM} steps: it is within {off:.1%}"
            f" of what was measured, and at most {away:.1f} times the half of a 95% interval away.",
        ),
        Verdict(
            small_difference.is_negative(),
            f"Small gradients, s = {small}: at step {LAST_MOMENTUM} RAdam is "
            f"{small_start:.2f} times as far from the optimum as Adam; mean loss over the first "
            f"{steps} steps, RAdam minus Adam: {text(small_difference)} (95%).",
        ),
        Verdict(
            large_difference.is_negative(),
            f"Large gradients, s = {large}: its first steps are not normalised, and RAdam loses: "
            f"at step {LAST_MOMENTUM} it is {large_start:.1f} times as far away as Adam; RAdam "
            f"minus Adam: {text(large_difference)}.",
        ),
        Verdict(
            waiting_difference.is_negative(),
            "Large gradients, and RAdam that waits in its first steps "
            f"(`degenerated_to_sgd=False`): minus Adam {text(waiting_difference)}.",
        ),
    ]


def draw(rows: pd.DataFrame) -> Figure:
    figure, axes = plots.panels(len(SCALES))
    strokes = {"RAdam, waiting": {"ls": "--", "lw": 1}}
    colors = plots.COLORS | {"RAdam, waiting": plots.VERMILION}
    early = range(1, LAST_MOMENTUM + 1)
    first_adam_loss = 0.5 * LR**2  # Adam's first step has the length lr for any gradient
    curves = rows[(rows["step"] != ALL) & (rows["loss"] > 0)]
    for ax, scale in zip(axes, SCALES, strict=True):
        for optimizer in OPTIMIZERS:
            at = curves[(curves["scale"] == scale) & (curves["optimizer"] == optimizer)]
            options = {"color": colors[optimizer], **strokes.get(optimizer, {})}
            plots.band(ax, at["step"], (at["loss"], at["half"]), label=optimizer, **options)
        theory = [*(momentum_loss(scale, t) for t in early), first_adam_loss]
        ax.plot([*early, 1], theory, "x", color=plots.BLACK, ms=5, label="theory, first steps")
        ax.axhline(stationary_loss(scale), color=plots.GREY, ls=":", label="theory, in the end")
        ax.set(xscale="log", yscale="log", xlabel="step t", title=f"s = {scale:g}")
    axes[0].set_ylabel("E x² / 2")
    axes[0].legend()
    return figure
