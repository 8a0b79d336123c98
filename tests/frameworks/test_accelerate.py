"""accelerate.Accelerator."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from radam_kernels import RAdam
from tests.frameworks.training import (
    FLOAT32,
    MIXED,
    Make,
    assert_trains_as_with_torch,
    make_with,
    own_options,
)
from tests.helpers import TorchRAdam, assert_same, batch, network

pytest.importorskip("accelerate", reason="pip install 'radam_kernels[frameworks]'")

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState

STEPS = 16


@pytest.fixture(autouse=True)
def fresh_state():
    """An Accelerator keeps the settings of the first one in its process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Loop:
    """A training loop as accelerate's documentation writes it."""

    def __init__(self, make: Make, dtype=torch.float64, options=None, **settings) -> None:
        self.accelerator = Accelerator(cpu=True, **settings)
        model = network(dtype=dtype)
        optimizer = make_with(options or {}, make, model.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        data = TensorDataset(torch.cat([batch(i, dtype) for i in range(STEPS)]))
        self.model, self.optimizer, self.data, self.scheduler = self.accelerator.prepare(
            model, optimizer, DataLoader(data, batch_size=16), scheduler
        )

    def train(
        self,
        first: int = 0,
        last: int = STEPS,
        max_norm: float | None = None,
        clip_in_the_step: bool = False,
    ) -> None:
        for i, (x,) in enumerate(self.data):
            if not first <= i < last:
                continue
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(x).square().mean())
                if max_norm and self.accelerator.sync_gradients:
                    if clip_in_the_step:
                        self.optimizer.optimizer.clip_grad_norm_(max_norm)
                    else:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()

    def result(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        return self.accelerator.unwrap_model(self.model), self.optimizer.optimizer


@own_options
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_it_trains_as_with_torch(accumulated, max_norm, options):
    def run(make: Make):
        loop = Loop(make, options=options, gradient_accumulation_steps=accumulated)
        loop.train(max_norm=max_norm)
        return loop.result()

    assert_trains_as_with_torch(run)


@own_options
@pytest.mark.parametrize("accumulated", [1, 2])
def test_clipping_in_the_step_trains_as_with_torch(accumulated, options):
    def run(make: Make):
        loop = Loop(make, options=options, gradient_accumulation_steps=accumulated)
        loop.train(max_norm=0.05, clip_in_the_step=make is RAdam)
        return loop.result()

    assert_trains_as_with_torch(run)


@own_options
def test_steps_in_backward_train_as_with_torch(options):
    def run(make: Make):
        loop = Loop(make, options=options)
        if make is RAdam:
            loop.optimizer.optimizer.step_in_backward()
        loop.train()
        return loop.result()

    assert_trains_as_with_torch(run)


@own_options
def test_mixed_precision_trains_as_with_torch(options):
    def run(make: Make):
        loop = Loop(make, torch.float32, options, mixed_precision="bf16")
        loop.train(max_norm=0.05)
        return loop.result()

    assert_trains_as_with_torch(run, **MIXED)


@pytest.mark.parametrize(
    ("options", "tells"),
    [({}, True), ({"capturable": True}, False), ({"capturable": True, "amp_scaling": False}, True)],
    ids=["", "capturable", "capturable without amp_scaling"],
)
def test_steps_with_infinite_gradients_are_skipped(options, tells):
    """accelerate has a GradScaler on GPUs only, so this one is given to its optimizer by hand."""
    told = {}

    def run(make: Make):
        Accelerator(cpu=True)
        model = network()
        scaler = torch.amp.GradScaler("cpu", 64.0)
        optimizer = AcceleratedOptimizer(
            make_with(options, make, model.parameters(), lr=0.05), scaler=scaler
        )
        told[make] = []
        for step in range(STEPS):
            optimizer.zero_grad()
            scaler.scale(model(batch(step)).square().mean()).backward()
            if step in (3, 9):
                model[0].weight.grad[0, 0] = float("inf")
            optimizer.step()
            told[make].append(optimizer.step_was_skipped)
        return model, optimizer.optimizer

    assert_trains_as_with_torch(run, **FLOAT32)
    assert told[TorchRAdam] == [step in (3, 9) for step in range(STEPS)]
    # A step that skips by itself does not wait for the GPU, and accelerate does not learn of it.
    assert told[RAdam] == (told[TorchRAdam] if tells else [False] * STEPS)


@own_options
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_resumed_is_the_uninterrupted_one_to_the_bit(dtype, options, tmp_path):
    whole = Loop(RAdam, dtype, options)
    whole.train(last=7)
    # By default accelerate keeps one of the tensors that share a storage, and drops the others.
    whole.accelerator.save_state(tmp_path, safe_serialization="flatten" not in options)
    whole.train(first=7)
    resumed = Loop(RAdam, dtype, options)
    resumed.accelerator.load_state(tmp_path)
    resumed.train(first=7)
    assert_same(resumed.optimizer.optimizer, whole.optimizer.optimizer)


def test_a_state_of_torchs_is_loaded(tmp_path):
    whole = Loop(TorchRAdam)
    whole.train(last=7)
    whole.accelerator.save_state(tmp_path)
    whole.train(first=7)
    resumed = Loop(RAdam)
    resumed.accelerator.load_state(tmp_path)
    resumed.train(first=7)
    assert_same(resumed.optimizer.optimizer, whole.optimizer.optimizer, rtol=1e-10, atol=1e-12)
