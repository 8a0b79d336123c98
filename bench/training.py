"""Steps within training, where forward and backward leave the caches as they like.

Each optimizer trains a model of its own from the same seed; they take turns of one iteration.
"""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .cases import TRANSFORMER, Case
from .correctness import NOT_MEASURED, brief
from .optimizers import DRY_RUN, WARM_UP, Optimizer
from .timing import OtherWork, Row, compare, describe, numbers, refusal, spread

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
    """A model and its optimizer, warmed up; seconds of its steps and iterations."""

    def __init__(self, case: Case, row: Optimizer, device: torch.device, dry_run: bool) -> None:
        torch.manual_seed(0)
        model, batch = transformer() if case.name == TRANSFORMER else convnet()
        self._model, self._batch = model.to(device), batch[: 1 if dry_run else None].to(device)
        self._device, self._traffic = device, row.traffic(case.dtype.itemsize)
        self._params = list(model.parameters())
        self._optimizer = row.make(self._params, LR)
        self._steps: list[float] = []
        self._iterations: list[float] = []
        for _ in range(WARM_UP):
            self.iterate()
        self._steps.clear()
        self._iterations.clear()

    def iterate(self) -> None:
        """Times a step, and all of the iteration; on a GPU from an idle device to the end."""
        begin = self._now()
        self._optimizer.zero_grad()
        self._model(self._batch).square().mean().backward()
        before = self._now()
        self._optimizer.step()
        end = self._now()
        self._steps.append(end - before)
        self._iterations.append(end - begin)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def row(self) -> Row:
        elements = sum(param.numel() for param in self._params)
        moved = self._traffic * elements
        row = {"elements": elements, "tensors": len(self._params), "bytes": moved}
        row |= numbers(moved, self._steps) | spread(self._iterations, 1e3, "iteration_ms")
        return {**row, "step_share": row["ms"] / row["iteration_ms"]}


def measure(
    case: Case,
    optimizers: Sequence[Optimizer],
    device: torch.device,
    *,
    seconds: float,
    deadline: float,
    refused: Mapping[str, Row],
    dry_run: bool,
) -> list[Row]:
    """As bench.timing.measure; `ms` is of the step."""
    why: dict[str, Row] = {}
    trainees: dict[str, _Trainee] = {}
    kind = DRY_RUN if dry_run else device.type
    with OtherWork() as others:
        for row in optimizers:
            if reason := refusal(case, row, kind, refused, deadline):
                why[row.name] = reason
                continue
            try:
                trainees[row.name] = _Trainee(case, row, device, dry_run)
            except Exception as error:
                why[row.name] = {"status": NOT_MEASURED, "reason": brief(error)}
        end, rounds = min(time.monotonic() + seconds, deadline), 0
        while trainees and (rounds < (1 if dry_run else LEAST) or time.monotonic() < end):
            for trainee in trainees.values():
                trainee.iterate()
            rounds += 1
    facts = {**describe(case), "gradients": "new", "caches": "training", "rounds": rounds}
    facts["cores_of_others"] = others.cores
    return compare(
        [
            {**facts, "optimizer": row.name, **(why.get(row.name) or trainees[row.name].row())}
            for row in optimizers
        ]
    )
