"""Pages made of results: `python -m bench publish [FOLDER ...]`.

Writes README.md and pictures beside each results.json. Without a folder: of all in bench/results,
and the part of the project's README between the markers of `bench`. --check writes nothing, and
fails where a page is not what its results give.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import cases, goals, plots, tables
from .cases import COLD, NEW, model, size, small
from .optimizers import OPTIMIZERS
from .results import FILE, RESULTS, ROOT, frame, insert

README = ROOT / "README.md"
THOUSAND = small(1000)
MAIN = [
    *(size(power) for power in (10, 14, 18, 20, 22, 26, 28, 30)),
    *(THOUSAND, THOUSAND + NEW, THOUSAND + NEW + COLD),
    *(model(name) for name in ("ResNet-50", "GPT-2 124M", "Llama 3.2 1B")),
    *(cases.OFFLOAD, cases.OFFLOAD_HALF),
    *(size(26, "bfloat16"), model("GPT-2 124M", "bfloat16")),
    *(cases.TRANSFORMER, cases.CONVNET),
]
HOW = """\
Medians of whole steps. Ours with their share of what memory can do: a loop (on a GPU, a copy) that
moves as many bytes, in the same rounds. The others with their time against ours."""
GROWTH = """\
Lines fitted to float32: elements of one tensor from 2^22 on, and tensors of 64. Extra bytes are
those beyond parameters, gradients and two moments."""
NOTES = "\\* The device waited for the host: more launches than its queue holds."
NOTHING = "Nothing has been measured yet: `python -m bench report --full` does."


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench publish", description=__doc__.split(":")[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if pages differ")
    args = parser.parse_args(arguments)
    published = sorted(file.parent for file in RESULTS.glob(f"*/{FILE}"))
    found = {
        folder: json.loads((folder / FILE).read_text()) for folder in args.folders or published
    }
    pages = {folder / "README.md": page(results) for folder, results in found.items()}
    if not args.folders:
        pages[README] = insert(README.read_text(), "bench", readme_part(found))
    differing = {
        file: text for file, text in pages.items() if not file.exists() or file.read_text() != text
    }
    for file, text in differing.items():
        print(f"{file}: not what its results give" if args.check else file)
        if not args.check:
            file.write_text(text)
    if args.check:
        return int(bool(differing))
    for folder, results in found.items():
        print(*plots.draw(results, folder), sep="\n")
    return 0


def readme_part(found: Mapping[Path, dict[str, Any]]) -> str:
    """Six rows for each machine, and where they come from; dry runs tell nothing."""
    parts = []
    for folder, results in found.items():
        if results["dry_run"]:
            continue
        gpu = results["set"] == "gpu"
        rows = [
            size(26),
            THOUSAND + NEW + COLD * (not gpu),  # a GPU's caches are cold anyway
            *(model("ResNet-50"), model("GPT-2 124M"), model("GPT-2 124M", "bfloat16")),
            cases.TRANSFORMER,
        ]
        link = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
        parts += [
            tables.comparison(frame(results), rows, _columns(gpu)),
            f"{tables.machine(results)}: [all of it]({link.as_posix()}/README.md).",
        ]
    return "\n\n".join(part for part in parts if part) or NOTHING


def page(results: dict[str, Any]) -> str:
    """All that was measured on a machine."""
    table, gpu = frame(results), results["set"] == "gpu"
    every = table.case.unique()
    columns = [*_columns(gpu), *(row.name for row in OPTIMIZERS if row.form == "half")]
    parts = [
        f"# {results['device' if gpu else 'cpu']['name']}",
        f"`python -m bench publish` made this of [{FILE}]({FILE}). {tables.machine(results)}.",
        "**A dry run: these numbers say nothing.**" * results["dry_run"],
        "**The run was interrupted: some cases are missing.**" * results["interrupted"],
        f"{HOW}\n\n{tables.comparison(table, MAIN, columns)}\n\n{NOTES}",
        "\n\n".join(f"![{title}]({name}.png)" for name, (title, _) in plots.PICTURES.items()),
        f"## Every case\n\n{tables.LEGEND}",
        *(tables.case_table(table[table.case == case]) for case in every),
        f"## As work grows\n\n{GROWTH}\n\n{tables.growth_table(table)}",
        f"## Goals\n\n{goals.lines(table, 'cuda' if gpu else 'cpu')}",
        f"## Left out\n\n{tables.left_out(table)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _columns(gpu: bool) -> list[str]:
    """What a machine's first table compares."""
    kind = "cuda" if gpu else "cpu"
    rows = (row for row in OPTIMIZERS if row.level < 2 and not row.form)
    return [row.name for row in rows if not row.backend or kind in row.kinds]
