"""The parts of a page that a command writes: between `<!-- name:begin -->` and its end."""

import argparse
from collections.abc import Callable, Sequence

from .folders import ROOT

README = ROOT / "README.md"


def insert(text: str, name: str, part: str) -> str:
    """The text with the part between the markers of that name; ValueError if there are none."""
    begins, ends = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begin, rest = text.partition(begins)
    _, end, after = rest.partition(ends)
    if not begin or not end:
        raise ValueError(f"expected the lines {begins} and {ends} in the page; put them there")
    return f"{before}{begins}\n{part}\n{ends}{after}"


def command(
    description: str, name: str, part: Callable[[], str], arguments: Sequence[str] | None
) -> int:
    """What a command does that has a part of the README."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--write", action="store_true", help="into README.md, not to the screen")
    args = parser.parse_args(arguments)
    if args.write:
        README.write_text(insert(README.read_text(), name, part()))
    else:
        print(part())
    return 0
