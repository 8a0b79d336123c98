"""A report's pictures and its CSV."""

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radam_kernels.train_report import COLOURS, OURS, TORCH_ADAM, TORCH_RADAM

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
from .report_lines import machine_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
BARS = [name for name in STYLES if name in QUICK and name != CPU]


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

    for name, paint in {"bandwidth": bandwidth, "models": models, "tensors": tensors}.items():
        figure = Figure(figsize=(8.5, 4.2), dpi=200, facecolor="white", layout="constrained")
        file = folder / f"{name}.png"
        if not paint(results, figure):
            file.unlink(missing_ok=True)
            continue
        figure.supxlabel("; ".join(machine_lines(results)), fontsize=6.5, color="#555555")
        figure.savefig(file, metadata={KEY: digest(results)})
        yield file


def bandwidth(results: dict[str, Any], figure: "Figure") -> bool:
    """GB/s against elements of one float32 tensor, below the limit."""
    axes = figure.subplots()
    cases = [c for c in _float32(results) if c["tensors"] == 1 and c["elements"] > 64]
    limit = [
        (c["elements"], row["limit_gb_s"])
        for c in cases
        if (row := c["rows"].get(CPU)) and "limit_gb_s" in row
    ]
    if limit:
        axes.plot(
            *zip(*limit, strict=True),
            color="#777777",
            ls=DASHED,
            lw=1.4,
            label="limit: streaming loop",
        )
    drawn = _curves(axes, cases, "elements", lambda row: row["gb_s"])
    axes.set_xscale("log", base=2)
    axes.set(
        yscale="log",
        xlabel="elements of the tensor",
        ylabel="bandwidth (GB/s of bytes that must move)",
        title="One float32 tensor: bandwidth of a step",
    )
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
    _finish(axes)
    return drawn


def models(results: dict[str, Any], figure: "Figure") -> bool:
    """How many times our time the others take, for each model."""
    axes = figure.subplots()
    found = {
        name.removesuffix(" float32"): case["rows"]
        for name, case in results["cases"].items()
        if name.endswith(" float32")
        and not name.startswith("2^")
        and " of 64" not in name
        and "ms" in case["rows"].get(CPU, {})
    }
    width = 0.84 / len(BARS)
    for i, optimizer in enumerate(BARS):
        measured = {
            place: rows[optimizer]["ms"]["median"] / rows[CPU]["ms"]["median"]
            for place, rows in enumerate(found.values())
            if "ms" in rows.get(optimizer, {})
        }
        places = [place + (i - (len(BARS) - 1) / 2) * width for place in measured]
        if not places:
            continue
        colour = STYLES[optimizer]["color"]
        bars = axes.bar(places, measured.values(), 0.9 * width, color=colour, label=optimizer)
        axes.bar_label(
            bars, [f"{ratio:.2f}x" for ratio in measured.values()], padding=2, fontsize=7
        )
    axes.axhline(1, color=COLOURS[OURS], lw=2, label=f"{CPU} = 1")
    axes.set_xticks(range(len(found)), list(found))
    axes.set(ylabel=f"time of a step / that of {CPU}", title="Models, float32: time against ours")
    _finish(axes)
    return bool(found)


def _float32(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Those with gradients held and warm caches."""
    return [case for name, case in results["cases"].items() if name.endswith(" float32")]


def _curves(axes: "Axes", cases: list[dict[str, Any]], along: str, value) -> bool:
    """Whether there was any to draw."""
    drawn = False
    for optimizer, style in STYLES.items():
        points = [
            (case[along], value(row))
            for case in cases
            if "ms" in (row := case["rows"].get(optimizer, {}))
        ]
        if points:
            drawn = True
            axes.plot(
                *zip(*sorted(points), strict=True), label=optimizer, **{"ms": 5, "lw": 1.5, **style}
            )
    return drawn


def _finish(axes: "Axes") -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
