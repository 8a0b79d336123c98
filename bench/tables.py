"""Results as tables in markdown and lines of text."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from .correctness import MEASURED, WRONG
from .growth import growth
from .optimizers import BY_NAME
from .timing import DISTURBED

MOST_NAMES = 6  # of cases in a line of what was left out
# Of a case's table, where it has them: titles, and factors.
COLUMNS = {
    "optimizer": ("optimizer", 1),
    "ms": ("step (ms)", 1),
    "ms_p20": ("p20", 1),
    "ms_p80": ("p80", 1),
    "host_us": ("host (us)", 1),
    "gb_s": ("GB/s", 1),
    "limit_share": ("% of limit", 100),
    "vs_adam_fused": ("x Adam", 1),
    "vs_radam_foreach": ("x RAdam", 1),
    "vs_plain": ("x plain tensors", 1),
    "vs_float32": ("x float32", 1),
    "step_share": ("% of training", 100),
    "extra_bytes": ("extra (MB)", 1e-6),
    "note": ("note", 1),
}
GROWTH = {  # titles; what was fitted, which part of the line, and a factor
    "ps an element": (("ms", "elements"), "each", 1e9),
    "us a step": (("ms", "tensors"), "fixed", 1e3),
    "us a tensor": (("ms", "tensors"), "each", 1e3),
    "extra bytes an element": (("extra_bytes", "elements"), "each", 1),
    "extra bytes a tensor": (("extra_bytes", "tensors"), "each", 1),
}
LEGEND = """\
step: the median; p20 and p80 hold the middle three fifths. GB/s: of the bytes that the algorithm
must move. % of limit: of what a loop (on a GPU, a copy) reaches that only moves as many bytes, in
the same rounds. x Adam and x RAdam: how many times as fast as torch.optim.Adam(fused=True) and
torch.optim.RAdam(foreach=True); x plain tensors: as ours on tensors that are not sharded; x
float32: as ours on as many float32 parameters. extra:
memory beyond parameters, gradients and moments.
(!) Other processes were at work meanwhile: measure it again."""


def machine(results: dict[str, Any]) -> str:
    """What was measured, on what, when."""
    device, host, versions = results["device"], results["cpu"], results["versions"]
    if "driver" in device:
        parts = [device["name"], f"driver {device['driver']}"]
        parts += [f"CUDA {versions['cuda runtime of the kernels']}", f"triton {versions['triton']}"]
    else:
        parts = [host["name"], f"{host['threads']} threads", host["instruction_set"]]
    parts += [f"torch {versions['torch']}", results["date"][:10]]
    return f"{', '.join(parts)}, commit {results['commit']}, sources {results['sources']}"


def duration(seconds: float) -> str:
    """Three digits and a unit: 7.21 us."""
    units = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))
    unit, size = next((u for u in units if abs(seconds) >= 0.9995 * u[1]), units[-1])
    number = seconds / size
    return f"{number:.0f} {unit}" if abs(number) >= 99.95 else f"{number:#.3g} {unit}"


def times(ratio: float) -> str:
    """Three digits: 43.3x, 5.66x."""
    return f"{ratio:.{1 + (ratio < 9.995)}f}x"


def markdown(table: pd.DataFrame) -> str:
    """Nothing for no rows."""
    if table.empty:
        return ""
    table = table.astype(object).where(table.notna(), None)
    return table.to_markdown(index=False, floatfmt=".4g", missingval="")


def case_table(frame: pd.DataFrame) -> str:
    """All that was measured of a case, under its name."""
    if frame.empty:
        return ""
    title = _title(frame.iloc[0])
    frame = frame[frame.status == MEASURED]
    shown = {key: column for key, column in COLUMNS.items() if key in frame}
    table = pd.DataFrame({t: frame[key] * factor for key, (t, factor) in shown.items()})
    return f"**{title}**\n\n{markdown(table.dropna(axis='columns', how='all'))}"


def comparison(frame: pd.DataFrame, cases: Sequence[str], optimizers: Sequence[str]) -> str:
    """A row for each case; a column for each optimizer that was measured, the first is ours."""
    frame = frame[frame.case.isin(cases) & frame.optimizer.isin(optimizers)]
    measured = set(frame[frame.status == MEASURED].optimizer)
    columns = [name for name in optimizers if name in measured]
    lines = []
    for case in cases:
        rows = {row.optimizer: row for _, row in frame[frame.case == case].iterrows()}
        if rows:
            title = _title(next(iter(rows.values()))).replace(" float32", "")
            cells = {name: _cell(rows.get(name), rows.get(columns[0])) for name in columns}
            lines.append({"step of": title, **cells})
    return markdown(pd.DataFrame(lines))


def _title(row: pd.Series) -> str:
    return row.case + "  (!)" * bool(row.get("cores_of_others", 0) > DISTURBED)


def _cell(row: pd.Series | None, ours: pd.Series | None) -> str:
    """The median; for ours the share of the limit, for others the time against ours."""
    if row is None:
        return ""
    if row.status != MEASURED:
        return "**wrong**" if row.status == WRONG else "not measured"
    text = duration(row.ms / 1e3) + "*" * (row.get("host_bound") is True)
    if BY_NAME[row.optimizer].backend:
        share = row.get("limit_share")
        return text if pd.isna(share) else f"{text}, {share:.0%}"
    return f"{text}, {times(row.ms / ours.ms)}" if ours.status == MEASURED else text


def growth_table(frame: pd.DataFrame) -> str:
    """Costs as work grows, for each optimizer with points enough."""
    lines = []
    for name in frame.optimizer.unique():
        lines_of = {key: line for key, line in growth(frame, name).items() if line}
        cells = {
            title: factor * getattr(lines_of[key], part)
            for title, (key, part, factor) in GROWTH.items()
            if key in lines_of
        }
        errors = [line.error for (cost, _), line in lines_of.items() if cost == "ms"]
        if cells:
            lines.append({"": name, **cells, "off by (%)": 100 * max(errors, default=0)})
    return markdown(pd.DataFrame(lines))


def left_out(frame: pd.DataFrame) -> str:
    """What was not measured, why, and where; a case that one reason left out is listed once."""
    absent = frame.status != MEASURED
    if not absent.any():
        return "Nothing."
    whole = absent & (frame.groupby("case").reason.transform("nunique") == 1)
    missing = frame.assign(optimizer=frame.optimizer.mask(whole, "every optimizer"))[absent]
    tried = set(frame[~whole].case)
    cases = missing.groupby(["optimizer", "status", "reason"], sort=False).case.unique()
    where = cases.map(lambda names: _where(names, tried))
    alike = where.reset_index().groupby(["status", "reason", "case"], sort=False).optimizer
    return "\n".join(
        f"- {', '.join(names)}: {'WRONG: ' * (status == WRONG)}{reason} ({where_})"
        for (status, reason, where_), names in alike
    )


def _where(names: Sequence[str], tried: set[str]) -> str:
    if set(names) == tried:
        return "every case"
    if len(names) > MOST_NAMES and tried.issuperset(names):
        return f"{len(names)} of {len(tried)} cases"
    return "; ".join(names)
