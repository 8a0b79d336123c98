"""What an experiment is: independent runs that give rows, a judgement of them, and a figure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Value = float | int | str
Row = dict[str, Value]


class Run(NamedTuple):
    """One process's work: `function(**arguments)` gives rows of the experiment's table.

    `function` is found by its module and name, in another process, and has one thread. What is
    random in it follows from its arguments alone.
    """

    key: str  # readable, and the run's own within its experiment: it names a file
    function: Callable[..., list[Row]]
    arguments: dict[str, Any]  # as JSON has them


class Verdict(NamedTuple):
    """What the rows say of one claim."""

    supported: bool | None  # None: these runs cannot tell
    words: str  # with the numbers in it


class Experiment(NamedTuple):
    """A claim, and what it takes to see whether it holds."""

    name: str  # on the command line, and of its files
    title: str
    claim: str  # one sentence, with the paper's section or the source
    runs: Callable[[bool], list[Run]]  # of quick or full mode
    judge: Callable[[pd.DataFrame, bool], list[Verdict]]  # the rows of all runs, and whether quick
    draw: Callable[[pd.DataFrame], Figure]
    table: Callable[[pd.DataFrame], pd.DataFrame] | None = None  # a small one, for the page
