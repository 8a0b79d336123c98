"""Turns reports of CPUs into the README's section: `python -m bench.cpu_table [--write]`."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from radam_kernels.fingerprint import measured_fingerprint

from . import aims
from .cases import COLD, NEW, list_case, model_case, size_case
from .contenders import ADAM, CPU, CPU16, OPTIMI, PYTORCH_OPTIMIZER, RADAM
from .folders import RESULTS, ROOT
from .markers import command
from .report import FILE
from .report_files import PICTURES
from .report_lines import GROWTH, disturbed, duration, growth_rows, left_out, machine_lines, times

Cell = Callable[[dict[str, Any], str, str], str]  # of rows, a column and our column

NAME = "cpu-report"  # of the markers
COLUMNS = (CPU, RADAM, ADAM, OPTIMI, PYTORCH_OPTIMIZER)
SMALL = list_case(1000, "float32")
TELLING = [
    *(size_case(power, "float32") for power in (10, 14, 18, 22, 26, 28)),
    *(SMALL, SMALL + NEW, SMALL + NEW + COLD),
    *(model_case(model, "float32") for model in ("ResNet-50", "GPT-2 124M")),
    size_case(26, "bfloat16"),
]
HALF = {", float32 moments": CPU, ", 16-bit moments": CPU16}  # of 16-bit parameters
NOTHING = (
    "No number of a CPU is here: `python -m bench.report --full` measures them, and "
    "`python -m bench.cpu_table --write` puts them here."
)
DISTURBED = "(!) Other processes were at work while this was measured."


def main(arguments: list[str] | None = None) -> int:
    return command(__doc__.partition(":")[0], NAME, section, arguments)


def section() -> str:
    """What stands in the README."""
    return render(read(RESULTS), measured_fingerprint(ROOT) or "unknown")


def read(folder: Path) -> dict[Path, dict[str, Any]]:
    """The reports of every machine, by their folders."""
    return {file.parent: json.loads(file.read_text()) for file in sorted(folder.glob(f"*/{FILE}"))}


def render(reports: dict[Path, dict[str, Any]], sources: str) -> str:
    """All of them; `sources` is the fingerprint of the sources that are here."""
    every = (_machine(results, folder, sources) for folder, results in reports.items())
    return "\n\n".join(every) or NOTHING


def _machine(results: dict[str, Any], folder: Path, sources: str) -> str:
    what, when = machine_lines(results)
    telling = [name for name in TELLING if name in results["cases"]]
    parts = [
        f"**{what}**; {when}.",
        "Medians of whole steps, float32 where nothing else is said. Ours with their share of what "
        "memory can do, which is a loop that\nstreams the same tensors in the same run; the others "
        "with their time against ours. A parameter of float32 moves 28 bytes, one\nof bfloat16 22, "
        "or 14 with moments of 16 bits, as torch's have.",
        _table("step of", COLUMNS, _rows(results, telling, _ratio)),
        *([DISTURBED] if any(disturbed(results["cases"][name]) for name in telling) else []),
        *(f"![{text}]({_relative(folder / f'{name}.png')})" for name, text in PICTURES.items()),
        "<details><summary>The cost as work grows, every case with its spread, the aims, and what "
        "was left out</summary>",
        "The cost as work grows, fitted: float32 elements of one tensor from 2^22 on, and tensors "
        "of 64. Memory is what a step takes\nbeyond parameters, gradients and two moments, at the "
        "peak of a process of its own.",
        _table("", GROWTH, growth_rows(results).items()),
        "Every case: the median, and in brackets the middle three fifths.",
        _table("step of", COLUMNS, _rows(results, results["cases"], _spread)),
        "What the kernels are meant to reach on a CPU:",
        "\n".join(f"- {title}: {said}" for title, said in aims.verdicts(results, CPU)),
        "Left out:",
        "\n".join(f"- {line}" for line in left_out(results) or ["nothing"]),
        "</details>",
    ]
    if results["sources"] != sources:
        parts.insert(1, f"**stale**: measured on sources {results['sources']}, these are {sources}")
    return "\n\n".join(parts)


def _relative(file: Path) -> str:
    """As README.md links to it."""
    return file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name


def _table(first: str, heads: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]]) -> str:
    lines = [[first, *heads], *([name, *cells] for name, cells in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rows(
    results: dict[str, Any], names: Iterable[str], cell: Cell
) -> Iterator[tuple[str, list[str]]]:
    """A row for each case; in 16 bits, one for each width of our moments."""
    for name in names:
        case = results["cases"][name]
        title = name.replace(" float32", "") + " (!)" * disturbed(case)
        kinds = HALF if "bfloat16" in name else {"": CPU}
        for words, ours in kinds.items():
            columns = (ours, *COLUMNS[1:])
            yield title + words, [cell(case["rows"], column, ours) for column in columns]


def _ratio(rows: dict[str, Any], column: str, ours: str) -> str:
    """The median, and what there is to hold against it."""
    row = rows.get(column, {})
    if "ms" not in row:
        return _absent(row)
    median = row["ms"]["median"]
    text = duration(median / 1e3)
    if column == ours:
        return text + (f", {row['share_of_limit']:.0%}" if "share_of_limit" in row else "")
    base = rows.get(ours, {}).get("ms")
    return text + (f", {times(median / base['median'])}" if base else "")


def _spread(rows: dict[str, Any], column: str, ours: str) -> str:
    row = rows.get(column, {})
    if "ms" not in row:
        return _absent(row)
    low, middle, high = (duration(row["ms"][key] / 1e3) for key in ("p20", "median", "p80"))
    return f"{middle} ({low}-{high})"


def _absent(row: dict[str, Any]) -> str:
    return "**wrong**" if "wrong" in row else "not measured"


if __name__ == "__main__":
    sys.exit(main())
