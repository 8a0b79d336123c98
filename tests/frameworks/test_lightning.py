"""lightning.pytorch.Trainer."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from radam_kernels import RAdam
from tests.frameworks.training import FLOAT32, MIXED, Make, assert_trains_as_with_torch
from tests.helpers import TorchRAdam, assert_same, batch, network

pytest.importorskip("lightning", reason="pip install 'radam_kernels[frameworks]'")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")

STEPS = 7  # of an epoch; Lightning resumes between epochs, unless a DataLoader can do more


class Module(LightningModule):
    """A network whose learning rate halves every fourth step."""

    def __init__(self, make: Make, **options) -> None:
        super().__init__()
        self.net = network()
        self.make, self.options = make, options

    def training_step(self, x: Tensor, index: int) -> Tensor:
        return self.net(x.to(self.net[0].weight.dtype)).double().square().mean()

    def configure_optimizers(self):
        optimizer = self.make(self.parameters(), lr=0.05, **self.options)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class ClippedInTheStep(Module):
    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        if isinstance(optimizer, RAdam):
            optimizer.clip_grad_norm_(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)


class SteppedInBackward(Module):
    """Manual optimization, of the optimizer itself: Lightning's steps always have a closure."""

    automatic_optimization = False

    def training_step(self, x: Tensor, index: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(super().training_step(x, index))
        optimizer.step()
        self.lr_schedulers().step()

    def configure_optimizers(self):
        optimizers, schedulers = super().configure_optimizers()
        if isinstance(optimizers[0], RAdam):
            optimizers[0].step_in_backward()
        return optimizers, schedulers


class TwoOptimizers(LightningModule):
    """Manual optimization: two networks pull in opposite directions, each with its optimizer."""

    automatic_optimization = False

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.first, self.second = network(), network(seed=1)
        self.make = make

    def training_step(self, x: Tensor, index: int) -> None:
        for optimizer, sign in zip(self.optimizers(), (1, -1), strict=True):
            self.toggle_optimizer(optimizer)
            loss = sign * (self.first(x) - self.second(x)).tanh().square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self):
        optimizers = [self.make(net.parameters(), lr=0.05) for net in (self.first, self.second)]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]


def fit(module: LightningModule, resume_from: Path | None = None, **settings) -> Optimizer:
    """Trains a module, and returns its (first) optimizer."""
    settings = {"max_epochs": 2, "enable_checkpointing": False, **settings}
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    data = DataLoader([row for i in range(STEPS) for row in batch(i)], batch_size=16)
    trainer.fit(module, data, ckpt_path=resume_from)
    return trainer.optimizers[0]


def saving(folder: Path) -> dict:
    """Settings that save every epoch: epoch=0.ckpt, epoch=1.ckpt."""
    checkpoint = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    return {"callbacks": [checkpoint], "enable_checkpointing": True}


def mixed_float16() -> MixedPrecision:
    """16-mixed on the CPU: `Trainer(precision="16-mixed")` makes that bf16-mixed there."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    return MixedPrecision("16-mixed", "cpu", scaler)


BFLOAT16 = {"rtol": 2e-2, "atol": 1e-3}  # two last bits of a weight


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"precision": "64-true"}, {}),
        ({"precision": "64-true", "gradient_clip_val": 0.05}, {}),
        (
            {
                "precision": "64-true",
                "gradient_clip_val": 0.01,
                "gradient_clip_algorithm": "value",
                "accumulate_grad_batches": 2,
            },
            {},
        ),
        ({"precision": "bf16-true"}, BFLOAT16),
        ({"precision": "bf16-mixed", "gradient_clip_val": 0.05}, MIXED),
        ({"plugins": "16-mixed"}, MIXED),
        ({"plugins": "16-mixed", "gradient_clip_val": 0.05}, MIXED),
    ],
    ids=lambda x: " ".join(str(v) for v in x.values()) if "rtol" not in x else "",
)
def test_it_trains_as_with_torch(settings, tolerance):
    def run(make: Make):
        module = Module(make)
        plugins = {"plugins": mixed_float16()} if "plugins" in settings else {}
        return module, fit(module, **{**settings, **plugins})

    assert_trains_as_with_torch(run, **tolerance)


def test_manual_optimization_with_two_optimizers_trains_as_with_torch():
    def run(make: Make):
        module = TwoOptimizers(make)
        return module, fit(module, precision="64-true")

    assert_trains_as_with_torch(run)


@pytest.mark.parametrize("settings", [{"precision": "bf16-mixed"}, {"plugins": "16-mixed"}])
def test_capturable_clips_under_mixed_precision_without_amp_scaling(settings):
    def run(make: Make):
        options = {"capturable": True, "amp_scaling": False} if make is RAdam else {}
        module = Module(make, **options)
        plugins = {"plugins": mixed_float16()} if "plugins" in settings else {}
        return module, fit(module, gradient_clip_val=0.05, **{**settings, **plugins})

    assert_trains_as_with_torch(run, **MIXED)


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("64-true", {}), ("bf16-mixed", MIXED)],
    ids=["64-true", "bf16-mixed"],
)
def test_steps_in_backward_train_as_with_torch(precision, tolerance):
    def run(make: Make):
        module = SteppedInBackward(make)
        return module, fit(module, precision=precision)

    assert_trains_as_with_torch(run, **tolerance)


@pytest.mark.parametrize(
    ("settings", "options", "tolerance"),
    [
        ({"precision": "64-true"}, {}, {}),
        ({"precision": "bf16-mixed"}, {"capturable": True}, MIXED),
        ({"plugins": "16-mixed"}, {}, MIXED),
        ({"plugins": "16-mixed"}, {"capturable": True, "amp_scaling": False}, MIXED),
    ],
    ids=["64-true", "bf16-mixed capturable", "16-mixed", "16-mixed capturable"],
)
def test_clipping_in_the_step_trains_as_with_torch(settings, options, tolerance):
    def run(make: Make):
        module = ClippedInTheStep(make, **(options if make is RAdam else {}))
        plugins = {"plugins": mixed_float16()} if "plugins" in settings else {}
        return module, fit(module, gradient_clip_val=0.05, **{**settings, **plugins})

    assert_trains_as_with_torch(run, **tolerance)


def test_capturable_unscales_in_the_step_if_nothing_is_clipped():
    def run(make: Make):
        module = Module(make, **({"capturable": True} if make is RAdam else {}))
        return module, fit(module, plugins=mixed_float16())

    assert_trains_as_with_torch(run, **MIXED)


@pytest.mark.parametrize(
    "options",
    [{}, {"flatten": True}, {"capturable": True}, {"state_dtype": torch.bfloat16}],
    ids=lambda x: " ".join(x),
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_a_training_resumed_is_the_uninterrupted_one_to_the_bit(precision, options, tmp_path):
    settings = {"precision": precision, **saving(tmp_path)}
    whole = fit(Module(RAdam, **options), **settings)
    first = tmp_path / "epoch=0.ckpt"
    resumed = fit(Module(RAdam, **options), resume_from=first, **settings)
    assert_same(resumed, whole)


def test_a_checkpoint_of_torchs_is_resumed(tmp_path):
    whole = fit(Module(TorchRAdam), **saving(tmp_path))
    resumed = fit(Module(RAdam), resume_from=tmp_path / "epoch=0.ckpt", **saving(tmp_path))
    assert_same(resumed, whole, **FLOAT32)
