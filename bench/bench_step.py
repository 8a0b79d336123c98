"""One step of every optimizer, case by case: `pytest bench --benchmark-only`.

A quick selection; --all takes everything, -k selects by words of the ids. On a GPU the times
include the wait for it; bench/gpu_time.py has the device's own. No RAdam is timed before one step
of it has been held to the formula in float64.
"""

import gc
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench.cases import ALL_DTYPES, Case, all_cases
from bench.contenders import QUICK, Contender, everyone
from bench.formula import wrong
from bench.gpu_time import fault
from bench.limits import Limit, synchronized
from bench.memory import left_out
from bench.others import Others

pytest.importorskip("pytest_benchmark", reason="pip install -e '.[bench]' brings pytest-benchmark")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
QUICK_CASES = {
    "float32": {"one_1K", "one_16K", "one_256K", "one_4M", "one_64M", "1000_of_64", "ResNet-50"},
    "bfloat16": {"one_16K", "one_64M", "ResNet-50"},
    "float64": {"one_4M"},
}


class Row(NamedTuple):
    """What is measured by one test."""

    device: str
    dtype: str
    key: str
    case: Case
    contender: Contender

    @property
    def quick(self) -> bool:
        telling = self.contender.make is None or self.contender.name in QUICK
        return telling and self.key in QUICK_CASES[self.dtype]

    @property
    def id(self) -> str:
        name = re.sub(r"[^\w.]+", "_", self.contender.name).strip("_")
        return f"{self.device}-{self.dtype}-{self.key}-{name}"


def rows() -> Iterator[Row]:
    """All there are; those of a case one after another."""
    for device in DEVICES:
        for dtype in ALL_DTYPES:
            for key, case in all_cases(dtype).items():
                for contender in everyone(case.dtype, device):
                    yield Row(device, dtype, key, case, contender)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    everything = metafunc.config.getoption("all", False)
    chosen = [row for row in rows() if everything or row.quick]
    metafunc.parametrize("row", chosen, ids=[row.id for row in chosen])


class Tensors:
    """The parameters of one case at a time: making large ones takes longer than stepping them."""

    def __init__(self) -> None:
        self._of, self._params = ("", ""), []

    def held(self, row: Row) -> int:
        """Bytes that are there already; what another case has is given back."""
        if self._of != (row.device, row.case.name):
            self.forget()
        return 2 * sum(param.nbytes for param in self._params)

    def of(self, row: Row) -> list[Tensor]:
        if not self.held(row):
            self._params = row.case.make(torch.device(row.device))
            self._of = (row.device, row.case.name)
        return self._params

    def forget(self) -> None:
        self._of, self._params = ("", ""), []
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def tensors() -> Iterator[Tensors]:
    kept = Tensors()
    yield kept
    kept.forget()


@cache
def _fault(name: str, device: str, dtype: torch.dtype) -> dict[str, str] | None:
    contender = next(c for c in everyone(dtype, device) if c.name == name)
    return fault(contender, torch.device(device), dtype)


def check(row: Row, held: int = 0) -> None:
    """Skips what can't run here beside `held` bytes of it; fails what runs and is wrong."""
    contender, device = row.contender, torch.device(row.device)
    if reason := left_out(row.case, contender, device, held):
        pytest.skip(reason)
    if contender.radam and (found := _fault(contender.name, row.device, row.case.dtype)):
        if "wrong" in found:
            pytest.fail(found["wrong"])
        pytest.skip(found["not_measured"])


@pytest.mark.benchmark(disable_gc=True, min_rounds=5, max_time=0.4, warmup=False)
def test_step(row: Row, benchmark, tensors: Tensors, found: list[dict]) -> None:
    contender, case = row.contender, row.case
    benchmark.group = f"{row.device}, {case.name}"
    benchmark.params = {**row._asdict(), "case": case.name, "contender": contender.name}
    check(row, tensors.held(row))
    params = tensors.of(row)
    try:
        measure(row, params, benchmark)
        if "gb_s" in benchmark.extra_info:
            head = {"group": benchmark.group, "name": contender.name}
            found.append({**head, "median": benchmark.stats.stats.median, **benchmark.extra_info})
    finally:
        if contender.flat:
            tensors.forget()
        gc.collect()  # optimizers are in cycles


def measure(row: Row, params: list[Tensor], benchmark) -> None:
    """A step in pytest-benchmark's rounds, between passes of the limit."""
    contender, case = row.contender, row.case
    started = None
    if contender.make is not None:
        try:
            started = contender.start(params)
        except (NotImplementedError, ImportError, torch.OutOfMemoryError) as error:
            pytest.skip(f"{type(error).__name__}: {error}".partition("\n")[0])
    optimizer = started and started.optimizer
    if contender.radam:
        found = wrong(optimizer, started.step, params, contender.debiased, contender.slack)
        assert found is None, found
    limit = Limit(contender, params, optimizer)
    if started is None and limit.absent:
        pytest.skip(limit.absent)
    step = started.step if started else limit.run
    if started and row.device == "cuda":
        step = synchronized(step)
    limit.measure()
    with Others() as others:
        benchmark(step)
    limit.measure()
    facts = {
        "elements": case.elements,
        "tensors": len(case.shapes),
        "cores_of_others": others.cores,
    }
    if benchmark.stats:  # none under --benchmark-disable
        median = benchmark.stats.stats.median
        facts.update(limit.against(median, contender.bytes * case.elements))
    benchmark.extra_info.update(facts)
