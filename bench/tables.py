"""Results as lines of text and tables in markdown."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd

from .correctness import MEASURED, WRONG
from .growth import growth
from .optimizers import BY_NAME
from .timing import DISTURBED

Cell = Callable[[pd.Series, pd.Series | None], str]  # of a row, and ours of the same case
PEERS = ("torch-optimi", "pytorch_optimizer", "deepspeed")  # whose versions are told
GROWTH = {
    "time an element": ("ms by elements", "each"),
    "time a step": ("ms by tensors", "fixed"),
    "and a tensor": ("ms by tensors", "each"),
    "memory an element": ("extra_bytes by elements", "each"),
    "memory a tensor": ("extra_bytes by tensors", "each"),
}


def machine(results: dict[str, Any]) -> str:
    """What was measured, on what, when."""
    device, host, versions = results["device"], results["cpu"], results["versions"]
    if "driver" in device:
        parts = [device["name"], f"driver {device['driver']}"]
        parts += [f"CUDA {versions['cuda runtime of the kernels']}", f"triton {versions['triton']}"]
    else:
        parts = [host["name"], f"{host['threads']} threads", host["instruction_set"]]
    packages = ("torch", *PEERS)
    parts += [f"{name} {versions[name]}" for name in packages if versions.get(name)]
    when = f"{results['date'][:10]}, commit {results['commit']}, sources {results['sources']}"
    return f"{', '.join(parts)}; {when}"


def duration(seconds: float) -> str:
    """Three digits and a unit: 7.21 us."""
    units = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9), ("ps", 1e-12))
    unit, size = next((u for u in units if abs(seconds) >= 0.9995 * u[1]), units[-1])
    number = seconds / size
    return f"{number:.0f} {unit}" if abs(number) >= 99.95 else f"{number:#.3g} {unit}"


def times(ratio: float) -> str:
    """Three digits: 43.3x, 5.66x."""
    return f"{ratio:.{1 + (ratio < 9.995)}f}x"


def memory(count: float) -> str:
    return f"{abs(count):.0f} B" if abs(count) < 0.05 or count > 99.95 else f"{count:.1f} B"


def given(row: pd.Series, key: str, say: Callable[[Any], str]) -> str:
    """A value in words, or nothing where the row has none."""
    return "" if pd.isna(row.get(key)) else say(row[key])


def case_table(rows: Iterable[dict[str, Any]]) -> str:
    """All that was measured of a case."""
    lines = [_line(pd.Series(row)) for row in rows if row["status"] == MEASURED]
    return markdown(lines)


def markdown(lines: Sequence[dict[str, str]]) -> str:
    """A table of cells by column; nothing without lines."""
    table = pd.DataFrame(lines).fillna("")
    return table.to_markdown(index=False, disable_numparse=True) if lines else ""


def _line(row: pd.Series) -> dict[str, str]:
    columns = {
        "optimizer": row.optimizer,
        "a step": given(row, "ms", lambda ms: duration(ms / 1e3)),
        "p20": given(row, "ms_p20", lambda ms: duration(ms / 1e3)),
        "p80": given(row, "ms_p80", lambda ms: duration(ms / 1e3)),
        "host": given(row, "host_us", lambda us: duration(us / 1e6)),
        "GB/s": given(row, "gb_s", "{:.2f}".format),
        "of limit": given(row, "limit_share", "{:.1%}".format),
        "x Adam": given(row, "vs_adam_fused", times),
        "x RAdam": given(row, "vs_radam_foreach", times),
        "of training": given(row, "step_share", "{:.1%}".format),
        "extra": given(row, "extra_bytes", lambda n: f"{n / 1e6:.2f} MB"),
    }
    always = ("optimizer", "a step") if pd.notna(row.get("ms")) else ("optimizer",)
    return {key: text for key, text in columns.items() if text or key in always}


def pivot(
    frame: pd.DataFrame, cases: Sequence[str], columns: Sequence[str], cell: Cell, head: str = ""
) -> str:
    """A row for each case, a column for each optimizer that was measured in one of them."""
    chosen = frame[frame.case.isin(cases) & frame.optimizer.isin(columns)]
    there = set(chosen[chosen.status == MEASURED].optimizer)
    shown = [name for name in columns if name in there]
    lines = []
    for case in cases:
        rows = {row.optimizer: row for _, row in chosen[chosen.case == case].iterrows()}
        if rows:
            texts = {name: _text(rows.get(name), rows.get(shown[0]), cell) for name in shown}
            title = case + " (!)" * is_disturbed(next(iter(rows.values())))
            lines.append({head: title.replace(" float32", ""), **texts})
    return markdown(lines)


def _text(row: pd.Series | None, ours: pd.Series | None, cell: Cell) -> str:
    if row is None:
        return ""
    if row.status != MEASURED:
        return "**wrong**" if row.status == WRONG else "not measured"
    return cell(row, ours)


def compared(row: pd.Series, ours: pd.Series | None) -> str:
    """The median; for ours the share of the limit, for others the time against ours."""
    text = duration(row.ms / 1e3) + "*" * (row.get("host_bound") is True)
    if BY_NAME[row.optimizer].backend:
        return text + given(row, "limit_share", ", {:.0%}".format)
    if ours is None or ours.status != MEASURED:
        return text
    return f"{text}, {times(row.ms / ours.ms)}"


def is_disturbed(row: pd.Series) -> bool:
    return (row.get("cores_of_others") or 0) > DISTURBED


def growth_table(frame: pd.DataFrame) -> str:
    """Costs as work grows, for each optimizer with points enough; nothing without any."""
    lines = []
    for name in frame.optimizer.unique():
        found = growth(frame, name)
        cells = {}
        for title, (key, part) in GROWTH.items():
            line = found.get(key)
            say = memory if "bytes" in key else duration
            cells[title] = say(getattr(line, part)) if line else ""
        errors = [line.error for key, line in found.items() if line and key.startswith("ms")]
        cells["fits off by"] = f"{max(errors):.0%}" if errors else ""
        if any(cells.values()):
            lines.append({"": name, **cells})
    return markdown(lines)


def left_out(frame: pd.DataFrame) -> list[str]:
    """A line for each reason and where it held."""
    missing = frame[frame.status != MEASURED]
    every = frame.case.nunique()
    alike: dict[tuple[str, ...], list[str]] = {}  # optimizers, by reason and cases
    for (optimizer, status, reason), rows in missing.groupby(
        ["optimizer", "status", "reason"], sort=False
    ):
        cases = tuple(rows.case) if len(rows) < every else ()
        words = f"WRONG: {reason}" if status == WRONG else reason
        alike.setdefault((words, *cases), []).append(optimizer)
    return [
        f"{', '.join(optimizers)}: {reason}" + f" ({'; '.join(cases)})" * bool(cases)
        for (reason, *cases), optimizers in alike.items()
    ]
