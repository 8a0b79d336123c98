"""Single cases under pytest-benchmark: `pytest bench -k '2_20_float32 and radam_kernels'`.

Without -m '' only the cases and optimizers of a quick report can be selected.
"""

import re
from functools import cache

import pytest
import torch

from bench.cases import Case, all_cases
from bench.correctness import WRONG, refusals, wrong
from bench.optimizers import Optimizer, select
from bench.timing import left_out

KIND = "cuda" if torch.cuda.is_available() else "cpu"
DEVICE = torch.device(KIND)


def _params() -> list:
    """An id for each case and optimizer, of words that -k takes."""
    return [
        pytest.param(
            case,
            row,
            id=re.sub(r"\W+", "_", f"{case.name} {row.name}"),
            marks=() if "quick" in case.sets and row.level < 2 else pytest.mark.slow,
        )
        for case in all_cases()
        if case.kind == "step"
        for row in select(case.dtype, KIND, 2)
    ]


@cache
def _refused(row: Optimizer, dtype: torch.dtype) -> dict[str, str]:
    return refusals([row], DEVICE, dtype).get(row.name, {})


@pytest.mark.benchmark(disable_gc=True, min_rounds=5, max_time=0.5, warmup=False)
@pytest.mark.parametrize(("case", "row"), _params())
def test_step(case: Case, row: Optimizer, benchmark) -> None:
    """No RAdam is timed before its step agrees with the formula."""
    if reason := left_out(case, row, KIND):
        pytest.skip(reason)
    if refused := _refused(row, case.dtype):
        (pytest.fail if refused["status"] == WRONG else pytest.skip)(refused["reason"])
    session = row.start(case.make(DEVICE))
    assert not row.radam or (fault := wrong(row, session)) is None, fault

    def step() -> None:
        session.step()
        if KIND == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.name} on {KIND}"
    benchmark(step)
    moved = case.elements * case.moved(row.traffic)
    if benchmark.stats:  # none under --benchmark-disable
        benchmark.extra_info["gb_s"] = moved / benchmark.stats.stats.median / 1e9
