"""The paper's controls in training: does warmup help by reducing the adaptive rate's variance?"""

import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from ..harness import plots
from ..harness.experiment import Row, Run, Verdict
from ..harness.language import training
from ..harness.optimizers import MAKE, hold_steps, warmup_steps
from ..harness.statistics import mean_interval
from .search import STALLED

TITLE = "The controls, in training"
CLAIM = (
    "Adam that first gathers samples for its adaptive rate alone (Adam-2k), or whose adaptive "
    "rate varies less (Adam-eps), trains without warmup; RAdam trains about as well as Adam "
    "with warmup (sections 3.1 and 5.2, Fig. 1)."
)
LAYERS, LR, SGD_LR = 8, 2e-3, 0.1  # where the search finds Adam in trouble, and SGD at its best
STEPS, SEEDS, EVALUATIONS = 500, 6, 25
MATTERS = 0.05  # the smallest difference that matters, in nats per byte


def losses(optimizer: str, seed: int, layers: int, steps: int) -> list[Row]:
    """Held-out loss along a training."""
    lr = SGD_LR if optimizer == "SGD with momentum" else LR
    every = -(-steps // EVALUATIONS)
    return [
        {"optimizer": optimizer, "seed": seed, "step": at.step, "held_out": at.held_out_loss()}
        for at in training(optimizer, lr, steps, seed=seed, layers=layers)
        if at.step % every == 0 or at.step == steps
    ]


def runs(quick: bool) -> list[Run]:
    size = {"layers": 1, "steps": 12} if quick else {"layers": LAYERS, "steps": STEPS}
    return [
        Run(losses, {"optimizer": name, "seed": seed, **size})
        for name in MAKE
        for seed in range(2 if quick else SEEDS)
    ]


def final_losses(rows: pd.DataFrame) -> pd.DataFrame:
    """Held-out loss after the last step: seeds by optimizers."""
    return rows.groupby(["seed", "optimizer"])["held_out"].last().unstack()[list(MAKE)]


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard error, and the difference from Adam in pairs of the same seed."""
    final = final_losses(rows)
    lines = []
    for name, loss in final.items():
        line = {
            "optimizer": name,
            "held-out loss": f"{loss.mean():.3f}",
            "standard error": f"{stats.sem(loss):.3f}",
            "seeds that stall": f"{(loss > STALLED).sum()} of {len(loss)}",
        }
        if name != "Adam":
            line |= {
                "minus Adam": f"{mean_interval(loss - final['Adam']):+.3f}",
                "p (paired t)": f"{stats.ttest_rel(loss, final['Adam']).pvalue:.2g}",
                "p (Wilcoxon)": f"{stats.wilcoxon(loss, final['Adam']).pvalue:.2g}",
            }
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    final = final_losses(rows)
    steps = rows["step"].max()
    t, k = warmup_steps(steps), hold_steps(steps)
    pairs = (
        ("Adam with warmup", "Adam", f"warmup (T = {t} of {steps} steps) helps"),
        ("RAdam", "Adam", "RAdam helps"),
        ("Adam-2k", "Adam", f"keeping still for the first k = {k} steps helps"),
        ("Adam-2k, longer", "Adam", f"keeping still as long as warmup, k = {t}, helps"),
        ("Adam-eps", "Adam", "an eps of 1e-4 helps"),
        ("RAdam", "Adam with warmup", "RAdam is better than warmup"),
        ("RAdam, exact", "RAdam", "the exact variance is better than its first-order form"),
        ("RAdam, threshold 4", "RAdam", "rectifying from rho_t > 4 is better than from 5"),
    )
    return [compare(final[name], final[other], statement) for name, other, statement in pairs]


def compare(ours: pd.Series, theirs: pd.Series, statement: str) -> Verdict:
    """Whether the first losses are lower, in pairs of the same seed, and by enough to matter."""
    difference = mean_interval(ours - theirs)
    p = stats.wilcoxon(ours, theirs).pvalue
    better = difference.mean + difference.half < 0
    not_better = difference.mean - difference.half > -MATTERS
    return Verdict(
        False if not_better else True if better else None,
        f"{statement}: {ours.name} minus {theirs.name} is {difference:+.3f} nats per byte, "
        f"where {MATTERS} would matter (95%, {len(ours)} seeds; Wilcoxon p = {p:.2g})",
    )


def draw(rows: pd.DataFrame) -> Figure:
    figure, (left, right) = plots.panels(2, height=3.8, width_ratios=(1.5, 1))
    seeds, steps = rows["seed"].nunique(), rows["step"].max()
    for name, color in plots.COLORS.items():
        at = rows[rows["optimizer"] == name]
        curves = at.pivot(index="seed", columns="step", values="held_out")
        plots.band(left, curves.columns, mean_interval(curves), color=color, label=name)
    t, k = warmup_steps(steps), hold_steps(steps)
    left.set_title(f"Mean and 95% band of {seeds} seeds; T = {t}, k = {k}")
    left.set(xlabel="step", ylabel="held-out loss (nats/byte)")
    left.legend()
    plots.seeds_and_means(right, final_losses(rows))
    right.set(xlabel="nats/byte", title=f"After {steps} steps")
    return figure
