"""How far the step m / (sqrt(v) + eps) of each format is from that of float64."""

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from ..paper.harness import plots
from ..paper.harness.experiment import Row, Run, Verdict
from .contenders import BETA1, BY_NAME, EPS, EXACT, FLASH, FORMATS, MOMENTS, NEAREST

TITLE = "Steps against float64"
CLAIM = (
    "With stochastic rounding a step stays near that of float64, whatever the gradients' range; "
    "no element's step is many times as large as it should be."
)
BLOCK, DECAY = 128, 300  # elements that share a scale; the step at which `decay` decays
FAMILIES = {
    "mild": "magnitudes of log-sd 1 within a block",
    "wild": "1e-8 to 1 within a block",
    "decay": "mild, a tenth from step 300 on",
    "tiny": "mild, of rms 2e-6",
    "sparse": "mild, and row r of 128 has a gradient in one of r steps",
}
SIZE = {"elements": 8192, "steps": 1000, "first": 201}
QUICK = {"elements": 1024, "steps": 500, "first": 301}


def magnitudes(elements: int, random: np.random.Generator) -> np.ndarray:
    """Of the gradients' elements, for each family."""
    mild = np.exp(random.standard_normal(elements))
    mild *= np.repeat(10 ** random.uniform(-3, 0, elements // BLOCK), BLOCK)
    wild = 10 ** random.uniform(-8, 0, elements)
    tiny = mild * 2e-6 / np.sqrt(2 * np.mean(mild**2))  # Student-t(4) has variance 2
    return np.stack([mild, wild, mild, tiny, mild])


def fidelity(name: str, beta2: float, elements: int, steps: int, first: int) -> list[Row]:
    """Errors over the steps from `first` on; gradients are Student-t(4), rounded to bfloat16."""
    random = np.random.default_rng(0)
    scale = magnitudes(elements, random)
    often = 1 / np.repeat(np.arange(1, elements // BLOCK + 1), BLOCK)
    weights = torch.zeros(scale.shape, dtype=torch.bfloat16)
    stepper = BY_NAME[name].make(weights, [(0, elements)], beta2)
    m, v = torch.zeros(2, *scale.shape, dtype=torch.float64)
    squares, exact_squares, largest, roots = torch.zeros(4, len(scale), dtype=torch.float64)
    relative = []
    for step in range(1, steps + 1):
        g = scale * random.standard_t(4, scale.shape)
        g[list(FAMILIES).index("decay")] *= 0.1 if step >= DECAY else 1
        g[list(FAMILIES).index("sparse")] *= random.random(elements) < often
        grads = torch.as_tensor(g).bfloat16()
        stepper.step(grads, 0.0)
        m = BETA1 * m + (1 - BETA1) * grads.double()
        v = beta2 * v + (1 - beta2) * grads.double().square()
        if step < first:
            continue
        stored_m, stored_v = (moment.double() for moment in stepper.moments())
        u, exact = stored_m / (stored_v.sqrt() + EPS), m / (v.sqrt() + EPS)
        squares += (u - exact).square().mean(1)
        exact_squares += exact.square().mean(1)
        largest = torch.maximum(largest, u.abs().amax(1))
        if step % 20 == 0:
            relative.append(((u - exact) / exact).abs())
            roots += torch.where(v > 0, (stored_v / v).sqrt(), torch.nan).nanmean(1)
    median = torch.stack(relative).nanquantile(0.5, 0).nanquantile(0.5, 1)
    facts = {"format": name, "beta2": beta2}
    return [
        {
            **facts,
            "family": family,
            "rms": (squares[i] / exact_squares[i]).sqrt().item(),
            "median": median[i].item(),
            "largest": largest[i].item(),
            "sqrt_v": roots[i].item() / len(relative),
        }
        for i, family in enumerate(FAMILIES)
    ]


def runs(quick: bool) -> list[Run]:
    size = QUICK if quick else SIZE
    return [
        Run(fidelity, {"name": row.name, "beta2": beta2, **size})
        for beta2 in ((0.999,) if quick else (0.999, 0.95))
        for row in MOMENTS
    ]


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    at = rows[rows["beta2"] == 0.999].set_index(["format", "family"])
    sixteen, nearest = (at.loc[name]["rms"] for name in ("32, bf16 SR", NEAREST))
    peers = {row.name for row in FORMATS if row.kind == "emulation"} & set(rows["format"])
    times = at["largest"] / at.loc[EXACT]["largest"].reindex(at.index, level="family")
    ours = times[["32, bf16 SR", "32, block8"]].max()
    theirs = {name: times[name].max() for name in peers}
    verdicts = [
        Verdict(
            bool((sixteen < nearest).all()),
            f"bf16 with stochastic rounding is nearer than to nearest: rms errors of "
            f"{sixteen.min():.1%} to {sixteen.max():.1%} of a step, against {nearest.min():.1%} to "
            f"{nearest.max():.1%}.",
        ),
        Verdict(
            bool(ours < 1.5),
            f"No step of block8 or bf16 SR is 1.5 times as large as float32's largest: {ours:.2f} "
            f"times at most; "
            + ", ".join(f"{name}: {n:,.3g}" for name, n in sorted(theirs.items()))
            + ".",
        ),
    ]
    mild = {name: rows[(rows["format"] == name) & (rows["family"] == "mild")] for name in
            ("32, block8", FLASH)}  # fmt: skip
    for beta2 in sorted(rows["beta2"].unique()):
        block, flash = (t[t["beta2"] == beta2]["median"].item() for t in mild.values())
        verdicts.append(
            Verdict(
                block < flash,
                f"A usual step of block8 is nearer than one of flashoptim's format, mild ranges, "
                f"beta2 {beta2}: median relative error {block:.1%} against {flash:.1%}.",
            )
        )
    return verdicts


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """rms error / median relative error / largest step; sqrt(v) over exact where it is off."""

    def cell(row: pd.Series) -> str:
        text = f"{row.rms:.3g} / {row['median']:.2g} / {row.largest:,.3g}"
        return text + f" (sqrt v {row.sqrt_v:.2f}x)" * (abs(row.sqrt_v - 1) > 0.05)

    named = rows.assign(
        cell=rows.apply(cell, axis=1),
        family=rows["family"].where(rows["beta2"] == 0.999, rows["family"] + ", 0.95"),
    )
    named = named[(named["beta2"] == 0.999) | (named["family"] == "mild, 0.95")]
    wide = named.pivot(index="format", columns="family", values="cell")
    wide = wide.reindex([row.name for row in FORMATS if row.name in wide.index])
    return wide[list(dict.fromkeys(named["family"]))].reset_index()


def draw(rows: pd.DataFrame) -> Figure:
    figure, axes = plots.panels(2, height=4.2, sharey=True)
    shown = rows[rows["beta2"] == 0.999]
    names = [row.name for row in FORMATS if row.name in set(shown["format"])]
    colors = dict(zip(FAMILIES, plots.CYCLE, strict=False))
    for ax, column, label in zip(
        axes, ("rms", "largest"), ("rms error of a step", "largest step"), strict=True
    ):
        for family, color in colors.items():
            of = shown[shown["family"] == family].set_index("format")[column]
            ax.plot(of.reindex(names), range(len(names)), "o", color=color, label=family, ms=5)
        ax.set(xscale="log", xlabel=f"{label}, beta2 = 0.999")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[1].legend()
    return figure
