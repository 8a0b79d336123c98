"""Three pictures of a report: bandwidth by size, models, small tensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from .cases import model
from .models import MODELS
from .optimizers import OPTIMIZERS
from .results import frame
from .tables import machine, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURES = {
    "bandwidth": "Bandwidth of a step by the elements of a tensor, and the limit",
    "models": "Time of a step for the parameters of models, against ours",
    "tensors": "Time of a step by the number of small tensors",
}


def draw(results: dict[str, Any], folder: Path) -> Iterator[Path]:
    """The pictures that there are points for, 1700 pixels wide."""
    from matplotlib.figure import Figure

    table = frame(results)
    if "ms" not in table:
        return
    held = (table.kind == "step") & (table.gradients == "held") & table.ms.notna()
    chosen = table[held & (table.dtype == "float32")]
    for name, paint in zip(PICTURES, (bandwidth, models, tensors), strict=True):
        figure = Figure(figsize=(8.5, 4.2), dpi=200, facecolor="white", layout="constrained")
        axes = figure.subplots()
        paint(chosen, axes)
        file = folder / f"{name}.png"
        if not axes.has_data():
            file.unlink(missing_ok=True)
            continue
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.supxlabel(machine(results), fontsize=6, color="#555555")
        figure.savefig(file, metadata={"Software": None})
        yield file


def bandwidth(table: pd.DataFrame, axes: "Axes") -> None:
    points = table[(table.tensors == 1) & (table.elements > 64)]
    if not len(points):
        return
    _curves(points, axes, "elements", "gb_s")
    limit = points[points.optimizer.str.contains(" of 28 B")].sort_values("elements")
    if len(limit):
        axes.plot(limit.elements, limit.gb_s, color="#777777", ls="--", lw=1.4, label="limit")
    axes.set_xscale("log", base=2)
    axes.set(
        yscale="log",
        xlabel="elements of the tensor",
        ylabel="bandwidth (GB/s of bytes that must move)",
        title="One float32 tensor: bandwidth of a step",
    )
    axes.yaxis.set_major_formatter("{x:g}")


def tensors(table: pd.DataFrame, axes: "Axes") -> None:
    points = table[(table.elements == 64 * table.tensors) & table.case.str.contains("tensor")]
    if not len(points):
        return
    _curves(points, axes, "tensors", "ms")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tensors of 64 float32 elements",
        ylabel="time of a step (ms)",
        title="Many small tensors: time of a step",
    )
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_major_formatter("{x:g}")


def models(table: pd.DataFrame, axes: "Axes") -> None:
    """How many times our time the others take."""
    names = [name for name in MODELS if model(name) in set(table.case)]
    by_case = table.pivot_table(values="ms", index="case", columns="optimizer")
    shown = [row for row in OPTIMIZERS if row.level < 2 and row.name in by_case and not row.flat]
    ours = by_case[shown[0].name] if shown else None
    for i, row in enumerate(shown):
        ratios = [(by_case[row.name] / ours).get(model(name)) for name in names]
        places = [
            place + (i - (len(shown) - 1) / 2) * 0.84 / len(shown) for place in range(len(names))
        ]
        bars = axes.bar(places, ratios, 0.76 / len(shown), color=row.color, label=row.name)
        words = [times(ratio) if pd.notna(ratio) else "" for ratio in ratios]
        axes.bar_label(bars, words, padding=2, fontsize=6.5)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="time of a step / ours", title="Models in float32: time against ours")


def _curves(table: pd.DataFrame, axes: "Axes", x: str, y: str) -> None:
    for row in OPTIMIZERS:
        points = table[table.optimizer == row.name].sort_values(x)
        if len(points):
            width, line = (
                (2.6 if row.level == 0 and row.backend else 1.5),
                "--" if row.dashed else "-",
            )
            axes.plot(
                points[x], points[y], color=row.color, marker=row.marker, ms=5, lw=width, ls=line,
                label=row.name,
            )  # fmt: skip
