"""Steps within training, where forward and backward leave the caches as they like.

Each optimizer trains a model of its own from the same seed; they take turns of one iteration.
"""

import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .cases import TRANSFORMER, Case
from .correctness import NOT_MEASURED, brief
from .optimizers import DRY_RUN, WARM_UP, Optimizer
from .timing import OUT_OF_TIME, OtherWork, Row, compare, describe, left_out, numbers, spread

LEAST = 5  # iterations of each optimizer, after those of the warm-up
LR = 1e-4


def transformer() -> tuple[nn.Module, Tensor]:
    """Four layers of width 256 on 4 sequences of 64: 3.2 M parameters in 48 tensors."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), torch.randn(4, 64, 256)


def convnet() -> tuple[nn.Module, Tensor]:
    """Eight convolutions with batch norm on 16 images of 32 pixels: 1.2 M in 26 tensors."""
    layers, channels = [], 3
    for i, width in enumerate((32, 32, 64, 64, 128, 128, 256, 256)):
        convolution = nn.Conv2d(channels, width, 3, stride=1 + i % 2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10)), torch.randn(16, 3, 32, 32)


class _Trainee:
    def __init__(self, case: Case, row: Optimizer, device: torch.device, dry_run: bool) -> None:
        torch.manual_seed(0)
        model, batch = transformer() if case.name == TRANSFORMER else convnet()
        self._model, self._batch = model.to(device), batch[: 1 if dry_run else None].to(device)
        self._device = device
        self._optimizer = row.make(list(model.parameters()), LR)
        for _ in range(WARM_UP):
            self.iterate()
        self.steps: list[float] = []
        self.iterations: list[float] = []

    def iterate(self) -> tuple[float, float]:
        """Seconds of the step, and of all; on a GPU from an idle device to the end."""
        begin = self._now()
        self._optimizer.zero_grad()
        self._model(self._batch).square().mean().backward()
        before = self._now()
        self._optimizer.step()
        end = self._now()
        return end - before, end - begin

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def row(self, traffic: int) -> Row:
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        elements = sum(param.numel() for param in params)
        row = {"elements": elements, "tensors": len(params), "bytes": traffic * elements}
        row |= numbers(row["bytes"], self.steps) | spread(self.iterations, 1e3, "iteration_ms")
        return {**row, "step_share": row["ms"] / row["iteration_ms"]}


def measure(
    case: Case,
    optimizers: Sequence[Optimizer],
    device: torch.device,
    *,
    seconds: float,
    deadline: float = math.inf,
    refused: Mapping[str, Row] | None = None,
    dry_run: bool = False,
) -> list[Row]:
    """As bench.timing.measure; `ms` is of the step."""
    rows: dict[str, Row] = {}
    trainees: dict[str, _Trainee] = {}
    with OtherWork() as others:
        for row in optimizers:
            reason = left_out(case, row, DRY_RUN if dry_run else device.type)
            if row.level > 1 or row.form:
                reason = "time: not measured within training"
            elif time.monotonic() > deadline:
                reason = OUT_OF_TIME
            rows[row.name] = {"status": NOT_MEASURED, "reason": reason}
            rows[row.name] |= (refused or {}).get(row.name, {})
            if not rows[row.name]["reason"]:
                try:
                    trainees[row.name] = _Trainee(case, row, device, dry_run)
                except Exception as error:
                    rows[row.name]["reason"] = brief(error)
        begin, rounds = time.monotonic(), 0
        while rounds < (1 if dry_run else LEAST) or time.monotonic() < begin + seconds:
            for trainee in trainees.values():
                step, iteration = trainee.iterate()
                trainee.steps.append(step)
                trainee.iterations.append(iteration)
            rounds += 1
    for row in optimizers:
        if row.name in trainees:
            rows[row.name] = trainees[row.name].row(row.traffic(case.dtype.itemsize))
    facts = {**describe(case), "gradients": "new", "caches": "training", "rounds": rounds}
    facts["cores_of_others"] = others.cores
    return compare([{**facts, "optimizer": name, **row} for name, row in rows.items()])
