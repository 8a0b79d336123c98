"""What is measured: one tensor of each size, and the parameter lists of models; in which order."""

import re
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .models import ALL_MODELS, MODELS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALL_DTYPES = {**DTYPES, "float64": torch.float64}
# The most telling first: what comes last is what a lack of time costs.
FIRST, MIDDLE, REST = (26, 28), (20, 30), (24, 22, 18, 16, 14, 12, 10)
# Of all_cases.
POWERS = range(10, 30, 2)
NEW, COLD = ", gradients new", ", caches cold"  # in names of settings
TENSORS = (1, 10, 100, 1000, 10000)


class Case(NamedTuple):
    name: str
    dtype: torch.dtype
    shapes: Sequence[tuple[int, ...]]
    host: bool = False  # measure the host with gradients new at each step, too

    @property
    def elements(self) -> int:
        return sum(map(prod, self.shapes))

    def make(self, device: torch.device) -> list[Tensor]:
        """Parameters with gradients, random: zeros can run faster than real data."""
        params = []
        for shape in self.shapes:
            param = torch.randn(shape, dtype=self.dtype, device=device).requires_grad_()
            param.grad = torch.randn_like(param)
            params.append(param)
        return params


class Setting(NamedTuple):
    """A case, and how its steps find the memory."""

    case: Case
    new_gradients: bool = False  # at each step, as after zero_grad(set_to_none=True)
    cold: bool = False

    @property
    def name(self) -> str:
        return self.case.name + NEW * self.new_gradients + COLD * self.cold


def size_case(power: int, dtype: str) -> str:
    return f"2^{power} {dtype}"


def model_case(model: str, dtype: str) -> str:
    return f"{model} {dtype}"


def list_case(tensors: int, dtype: str) -> str:
    return f"{tensors:,} tensor{'s' * (tensors > 1)} of 64 {dtype}"


def renew_gradients(params: Sequence[Tensor]) -> None:
    """As zero_grad and a backward pass do: an old one lives until the new one does, elsewhere."""
    for param in params:
        param.grad = param.grad.clone()


def cases(dry_run: bool) -> list[Case]:
    """All of them in order; a dry run has the same names, and a few elements of each."""

    def sizes(powers: Sequence[int]) -> list[Case]:
        names = [(power, dtype) for power in powers for dtype in DTYPES]
        return [
            Case(size_case(power, d), DTYPES[d], [(power if dry_run else 1 << power,)])
            for power, d in names
        ]

    def models(dtype: str) -> list[Case]:
        return [
            Case(model_case(name, dtype), DTYPES[dtype], shapes(name), host=True) for name in MODELS
        ]

    def shapes(name: str) -> list[tuple[int, ...]]:
        found = list(MODELS[name].shapes().values())
        return [tuple(min(n, 3) for n in s) for s in found[:3]] if dry_run else found

    small = Case(
        list_case(1000, "float32"), torch.float32, [(64,)] * (3 if dry_run else 1000), host=True
    )
    return [
        *sizes(FIRST), *models("float32"), small, *models("bfloat16"), *sizes(MIDDLE), *sizes(REST)
    ]  # fmt: skip


def all_cases(dtype: str) -> dict[str, Case]:
    """What is measured at leisure, by names that `pytest -k` takes."""
    kind = ALL_DTYPES[dtype]
    sizes = {
        f"one_{_short(1 << power)}": Case(size_case(power, dtype), kind, [(1 << power,)])
        for power in POWERS
    }
    lists = {f"{n}_of_64": Case(list_case(n, dtype), kind, [(64,)] * n) for n in TENSORS}
    models = {
        re.sub(r"\W+", "-", name): Case(
            model_case(name, dtype), kind, list(model.shapes().values())
        )
        for name, model in ALL_MODELS.items()
    }
    return {**sizes, **lists, **models}


def _short(number: int) -> str:
    """1024 is 1K."""
    return f"{number >> 20}M" if number >> 20 else f"{number >> 10}K"
