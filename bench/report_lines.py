"""A report as lines of text: the cases, the cost as work grows, the aims, and what was left out."""

from collections.abc import Callable
from typing import Any

from . import aims
from .contenders import CPU
from .growth import Line, growth
from .others import DISTURBED

PEERS = ("torch-optimi", "pytorch_optimizer")  # their versions are told
GROWTH = (
    *("time an element", "time a step", "and a tensor", "fits off by"),
    *("memory an element", "memory a tensor"),
)
RATIOS = ("vs_adam_fused", "vs_radam_foreach")
LEGEND = """\
a step: the median; p20 and p80 hold the middle three fifths. GB/s: of the bytes that the algorithm
must move. of limit: of what a streaming loop reaches on the same tensors and threads. x Adam and
x RAdam: how many times as fast as torch.optim.Adam(fused=True) and torch.optim.RAdam(foreach=True).
"""


def table(results: dict[str, Any]) -> list[str]:
    """All of it, aligned, for a terminal."""
    lines = [*machine_lines(results), ""]
    lines.append(
        f"{'':36}{'a step':>9}{'p20':>9}{'p80':>9}{'GB/s':>8}{'of limit':>10}{'x Adam':>9}"
        f"{'x RAdam':>9}"
    )
    for name, case in results["cases"].items():
        rows = {key: row for key, row in case["rows"].items() if "not_measured" not in row}
        lines += [name + "  (!)" * disturbed(case)] * bool(rows)
        lines += [f"  {optimizer:34}{_row(row)}" for optimizer, row in rows.items()]
    lines += ["", *LEGEND.splitlines()]
    if any(map(disturbed, results["cases"].values())):
        lines.append("(!) other processes were at work meanwhile: measure it again")
    if rows := growth_rows(results):
        lines += ["", f"{'cost as work grows':36}" + "".join(f"  {head}" for head in GROWTH)]
        for name, cells in rows.items():
            aligned = (f"  {cell:>{len(head)}}" for cell, head in zip(cells, GROWTH, strict=True))
            lines.append(f"  {name:34}" + "".join(aligned))
    lines += ["", *aims.report(results, CPU)]
    if left := left_out(results):
        lines += ["", "left out", *(f"  {line}" for line in left)]
    return lines + ["", "interrupted: this is not all"] * results["interrupted"]


def machine_lines(results: dict[str, Any]) -> list[str]:
    """What was measured, on what."""
    cpu, versions = results["cpu"], results["versions"]
    peers = [f"{name} {versions[name]}" for name in ("torch", *PEERS) if versions[name]]
    return [
        f"{cpu['name']}, {cpu['threads']} threads, {cpu['instruction_set']}, {', '.join(peers)}",
        f"{results['date'][:10]}, commit {results['commit']}, sources {results['sources']}",
    ]


def disturbed(case: dict[str, Any]) -> bool:
    return (case["cores_of_others"] or 0) > DISTURBED


def duration(seconds: float) -> str:
    """Three digits and a unit: 7.21 us."""
    units = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9), ("ps", 1e-12))
    unit, size = next((u for u in units if abs(seconds) >= 0.9995 * u[1]), units[-1])
    number = seconds / size
    return f"{number:.0f} {unit}" if abs(number) >= 99.95 else f"{number:#.3g} {unit}"


def times(ratio: float) -> str:
    """Three digits: 43.3x, 5.66x."""
    return f"{ratio:.{1 + (ratio < 9.995)}f}x"


def growth_rows(results: dict[str, Any]) -> dict[str, list[str]]:
    """Cells under GROWTH for each optimizer of which there are points enough."""
    names = dict.fromkeys(name for case in results["cases"].values() for name in case["rows"])
    found = {name: growth(results, name) for name in names}
    return {
        name: [
            _say(of.seconds_by_elements, "each", duration),
            _say(of.seconds_by_tensors, "fixed", duration),
            _say(of.seconds_by_tensors, "each", duration),
            f"{max(line.off for line in of[:2] if line):.0%}" if any(of[:2]) else "",
            _say(of.bytes_by_elements, "each", _bytes),
            _say(of.bytes_by_tensors, "each", _bytes),
        ]
        for name, of in found.items()
        if any(of)
    }


def left_out(results: dict[str, Any]) -> list[str]:
    """A line for each reason and where it held."""
    found: dict[tuple[str, str], list[str]] = {}  # cases, by optimizer and reason
    for name, case in results["cases"].items():
        for optimizer, row in case["rows"].items():
            if reason := row.get("not_measured"):
                found.setdefault((optimizer, reason), []).append(name)
    alike: dict[tuple[str, ...], list[str]] = {}  # optimizers, by reason and cases
    for (optimizer, reason), cases in found.items():
        everywhere = len(cases) == len(results["cases"])
        alike.setdefault((reason, *(() if everywhere else cases)), []).append(optimizer)
    return [
        f"{', '.join(optimizers)}: {reason}" + f" ({'; '.join(cases)})" * bool(cases)
        for (reason, *cases), optimizers in alike.items()
    ]


def _row(row: dict[str, Any]) -> str:
    if "wrong" in row:
        return f" WRONG: {row['wrong']}"
    low, middle, high = (duration(row["ms"][key] / 1e3) for key in ("p20", "median", "p80"))
    share = f"{row['share_of_limit']:.1%}" if "share_of_limit" in row else ""
    adam, radam = (times(row[key]) if row[key] else "" for key in RATIOS)
    return f"{middle:>9}{low:>9}{high:>9}{row['gb_s']:8.2f}{share:>10}{adam:>9}{radam:>9}"


def _say(line: Line | None, part: str, say: Callable[[float], str]) -> str:
    return say(getattr(line, part)) if line else ""


def _bytes(number: float) -> str:
    return f"{abs(number):.0f} B" if abs(number) < 0.05 or number > 99.95 else f"{number:.1f} B"
