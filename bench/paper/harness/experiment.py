"""Types: an experiment is a set of independent runs, verdicts on their rows, and a figure."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # workers import this module before any library that starts threads
    import pandas as pd
    from matplotlib.figure import Figure

Row = dict[str, float | int | str]


class Run(NamedTuple):
    """`function(**arguments)` returns rows of the experiment's table.

    It executes in a worker process with one thread, which imports `function` by its name. All
    random numbers are seeded from the arguments.
    """

    function: Callable[..., list[Row]]
    arguments: dict[str, Any]  # JSON types

    @property
    def key(self) -> str:
        """Identifies the run within its experiment; readable, and valid as a file name."""
        arguments = ",".join(f"{name}={value}" for name, value in self.arguments.items())
        return re.sub(r"[^\w.,=+-]+", "-", f"{self.function.__name__},{arguments}")


class Verdict(NamedTuple):
    """What the rows say about one statement."""

    supported: bool | None  # None: these runs cannot tell
    words: str  # the statement, with the measured numbers


class Experiment(NamedTuple):
    """A claim, and what it takes to test it."""

    name: str  # on the command line and in file names
    title: str
    claim: str  # one sentence, with the paper's section or the source
    runs: Callable[[bool], list[Run]]  # argument: quick mode
    judge: Callable[[pd.DataFrame, bool], list[Verdict]]  # arguments: all rows, quick mode
    draw: Callable[[pd.DataFrame], Figure]
    table: Callable[[pd.DataFrame], pd.DataFrame] | None = None  # a summary for the page

    @classmethod
    def from_module(cls, module: ModuleType) -> Experiment:
        """The experiment that a module of that name defines at its top level."""
        return cls(
            module.__name__.rpartition(".")[2],
            module.TITLE,
            module.CLAIM,
            module.runs,
            module.judge,
            module.draw,
            getattr(module, "table", None),
        )
