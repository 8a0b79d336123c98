"""DistributedDataParallel: buckets, hooks, accumulation, uneven inputs."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from tests.distributed.training import (
    Net,
    Training,
    Wrapper,
    assert_follows_torch,
)

pytestmark = pytest.mark.distributed(2, 4)


class DDP(Wrapper):
    def __init__(self, hook: Callable | None = None, **arguments: Any) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.hook, self.arguments = hook, arguments

    def wrap(self, net: Net) -> nn.Module:
        model = DistributedDataParallel(net, **self.arguments)
        if self.hook:
            state = None
            if self.hook is powerSGD_hook:
                state = PowerSGDState(None, start_powerSGD_iter=3, min_compression_rate=1)
            model.register_comm_hook(state, self.hook)
        return model

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager:
        return contextlib.nullcontext() if last else model.no_sync()


TRAININGS = {
    "bucket views": ({"gradient_as_bucket_view": True}, Training()),
    "bucket views, flatten": (
        {"gradient_as_bucket_view": True},
        Training(ours={"flatten": True}, frozen=True),
    ),
    "flatten before DDP": ({}, Training(ours={"flatten": True}, early=True)),
    "static graph": ({"static_graph": True}, Training(tied=True)),
    "unused parameters": (
        {"find_unused_parameters": True},
        Training(unused=True, two_groups=True, schedule=True),
    ),
    "no_sync, clip": ({}, Training(parts=2, clip=True)),
    "other strides": ({}, Training(transposed=True)),
    "GradScaler": ({}, Training(inf_at=4, parts=2)),
    "GradScaler, capturable": ({}, Training(inf_at=4, ours={"capturable": True})),
}


@pytest.mark.parametrize(("arguments", "how"), TRAININGS.values(), ids=TRAININGS)
def test_trains_as_torch_does(arguments, how):
    assert_follows_torch(DDP(**arguments), how)


@pytest.mark.parametrize("hook", [fp16_compress_hook, powerSGD_hook])
def test_trains_with_compressed_gradients(hook):
    assert_follows_torch(DDP(hook), alone=False)


class UnevenDDP(DDP):
    """Ranks have batches for different numbers of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps += self.rank

    def session(self, model: nn.Module) -> AbstractContextManager:
        return model.join()

    def replicated(self, optimizer: Optimizer) -> dict[tuple, Tensor]:
        """Only parameters: the moments of ranks that have stopped are old."""
        found = super().replicated(optimizer)
        return {at: tensor for at, tensor in found.items() if at[1] == "param"}


def test_trains_on_uneven_inputs():
    assert_follows_torch(UnevenDDP(), alone=False)
