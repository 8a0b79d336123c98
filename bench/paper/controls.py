"""The paper's controls in training: is it the variance of the adaptive rate that warmup cures?"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from . import style
from .experiment import Experiment, Row, Run, Verdict
from .intervals import mean_interval
from .language import training
from .optimizers import MAKE, hold, slug, warmup
from .search import SIZE, STALLED

LAYERS, LR, SGD_LR = 8, 2e-3, 0.1  # where the search finds Adam in trouble, and SGD at its best
STEPS, SEEDS, EVALUATIONS = 500, 6, 25
MATTERS = 0.05  # nats per byte: below it, a difference is none


def losses(optimizer: str, seed: int, layers: int, steps: int) -> list[Row]:
    """Held-out loss along a training."""
    lr = SGD_LR if optimizer == "SGD with momentum" else LR
    every = -(-steps // EVALUATIONS)
    return [
        {
            "optimizer": optimizer,
            "seed": seed,
            "step": moment.step,
            "held_out": moment.held_out_loss(),
        }
        for moment in training(
            lambda params: MAKE[optimizer](params, lr, steps),
            seed=seed,
            layers=layers,
            steps=steps,
            **SIZE,
        )
        if moment.step % every == 0 or moment.step == steps
    ]


def runs(quick: bool) -> list[Run]:
    size = {"layers": 1, "steps": 12} if quick else {"layers": LAYERS, "steps": STEPS}
    return [
        Run(f"{slug(name)}-seed{seed}", losses, {"optimizer": name, "seed": seed, **size})
        for name in MAKE
        for seed in range(2 if quick else SEEDS)
    ]


def final(rows: pd.DataFrame) -> pd.DataFrame:
    """Held-out loss after the last step: seeds by optimizers."""
    last = rows[rows["step"] == rows["step"].max()]
    return last.pivot(index="seed", columns="optimizer", values="held_out")[list(MAKE)]


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard error, and the difference from Adam in pairs of one seed."""
    losses = final(rows)
    told = []
    for name in MAKE:
        row = {
            "optimizer": name,
            "held-out loss": f"{losses[name].mean():.3f}",
            "standard error": f"{stats.sem(losses[name]):.3f}",
            "seeds that stall": f"{(losses[name] > STALLED).sum()} of {len(losses)}",
        }
        if name != "Adam":
            difference = mean_interval(losses[name] - losses["Adam"])
            row |= {
                "minus Adam": f"{difference.mean:+.3f} ± {difference.half:.3f}",
                "p (paired t)": f"{stats.ttest_rel(losses[name], losses['Adam']).pvalue:.2g}",
                "p (Wilcoxon)": f"{stats.wilcoxon(losses[name], losses['Adam']).pvalue:.2g}",
            }
        told.append(row)
    return pd.DataFrame(told).fillna("")


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    losses = final(rows)
    steps = rows["step"].max()
    pairs = (
        ("Adam with warmup", "Adam", f"warmup (T = {warmup(steps)} of {steps} steps) helps"),
        ("RAdam", "Adam", "RAdam helps"),
        ("Adam-2k", "Adam", f"keeping still for the first k = {hold(steps)} steps helps"),
        ("Adam-2k, longer", "Adam", f"keeping still as long as warmup, k = {warmup(steps)}, helps"),
        ("Adam-eps", "Adam", "an eps of 1e-4 helps"),
        ("RAdam", "Adam with warmup", "RAdam is better than warmup"),
        ("RAdam, exact", "RAdam", "the exact variance is better than its first-order form"),
        ("RAdam, threshold 4", "RAdam", "rectifying from rho_t > 4 is better than from 5"),
    )
    return [compare(losses[name], losses[other], says, name, other) for name, other, says in pairs]


def compare(ours: pd.Series, theirs: pd.Series, says: str, name: str, other: str) -> Verdict:
    """Whether the first loses less than the second, and so much less that it matters, in pairs."""
    difference, half = mean_interval(ours - theirs)
    p = stats.wilcoxon(ours, theirs).pvalue
    better, not_better = difference + half < 0, difference - half > -MATTERS
    return Verdict(
        False if not_better else True if better else None,
        f"{says}: {name} minus {other} is {difference:+.3f} ± {half:.3f} nats per byte, "
        f"where {MATTERS} would matter (95%, {len(ours)} seeds; Wilcoxon p = {p:.2g})",
    )


def draw(rows: pd.DataFrame) -> Figure:
    figure, (left, right) = style.panels(2, height=3.8, width_ratios=(1.5, 1))
    seeds, steps = rows["seed"].nunique(), rows["step"].max()
    for name, color in style.OPTIMIZERS.items():
        curves = rows[rows["optimizer"] == name].pivot(
            index="seed", columns="step", values="held_out"
        )
        style.band(left, curves.columns, *mean_interval(curves), color=color, label=name)
    left.set(
        xlabel="step",
        ylabel="held-out loss (nats/byte)",
        title=f"Mean and 95% band of {seeds} seeds; T = {warmup(steps)}, k = {hold(steps)}",
    )
    style.legend(left)
    losses = final(rows)
    mean, half = mean_interval(losses)
    for place, name in enumerate(losses):
        color = style.OPTIMIZERS[name.partition(",")[0]]
        right.plot(losses[name], [place + 0.25] * seeds, ".", color=color, alpha=0.4)
        right.errorbar(mean[place], place, xerr=half[place], fmt="o", color=color, capsize=4)
    right.set_yticks(range(len(losses.columns)), losses.columns)
    right.invert_yaxis()
    right.set(xlabel="nats/byte", title=f"After {steps} steps")
    return figure


EXPERIMENT = Experiment(
    name="controls",
    title="The controls, in training",
    claim=(
        "Adam that first gathers samples for its adaptive rate alone (Adam-2k), or whose adaptive "
        "rate varies less (Adam-eps), trains without warmup; RAdam trains about as well as Adam "
        "with warmup (sections 3.1 and 5.2, Fig. 1)."
    ),
    runs=runs,
    judge=judge,
    draw=draw,
    table=table,
)
