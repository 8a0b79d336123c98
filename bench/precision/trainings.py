"""Final losses of small trainings, against those of exact masters with float32 moments."""

import math

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from ..paper.harness import plots
from ..paper.harness.experiment import Row, Run, Verdict
from ..paper.harness.statistics import Mean, mean_interval
from .contenders import AVAILABLE, BY_NAME, EXACT, FLASH, FORMATS, NEAREST, TORCH, Span
from .tasks import TASKS, Weights

TITLE = "Trainings"
CLAIM = (
    "16-bit moments with stochastic rounding and exact masters train as float32 moments do; 8-bit "
    "moments nearly so."
)
SEEDS, QUICK_SEEDS, BETAS = 20, 8, (0.999, 0.95)
QUICK = (EXACT, "32, bf16 SR", "24, bf16 SR", "SR, bf16 SR", "24, block8", NEAREST, TORCH, FLASH)
LAST = 0.02  # of the learning rate, at the end of its cosine
SIXTEEN, EIGHT = "32, bf16 SR", "24, block8"
WITHIN, WITHIN8 = 1e-3, 10e-3  # nats


def train(task: str, beta2: float, name: str, seeds: int) -> list[Row]:
    """Final losses of `seeds` trainings that run side by side.

    The model computes in float32 with what it sees of the weights, their bfloat16; gradients are
    rounded to bfloat16.
    """
    make, steps, lr = TASKS[task]
    problem = make()
    made = [problem.init(torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    drawn = [problem.draw(torch.Generator().manual_seed(1000 + n), steps) for n in range(seeds)]
    batches = [torch.stack(parts, 1) for parts in zip(*drawn, strict=True)]
    torch.manual_seed(0)  # of torchao's rounding
    spans: list[Span] = []
    end = 0
    for value in made[0].values():
        spans.append((end, value.numel()))
        end += -(-value.numel() // 256) * 256  # so that no block has elements of two tensors
    places = {
        key: (slice(a, a + n), value.shape)
        for (key, value), (a, n) in zip(made[0].items(), spans, strict=True)
    }
    stored = torch.zeros(seeds, end, dtype=torch.bfloat16)
    for row, values in zip(stored, made, strict=True):
        for key, (part, _) in places.items():
            row[part] = values[key].flatten()
    stepper = BY_NAME[name].make(stored, spans, beta2)
    seen = torch.empty(stored.shape, requires_grad=True)

    def weights() -> Weights:
        with torch.no_grad():
            seen.copy_(stored)
        return {key: seen[:, part].view(seeds, *shape) for key, (part, shape) in places.items()}

    for step in range(steps):
        problem.loss(weights(), *(part[step] for part in batches)).sum().backward()
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        stepper.step(seen.grad.bfloat16(), lr * (LAST + (1 - LAST) * cosine))
        seen.grad = None
    with torch.no_grad():
        losses = problem.held_out(weights()).tolist()
    facts = {"training": task, "beta2": beta2, "format": name}
    return [{**facts, "seed": seed, "loss": loss} for seed, loss in enumerate(losses)]


def runs(quick: bool) -> list[Run]:
    """The slow ones first, so that all processes end at about the same time."""
    if quick:
        seeds = {"beta2": 0.999, "seeds": QUICK_SEEDS}
        return [Run(train, {"task": "zipf", "name": name, **seeds}) for name in QUICK]
    return [
        Run(train, {"task": task, "beta2": beta2, "name": row.name, "seeds": SEEDS})
        for row in reversed(AVAILABLE)
        for task in TASKS
        for beta2 in BETAS
    ]


def deviations(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with `off`: how much higher the loss is than the same seed's with the format that
    it is compared to; infinite where a training has diverged."""
    reference = rows["format"].map(lambda name: BY_NAME[name].against)
    key = ["training", "beta2", "format", "seed"]
    exact = rows.set_index(key)["loss"]
    pairs = zip(rows["training"], rows["beta2"], reference, rows["seed"], strict=True)
    off = rows["loss"].to_numpy() - exact.loc[list(pairs)].to_numpy()
    return rows.assign(off=np.where(np.isfinite(off), off, np.inf))


class Cell:
    """What the seeds of one training, beta2 and format say."""

    def __init__(self, off: pd.Series) -> None:
        self.diverged = int(np.isinf(off).sum())
        self.interval = mean_interval(off) if not self.diverged else Mean(np.inf, np.inf)
        self.sd = off.std()
        self.worst = off.iloc[off.abs().argmax()]
        self.furthest = abs(self.interval.mean) + self.interval.half
        self.nearest = abs(self.interval.mean) - self.interval.half

    def __str__(self) -> str:
        if self.diverged:
            return f"{self.diverged} diverged"
        mean, half = 1e3 * self.interval.mean, 1e3 * self.interval.half
        return f"{mean:+.2f} ± {half:.2f}"


Cells = dict[str, dict[tuple[str, float], Cell]]


def cells(rows: pd.DataFrame) -> Cells:
    found: Cells = {}
    groups = deviations(rows).groupby(["training", "beta2", "format"])["off"]
    for (training, beta2, name), off in groups:
        if name != BY_NAME[name].against:
            found.setdefault(name, {})[training, beta2] = Cell(off)
    return {row.name: found[row.name] for row in FORMATS if row.name in found}


def _where(of: dict[tuple[str, float], Cell]) -> str:
    return ", ".join(f"{training} {beta2}: {cell}" for (training, beta2), cell in of.items())


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    of = cells(rows)
    seeds = rows["seed"].nunique()
    nearest = {key: cell for key, cell in of[NEAREST].items() if key[1] == 0.999}
    verdicts = [
        Verdict(
            all(cell.furthest < WITHIN for cell in of[SIXTEEN].values()),
            f"{SIXTEEN}: 95% intervals of the mean deviation lie inside ±1 (in 1e-3 nats, "
            f"{seeds} seeds): {_where(of[SIXTEEN])}.",
        ),
        Verdict(
            all(cell.nearest > WITHIN for cell in nearest.values()),
            f"{NEAREST} at beta2 0.999: outside: {_where(nearest)}.",
        ),
        Verdict(
            all(cell.furthest < WITHIN8 for cell in of[EIGHT].values()),
            f"{EIGHT}: inside ±10: {_where(of[EIGHT])}.",
        ),
    ]
    for beta2 in sorted({key[1] for key in of[EIGHT]}, reverse=True):
        ours, theirs = (
            {key: cell for key, cell in of[name].items() if key[1] == beta2}
            for name in (EIGHT, FLASH)
        )
        text = [
            f"{key[0]} sd {1e3 * ours[key].sd:.2f} and {1e3 * theirs[key].sd:.2f}, worst seed "
            f"{1e3 * ours[key].worst:+.1f} and {1e3 * theirs[key].worst:+.1f}"
            for key in ours
        ]
        verdicts.append(
            Verdict(
                all(ours[key].sd <= theirs[key].sd for key in ours),
                f"{EIGHT} spreads no more than flashoptim's format at beta2 {beta2}: "
                f"{'; '.join(text)} (1e-3 nats).",
            )
        )
    if reasons := {row.name: row.absent() for row in FORMATS if row.absent()}:
        left = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        verdicts.append(Verdict(None, f"Their own kernels were left out here: {left}."))
    return verdicts


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean deviations in 1e-3 nats with 95% intervals, and below them spread and worst seed."""
    lines = []
    for name, of in cells(rows).items():
        row = BY_NAME[name]
        line = {"format": name, "": row.kind, "stored": row.stored, "moved": row.moved}
        for (training, beta2), cell in of.items():
            spread = f" ({1e3 * cell.sd:.2f}, {1e3 * cell.worst:+.1f})" * (not cell.diverged)
            line[f"{training}, {beta2}"] = str(cell) + spread
        lines.append(line)
    return pd.DataFrame(lines)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """For the README of the project."""
    of, lines = cells(rows), []
    for name in (SIXTEEN, "24, bf16 SR", "SR, bf16 SR", "32, block8", EIGHT, "SR, block8",
                 NEAREST, TORCH, FLASH):  # fmt: skip
        row = BY_NAME[name]
        shown = {f"{t}, beta2 {b}": str(cell) for (t, b), cell in of[name].items()}
        label = name + " (emulation)" * (row.kind == "emulation")
        line = {"format": label, "bytes stored": f"{row.stored:.4g}"}
        lines.append({**line, "bytes moved a step": f"{row.moved:.4g}", **shown})
    return pd.DataFrame(lines)


def draw(rows: pd.DataFrame) -> Figure:
    of, all_rows = cells(rows), deviations(rows)
    panels = sorted({key for cells_of in of.values() for key in cells_of}, key=lambda k: -k[1])
    columns = min(3, len(panels))
    figure, axes = plots.panels(columns, len(panels) // columns, height=4.4, sharey=True)
    colors = {"ours": plots.BLUE, "today": plots.VERMILION, "emulation": plots.ORANGE}
    for ax, (training, beta2) in zip(axes, panels, strict=True):
        ax.axvspan(-1, 1, color=plots.GREEN, alpha=0.2, lw=0)
        for place, (name, found) in enumerate(of.items()):
            if (training, beta2) not in found or found[training, beta2].diverged:
                continue
            here = all_rows[(all_rows["training"] == training) & (all_rows["beta2"] == beta2)]
            off = 1e3 * here[here["format"] == name]["off"]
            color, (mean, half) = colors[BY_NAME[name].kind], found[training, beta2].interval
            ax.plot(off, [place + 0.25] * len(off), ".", color=color, alpha=0.3, ms=4)
            ax.errorbar(1e3 * mean, place, xerr=1e3 * half, fmt="o", color=color, ms=4, capsize=3)
        ax.set_xscale("symlog", linthresh=1)
        ax.set(title=f"{training}, beta2 = {beta2}")
        ax.set_yticks(range(len(of)), list(of))
    axes[0].invert_yaxis()
    figure.supxlabel("loss above exact masters with float32 moments (1e-3 nats), seeds and means")
    return figure
