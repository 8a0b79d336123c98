"""The results of `python -m radam_kernels train`: a table, a plot, and JSON."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

OURS, TORCH_RADAM, TORCH_ADAM = "radam_kernels.RAdam", "torch.optim.RAdam", "torch.optim.Adam"
# From Okabe and Ito's palette, which is safe for colour-blind readers.
COLOURS = {OURS: "#E69F00", TORCH_RADAM: "#000000", TORCH_ADAM: "#0072B2"}


@dataclass
class Run:
    """The results of training under one optimizer: losses in nats per byte, times in seconds."""

    name: str
    parameters: int = 0
    eval_steps: list[int] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    optimizer_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """The number of training steps so far."""
        return len(self.step_s)

    def optimizer_ms(self) -> tuple[float, float, float]:
        """The 20th, 50th and 80th percentile of the optimizer's time per step, in ms."""
        low, mid, high = torch.tensor(self.optimizer_s).quantile(torch.tensor([0.2, 0.5, 0.8]))
        return 1e3 * low.item(), 1e3 * mid.item(), 1e3 * high.item()

    def share(self) -> float:
        """The optimizer's share of a training step, from 0 to 1 (ratio of medians)."""
        return self.optimizer_ms()[1] / (1e3 * torch.tensor(self.step_s).quantile(0.5).item())


def radam_difference(runs: dict[str, Run]) -> float:
    """The greatest difference of the two RAdams' held-out losses, in nats per byte."""
    pairs = zip(runs[OURS].held_out, runs[TORCH_RADAM].held_out, strict=True)
    return max(abs(ours - theirs) for ours, theirs in pairs)


def table(runs: dict[str, Run]) -> str:
    """One row for each optimizer, under a heading with units."""
    rows = [f"{'':20}{'held-out loss':>24}{'optimizer':>14}{'share of':>12}{'time against':>16}"]
    rows += [f"{'':20}{'nats/byte':>12}{'bits/byte':>12}{'ms/step':>14}{'step':>12}{OURS[:13]:>16}"]
    for run in runs.values():
        loss, ms = run.held_out[-1], run.optimizer_ms()[1]
        rows.append(
            f"{run.name:20}{loss:12.4f}{loss / math.log(2):12.4f}{ms:14.3f}"
            f"{run.share():12.1%}{ms / runs[OURS].optimizer_ms()[1]:15.2f}x"
        )
    return "\n".join(rows)


def record(
    runs: dict[str, Run], settings: Mapping[str, object], machine: Mapping[str, object]
) -> str:
    """All numbers of the comparison as JSON text."""
    results = {
        name: {
            "eval_steps": run.eval_steps,
            "held_out_nats_per_byte": run.held_out,
            "optimizer_ms_percentiles_20_50_80": run.optimizer_ms(),
            "optimizer_share_of_step": run.share(),
            "optimizer_time_against_radam_kernels": (
                run.optimizer_ms()[1] / runs[OURS].optimizer_ms()[1]
            ),
        }
        for name, run in runs.items()
    }
    return json.dumps(
        {
            "settings": settings,
            "machine": machine,
            "optimizers": results,
            "greatest_radam_difference_nats_per_byte": radam_difference(runs),
        },
        indent=2,
    )


def draw(runs: dict[str, Run], caption: str) -> bytes:
    """A PNG, 1600 pixels wide: held-out loss against step, and optimizer time as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.8), dpi=200, facecolor="white", layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(1.7, 1))
    # The curves of the two RAdams coincide: a thin dashed line on a wide light one shows both.
    strokes: dict[str, dict[str, Any]] = {
        OURS: {"lw": 6, "alpha": 0.75},
        TORCH_RADAM: {"lw": 1.6, "ls": (0, (4, 2))},
    }
    for name, run in runs.items():
        stroke = strokes.get(name, {"lw": 1.8})
        curves.plot(run.eval_steps, run.held_out, color=COLOURS[name], label=name, **stroke)
    curves.set(xlabel="training step", ylabel="held-out loss (nats/byte)", title="Same training")
    curves.legend(frameon=False)
    curves.grid(alpha=0.25)

    for place, (name, run) in enumerate(runs.items()):
        low, mid, high = run.optimizer_ms()
        bars.bar(place, mid, 0.62, color=COLOURS[name])
        bars.errorbar(place, mid, [[mid - low], [high - mid]], color="#777777", capsize=4)
        bars.annotate(
            f"{mid:.2f} ms\n{run.share():.1%} of step",
            (place, high), (0, 4), textcoords="offset points", ha="center", fontsize=9,
        )  # fmt: skip
    labels = [name.replace(".optim", "").replace(".", "\n") for name in runs]
    bars.set_xticks(range(len(runs)), labels)
    bars.set(ylabel="optimizer time (ms/step)", title="Optimizer time")
    bars.margins(y=0.22)
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(caption, fontsize=8.5, color="#555555")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
