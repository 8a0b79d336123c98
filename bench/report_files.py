"""A report's pictures and its CSV."""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radam_kernels.train_report import COLOURS, OURS, TORCH_ADAM, TORCH_RADAM

from .cases import model_case
from .contenders import (
    ADAM,
    ADAMW,
    COMPILED,
    CPU,
    FLAT,
    OPTIMI,
    PYTORCH_OPTIMIZER,
    QUICK,
    RADAM,
    RADAM_LOOP,
)
from .models import ALL_MODELS
from .report_lines import machine_lines, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Value = Callable[[dict[str, Any]], float | None]  # of a row

KEY = "Measurement"  # in a picture's metadata: the digest of what it shows
DASHED, DOTTED = (0, (4, 2)), (0, (1, 1.5))
# Okabe and Ito's colours, which stay apart for colour-blind readers; a sibling has the same colour.
STYLES: dict[str, dict[str, Any]] = {
    CPU: {"color": COLOURS[OURS], "marker": "o", "lw": 2.6, "zorder": 5},
    CPU + FLAT: {"color": "#D55E00", "marker": "s", "ls": DASHED},
    ADAM: {"color": COLOURS[TORCH_ADAM], "marker": "^"},
    ADAMW: {"color": COLOURS[TORCH_ADAM], "marker": "v", "ls": DASHED},
    "torch Adam(foreach)": {"color": "#56B4E9", "marker": "^"},
    "torch AdamW(foreach)": {"color": "#56B4E9", "marker": "v", "ls": DASHED},
    OPTIMI: {"color": "#009E73", "marker": "D"},
    PYTORCH_OPTIMIZER: {"color": "#CC79A7", "marker": "X"},
    RADAM: {"color": COLOURS[TORCH_RADAM], "marker": "P"},
    COMPILED: {"color": COLOURS[TORCH_RADAM], "marker": "p", "ls": DASHED},
    RADAM_LOOP: {"color": COLOURS[TORCH_RADAM], "marker": "*", "ls": DOTTED},
}
PICTURES = {
    "bandwidth": "Bandwidth of a step against the elements of a tensor, and the limit",
    "models": "Time of a step for the parameters of models, against ours",
    "tensors": "Time of a step against the number of small tensors",
}
BARS = [name for name in STYLES if name in QUICK and not name.endswith(FLAT)]


def write_csv(results: dict[str, Any], file: Path) -> None:
    """A line for each case and optimizer; what one does not have is empty."""
    lines = []
    for name, case in results["cases"].items():
        facts = {key: value for key, value in case.items() if key != "rows"}
        for optimizer, row in case["rows"].items():
            ms = {f"ms_{key}": value for key, value in row.get("ms", {}).items()}
            rest = {key: value for key, value in row.items() if key != "ms"}
            lines.append({"case": name, **facts, "optimizer": optimizer, **ms, **rest})
    columns = dict.fromkeys(key for line in lines for key in line)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        writer.writerows(lines)


def digest(results: dict[str, Any]) -> str:
    """Twelve hexadecimal digits for all that was measured."""
    measured = json.dumps([results["cases"], results["memory"]], sort_keys=True)
    return hashlib.sha256(measured.encode()).hexdigest()[:12]


def draw(results: dict[str, Any], folder: Path) -> Iterator[Path]:
    """The pictures that there are points for, 1700 pixels wide."""
    from matplotlib.figure import Figure

    for name, paint in zip(PICTURES, (bandwidth, models, tensors), strict=True):
        figure = Figure(figsize=(8.5, 4.2), dpi=200, facecolor="white", layout="constrained")
        file = folder / f"{name}.png"
        if not paint(results, figure):
            file.unlink(missing_ok=True)
            continue
        figure.supxlabel("; ".join(machine_lines(results)), fontsize=7, color="#555555")
        figure.savefig(file, metadata={KEY: digest(results)})
        yield file


def bandwidth(results: dict[str, Any], figure: "Figure") -> bool:
    """GB/s against the elements of one float32 tensor, and the limit."""
    axes = figure.subplots()
    cases = [c for c in _float32(results) if c["tensors"] == 1 and c["elements"] > 64]
    drawn = _curves(axes, cases, "elements", lambda row: row["gb_s"])
    if limit := _points(cases, CPU, "elements", lambda row: row.get("limit_gb_s")):
        axes.plot(*limit, color="#777777", ls=DASHED, lw=1.4, label="limit: a streaming loop")
    axes.set_xscale("log", base=2)
    axes.set_xticks([case["elements"] for case in cases])
    axes.set(
        yscale="log",
        xlabel="elements of the tensor",
        ylabel="bandwidth (GB/s of bytes that must move)",
        title="One float32 tensor: bandwidth of a step",
    )
    axes.yaxis.set_major_formatter("{x:g}")
    _finish(axes)
    return drawn


def tensors(results: dict[str, Any], figure: "Figure") -> bool:
    """Time against the number of small tensors."""
    axes = figure.subplots()
    cases = [c for c in _float32(results) if c["elements"] == 64 * c["tensors"]]
    drawn = _curves(axes, cases, "tensors", lambda row: row["ms"]["median"])
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tensors of 64 float32 elements",
        ylabel="time of a step (ms)",
        title="Many small tensors: time of a step",
    )
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_major_formatter("{x:g}")
    _finish(axes)
    return drawn


def models(results: dict[str, Any], figure: "Figure") -> bool:
    """How many times our time the others take, for each model."""
    axes = figure.subplots()
    every = {name: results["cases"].get(model_case(name, "float32")) for name in ALL_MODELS}
    found = {
        name: case["rows"] for name, case in every.items() if case and "ms" in case["rows"][CPU]
    }
    width = 0.84 / len(BARS)
    for i, optimizer in enumerate(BARS):
        measured = {
            place: rows[optimizer]["ms"]["median"] / rows[CPU]["ms"]["median"]
            for place, rows in enumerate(found.values())
            if "ms" in rows.get(optimizer, {})
        }
        if measured:
            places = [place + (i - (len(BARS) - 1) / 2) * width for place in measured]
            colour = STYLES[optimizer]["color"]
            bars = axes.bar(places, measured.values(), 0.9 * width, color=colour, label=optimizer)
            words = [times(ratio) for ratio in measured.values()]
            axes.bar_label(bars, words, padding=2, fontsize=7.5)
    axes.set_xticks(range(len(found)), list(found))
    axes.tick_params(axis="x", length=0)
    axes.set(ylabel=f"time of a step / {CPU}'s", title="Models in float32: time against ours")
    _finish(axes)
    return bool(found)


def _float32(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Those with gradients held and warm caches."""
    return [case for name, case in results["cases"].items() if name.endswith(" float32")]


def _points(
    cases: list[dict[str, Any]], optimizer: str, along: str, value: Value
) -> list[tuple[float, ...]]:
    """All x, and all y; nothing where nothing was measured."""
    rows = [(case[along], case["rows"].get(optimizer, {})) for case in cases]
    points = sorted((x, y) for x, row in rows if "ms" in row and (y := value(row)) is not None)
    return list(zip(*points, strict=True))


def _curves(axes: "Axes", cases: list[dict[str, Any]], along: str, value: Value) -> bool:
    """Whether there was any to draw."""
    every = {name: _points(cases, name, along, value) for name in STYLES}
    for name, points in every.items():
        if points:
            axes.plot(*points, label=name, **{"ms": 5, "lw": 1.5, **STYLES[name]})
    return any(every.values())


def _finish(axes: "Axes") -> None:
    if not axes.has_data():
        return
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
