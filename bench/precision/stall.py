"""Whether exp_avg_sq decays: a gradient, and then a thousand that are zero."""

import pandas as pd
import torch
from matplotlib.figure import Figure

from ..paper.harness import plots
from ..paper.harness.experiment import Row, Run, Verdict
from .contenders import BY_NAME, MOMENTS, NEAREST

TITLE = "A second moment that does not stall"
CLAIM = (
    "With stochastic rounding exp_avg_sq decays as in float32, where bfloat16 to nearest stalls."
)
ELEMENTS, STEPS, BETA2 = 1 << 15, 1000, 0.999
LEAST, MOST = 0.01, 0.03  # that v and sqrt(v) may be off


def stall(name: str, steps: int) -> list[Row]:
    """Means over all elements of what is stored in the end, over the first step's exact decay."""
    weights = torch.zeros(1, ELEMENTS, dtype=torch.bfloat16)
    stepper = BY_NAME[name].make(weights, [(0, ELEMENTS)], BETA2)
    grads = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    stepper.step(grads, 0.0)
    first = stepper.moments()[1].double().clone()
    for _ in range(steps):
        stepper.step(torch.zeros_like(grads), 0.0)
    ratio = (stepper.moments()[1].double() / (first * BETA2**steps))[first > 0]
    error = ratio.std() / len(ratio) ** 0.5
    facts = {"format": name, "v": ratio.mean().item(), "v_error": error.item()}
    return [{**facts, "sqrt_v": ratio.sqrt().mean().item()}]


def runs(quick: bool) -> list[Run]:
    return [Run(stall, {"name": row.name, "steps": STEPS}) for row in MOMENTS]


def passes(row: pd.Series) -> bool:
    return abs(row["v"] - 1) < LEAST and abs(row["sqrt_v"] - 1) < MOST


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    at = rows.set_index("format")

    def words(name: str) -> str:
        row = at.loc[name]
        return f"{name}: v {row['v']:.4f} ± {2 * row['v_error']:.4f}, sqrt(v) {row['sqrt_v']:.3f}"

    ours = ("32, bf16 SR", "32, block8")
    return [
        Verdict(
            all(passes(at.loc[name]) for name in ours),
            f"After {STEPS:,} gradients of zero v is within {LEAST:.0%} of exact in the mean, and "
            f"sqrt(v) within {MOST:.0%}: {'; '.join(map(words, ours))}.",
        ),
        Verdict(
            not passes(at.loc[NEAREST]), f"To nearest it fails the same test: {words(NEAREST)}."
        ),
    ]


def table(rows: pd.DataFrame) -> pd.DataFrame:
    shown = rows.rename(columns={"v": "v / exact", "sqrt_v": "sqrt(v) / exact"})
    return shown[["format", "v / exact", "sqrt(v) / exact"]]


def draw(rows: pd.DataFrame) -> Figure:
    figure, (ax,) = plots.panels(height=3.0)
    ax.axvspan(1 - MOST, 1 + MOST, color=plots.GREEN, alpha=0.2, lw=0)
    ax.plot(rows["sqrt_v"], rows["format"], "o", color=plots.BLUE)
    ax.set(xlabel=f"sqrt(v) over exact, after {STEPS:,} gradients of zero (beta2 {BETA2})")
    ax.invert_yaxis()
    return figure
