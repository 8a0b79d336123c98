"""timm: its parameter groups, schedulers and registry."""

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from radam_kernels import RAdam
from tests.frameworks.training import Make, assert_trains_as_with_torch, make_with, own_options
from tests.helpers import TorchRAdam, assert_same, randn

try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError) as error:  # its wheel fits one build of torch
    pytest.skip(f"timm needs a torchvision that works: {error}", allow_module_level=True)
pytest.importorskip("timm", reason="pip install timm")

import timm
from timm.models import resume_checkpoint
from timm.optim import OptimInfo, create_optimizer_v2, param_groups_weight_decay
from timm.optim._optim_factory import default_registry
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import CheckpointSaver

STEPS = 10
NAMES = {RAdam: "fusedradam", TorchRAdam: "torchradam"}  # "_" would separate a prefix


def vit(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=4
    )
    return model.to(dtype)


def train(
    model: nn.Module, optimizer: Optimizer, scheduler: Scheduler, first: int = 0, last: int = STEPS
) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(first, last):
        optimizer.zero_grad()
        images = randn(4, 3, 32, 32, dtype=dtype, seed=step)
        nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
        optimizer.step()
        scheduler.step_update(step)
        scheduler.step(step)


def cosine(optimizer: Optimizer) -> CosineLRScheduler:
    return CosineLRScheduler(optimizer, STEPS, warmup_t=2, warmup_lr_init=1e-4)


@own_options
@pytest.mark.parametrize(
    "schedule",
    [
        cosine,
        lambda optimizer: CosineLRScheduler(optimizer, STEPS, t_in_epochs=False),
        lambda optimizer: StepLRScheduler(optimizer, 3, 0.5, noise_range_t=2),
    ],
    ids=["cosine", "cosine by steps", "steps with noise"],
)
def test_groups_and_schedulers_train_as_with_torch(schedule, options):
    def run(make: Make):
        model = vit()
        groups = param_groups_weight_decay(model, 0.05)
        optimizer = make_with(options, make, groups, lr=0.01, decoupled_weight_decay=True)
        train(model, optimizer, schedule(optimizer))
        return model, optimizer

    assert_trains_as_with_torch(run)


@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_the_registry_trains_as_with_torch(layer_decay):
    for optimizer_class, name in NAMES.items():
        if name not in timm.optim.list_optimizers():
            default_registry.register(OptimInfo(name, optimizer_class, has_betas=True))

    def run(make: Make):
        model = vit()
        optimizer = create_optimizer_v2(
            model, NAMES[make], lr=0.01, weight_decay=0.05, layer_decay=layer_decay
        )
        train(model, optimizer, cosine(optimizer))
        return model, optimizer

    assert_trains_as_with_torch(run)


@own_options
def test_a_training_resumed_is_the_uninterrupted_one_to_the_bit(options, tmp_path):
    def made() -> tuple[nn.Module, RAdam, CosineLRScheduler]:
        model = vit(torch.float32)
        optimizer = RAdam(param_groups_weight_decay(model, 0.05), lr=0.01, **options)
        return model, optimizer, cosine(optimizer)

    whole, optimizer, scheduler = made()
    train(whole, optimizer, scheduler, last=6)
    saver = CheckpointSaver(whole, optimizer, checkpoint_dir=tmp_path, recovery_dir=tmp_path)
    saver.save_checkpoint(epoch=5)
    train(whole, optimizer, scheduler, first=6)
    resumed, other, scheduler = made()
    resume_checkpoint(resumed, str(tmp_path / "last.pth.tar"), other)
    train(resumed, other, scheduler, first=6)
    assert_same(other, optimizer)
