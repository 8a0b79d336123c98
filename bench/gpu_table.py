"""Turns results of GPUs into the README's table: `python -m bench.gpu_table [--write]`."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from radam_kernels.fingerprint import measured_fingerprint

from .cases import model_case, size_case
from .contenders import ADAM, CUDA, CUDA16, RADAM, TRITON
from .folders import RESULTS, ROOT
from .markers import command
from .models import MODELS

Rows = dict[str, dict[str, Any]]
Cell = Callable[[Rows, str], str]

NAME = "gpu-table"  # of the markers
SIZES = (20, 26, 28, 30)
NOTHING = (
    "No number on a GPU has been measured yet: `bench/gpu_report.sh` measures them on a machine "
    "that has one, and\n`python -m bench.gpu_table --write` puts them here."
)
COLUMNS = {
    "float32": (CUDA, TRITON, RADAM, ADAM),
    "bfloat16": (CUDA, CUDA16, TRITON, RADAM, ADAM),
}
OURS = {CUDA, CUDA16, TRITON}
LISTS = [model_case(model, "float32") for model in MODELS]


def main(arguments: list[str] | None = None) -> int:
    return command(__doc__.partition(":")[0], NAME, table, arguments)


def table() -> str:
    """What stands in the README."""
    return render(read(RESULTS), measured_fingerprint(ROOT) or "unknown")


def read(folder: Path) -> list[dict[str, Any]]:
    """The results of every device but for dry runs, which say nothing of a GPU."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*/gpu.json"))]
    return [results for results in found if not results["dry_run"]]


def render(every: list[dict[str, Any]], sources: str) -> str:
    """The tables of all devices; `sources` is the fingerprint of the sources that are here."""
    return "\n\n".join(_device(results, sources) for results in every) or NOTHING


def _device(results: dict[str, Any], sources: str) -> str:
    device, versions, cases = results["device"], results["versions"], results["cases"]
    rows = [row for case in cases.values() for row in case["rows"].items()]
    copies = [row["gb_s"] for name, row in rows if name.startswith("copy") and "gb_s" in row]
    parts = [
        f"**{device['name']}**, driver {device['driver']}, CUDA "
        f"{versions['cuda runtime of the kernels']}, torch {versions['torch']}, triton "
        f"{versions['triton']}, {results['date'][:10]}, commit {results['commit']}, sources "
        f"{results['sources']}; a copy moves up to {max(copies, default=0):.0f} GB/s.",
        "Whole steps on the device, medians, caches emptied before each; for ours the share of a "
        "copy that moves as many bytes,\nfor torch's the time against the first column:",
    ]
    if results["sources"] != sources:
        parts.insert(1, f"**stale**: measured on sources {results['sources']}, these are {sources}")
    for dtype, columns in COLUMNS.items():
        names = [size_case(power, dtype) for power in SIZES]
        names += [model_case(model, dtype) for model in MODELS]
        parts += _table(cases, names, dtype, columns, _device_cell)
    if host := _table(cases, LISTS, "float32", (CUDA, TRITON, RADAM, ADAM), _host_cell):
        parts += ["The host's time in the same calls, gradients held / new at each step:", *host]
    if any(row.get("host_bound") for _, row in rows):
        parts.append("* The device waited for the host: more launches than its queue holds.")
    return "\n\n".join(parts)


def _table(
    cases: dict[str, Any], names: list[str], dtype: str, columns: Sequence[str], cell: Cell
) -> list[str]:
    """A markdown table of the cases that are there; nothing where there are none."""
    lines = [f"| {dtype} | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for name in names:
        if name in cases:
            cells = [cell(cases[name]["rows"], column) for column in columns]
            lines.append(f"| {name.removesuffix(f' {dtype}')} | {' | '.join(cells)} |")
    return ["\n".join(lines)] if len(lines) > 2 else []


def _device_cell(rows: Rows, column: str) -> str:
    if not (milliseconds := _median(rows, column, "device_ms")):
        return _absent(rows, column)
    text = f"{milliseconds:.3g} ms" + "*" * rows[column]["host_bound"]
    if column in OURS:
        share = rows[column]["copy_share"]
        return text + (f", {share:.0%}" if share else "")
    ours = _median(rows, CUDA, "device_ms")
    return text + (f", {milliseconds / ours:.2f}x" if ours else "")


def _host_cell(rows: Rows, column: str) -> str:
    if not (held := _median(rows, column, "host_us")):
        return _absent(rows, column)
    new = _median(rows, column, "host_new_us")
    return f"{held:.0f} / {new:.0f} us" if new else f"{held:.0f} us"


def _median(rows: Rows, column: str, key: str) -> float | None:
    return rows.get(column, {}).get(key, {}).get("median")


def _absent(rows: Rows, column: str) -> str:
    return "**wrong**" if "wrong" in rows.get(column, {}) else "not measured"


if __name__ == "__main__":
    sys.exit(main())
