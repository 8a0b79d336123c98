"""Steps within training, where forward and backward leave the caches as they like.

Each optimizer trains a model of its own from the same seed; they take turns of one iteration.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .cases import CONVNET, TRANSFORMER, Case
from .correctness import MEASURED, NOT_MEASURED, brief
from .optimizers import DRY_RUN, Optimizer
from .timing import OUT_OF_TIME, OtherWork, Row, compare, describe, left_out, spread

LEAST = 5  # iterations of each optimizer, after those of the warm-up
WARM_UP = 6
LR = 1e-4

Model = tuple[nn.Module, Tensor]  # and its input


def transformer() -> Model:
    """Four layers of width 256 on 4 sequences of 64: 3.2 M parameters in 48 tensors."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return model, torch.randn(4, 64, 256)


def convnet() -> Model:
    """Eight convolutions with batch norm on 16 images of 32 pixels: 1.2 M parameters."""
    layers, channels = [], 3
    for i, width in enumerate((32, 32, 64, 64, 128, 128, 256, 256)):
        convolution = nn.Conv2d(channels, width, 3, stride=1 + i % 2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10)), torch.randn(16, 3, 32, 32)


MODELS: dict[str, Callable[[], Model]] = {TRANSFORMER: transformer, CONVNET: convnet}


class _Trainee:
    def __init__(self, case: Case, row: Optimizer, device: torch.device, dry_run: bool) -> None:
        torch.manual_seed(0)
        model, batch = MODELS[case.name]()
        batch = batch[:1] if dry_run else batch
        self._model, self._batch = model.to(device), batch.to(device)
        self._model(self._batch)  # gives lazy layers their parameters
        self.params = list(model.parameters())
        self._optimizer = row.make(self.params, LR)
        self._cuda = device.type == "cuda"
        self.steps: list[float] = []
        self.iterations: list[float] = []
        for _ in range(WARM_UP):
            self.iterate()
        self.steps, self.iterations = [], []

    def iterate(self) -> None:
        begin = self._now()
        self._optimizer.zero_grad()
        self._model(self._batch).square().mean().backward()
        before = self._now()
        self._optimizer.step()
        end = self._now()
        self.steps.append(end - before)
        self.iterations.append(end - begin)

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def measure(
    case: Case,
    optimizers: Sequence[Optimizer],
    device: torch.device,
    *,
    seconds: float,
    deadline: float,
    refused: dict[str, Row],
    dry_run: bool = False,
) -> list[Row]:
    """As bench.timing.measure. `ms` is of the step; on a GPU from an idle device to the end."""
    rows: dict[str, Row] = {}
    trainees: dict[str, _Trainee] = {}
    with OtherWork() as others:
        for row in optimizers:
            reason = left_out(case, row, DRY_RUN if dry_run else device.type)
            if row.level > 1 or row.flat or row.half:
                reason = "time: not measured within training"
            rows[row.name] = {"status": NOT_MEASURED, "reason": reason or OUT_OF_TIME}
            rows[row.name] |= refused.get(row.name, {})
            if reason or row.name in refused or time.monotonic() > deadline:
                continue
            try:
                trainees[row.name] = _Trainee(case, row, device, dry_run)
            except Exception as error:
                rows[row.name]["reason"] = brief(error)
        begin, rounds = time.monotonic(), 0
        while rounds < (1 if dry_run else LEAST) or time.monotonic() < begin + seconds:
            if time.monotonic() > deadline or not trainees:
                break
            for trainee in trainees.values():
                trainee.iterate()
            rounds += 1
    bytes_of = {row.name: row.traffic(case.dtype.itemsize) for row in optimizers}
    for name, trainee in trainees.items():
        if rounds:
            rows[name] = _numbers(trainee, bytes_of[name])
    facts = {**describe(case), "gradients": "new", "caches": "training", "rounds": rounds}
    facts["cores_of_others"] = others.cores
    return compare([{**facts, "optimizer": name, **row} for name, row in rows.items()])


def _numbers(trainee: _Trainee, moved: int) -> Row:
    elements = sum(param.numel() for param in trainee.params)
    row = {"status": MEASURED, "reason": "", "elements": elements, "tensors": len(trainee.params)}
    row |= {"count": len(trainee.steps), "bytes": moved * elements}
    row |= spread(trainee.steps, 1e3, "ms") | spread(trainee.iterations, 1e3, "iteration_ms")
    row["gb_s"] = row["bytes"] / row["ms"] / 1e6
    row["step_share"] = row["ms"] / row["iteration_ms"]
    return row
