"""Single cases under pytest-benchmark: `pytest bench -k '2_20_float32 and radam_kernels'`.

Without -m '' only the cases and optimizers of a quick report can be selected.
"""

import re

import pytest
import torch

from bench.cases import Case, all_cases
from bench.correctness import check, wrong
from bench.optimizers import Optimizer, select
from bench.timing import left_out

KIND = "cuda" if torch.cuda.is_available() else "cpu"
DEVICE = torch.device(KIND)


CASES = [
    pytest.param(
        case,
        row,
        id=re.sub(r"\W+", "_", f"{case.name} {row.name}"),  # words that -k takes
        marks=() if "quick" in case.sets and row.level < 2 else pytest.mark.slow,
    )
    for case in all_cases()
    if case.kind == "step"
    for row in select(case.dtype, KIND, 2)
]


@pytest.mark.benchmark(disable_gc=True, min_rounds=5, max_time=0.5, warmup=False)
@pytest.mark.parametrize(("case", "row"), CASES)
def test_step(case: Case, row: Optimizer, benchmark) -> None:
    """No RAdam is timed before its step agrees with the formula."""
    if reason := left_out(case, row, KIND):
        pytest.skip(reason)
    session = row.start(case.make(DEVICE))
    if row.radam:
        assert check(row, DEVICE, case.dtype) is None
        assert wrong(row, session) is None

    def step() -> None:
        session.step()
        if KIND == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.name} on {KIND}"
    benchmark(step)
    moved = case.elements * case.moved(row.traffic)
    if benchmark.stats:  # none under --benchmark-disable
        benchmark.extra_info["gb_s"] = moved / benchmark.stats.stats.median / 1e9
