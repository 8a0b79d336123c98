"""FullyShardedDataParallel (FSDP1): flat parameters, and views of them (use_orig_params)."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.optim import Optimizer

from tests.distributed.training import Net, Training, Wrapper, assert_follows_torch


class FSDP1(Wrapper):
    def __init__(self, **arguments: Any) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.arguments = {"auto_wrap_policy": ModuleWrapPolicy([nn.Linear]), **arguments}

    def wrap(self, net: Net) -> nn.Module:
        return FullyShardedDataParallel(net, device_id=torch.device("cpu"), **self.arguments)

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager:
        return contextlib.nullcontext() if last else model.no_sync()

    def clip(self, model: nn.Module) -> None:
        model.clip_grad_norm_(0.05)

    def scaler(self) -> ShardedGradScaler:
        return ShardedGradScaler("cpu", init_scale=1024.0, growth_interval=3)

    def make_infinite(self, model: nn.Module) -> None:
        if self.rank == 1:
            super().make_infinite(model)

    def replicated(self, optimizer: Optimizer) -> dict[tuple, Tensor]:
        """Nothing: each rank has parts of its own."""
        return {}

    def full(self, model: nn.Module) -> list[Tensor]:
        with FullyShardedDataParallel.summon_full_params(model):
            return super().full(model)


TRAININGS = {
    "": Training(),
    "no_sync": Training(parts=2),
    "GradScaler": Training(inf_at=4),
    "GradScaler, capturable": Training(inf_at=4, unscale=True, ours={"capturable": True}),
}


@pytest.mark.distributed(2)
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("how", TRAININGS.values(), ids=TRAININGS)
def test_trains_as_torch_does(use_orig_params, how):
    assert_follows_torch(FSDP1(use_orig_params=use_orig_params), how)


@pytest.mark.distributed(2)
def test_clips_gradients():
    """In float32: FSDP1 does not clip float64."""
    how = Training(dtype=torch.float32, clip=True)
    assert_follows_torch(FSDP1(), how, {"rtol": 1e-5, "atol": 1e-6})


@pytest.mark.distributed(2, 4)
def test_trains_original_parameters_in_groups():
    how = Training(two_groups=True, frozen=True, schedule=True)
    assert_follows_torch(FSDP1(use_orig_params=True), how)
