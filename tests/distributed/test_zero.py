"""ZeroRedundancyOptimizer: each rank steps a part of the parameters and broadcasts it."""

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from radam_kernels import RAdam
from tests.distributed.test_ddp import DDP
from tests.distributed.training import CLOSE, Training, Wrapper, assert_follows_torch, train


class ZeRO(DDP):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments_of_optimizer = arguments

    def optimizer(self, cls: type[Optimizer], model: nn.Module, how: Training) -> Optimizer:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of torch.jit

        arguments = {"optimizer_class": cls, **self.arguments_of_optimizer}
        return how.optimizer(functools.partial(ZeroRedundancyOptimizer, **arguments), model)


@pytest.mark.distributed(2, 4)
@pytest.mark.parametrize("bucket_views", [False, True])
def test_trains_as_torch_does(bucket_views):
    how = Training(two_groups=True, schedule=True)
    assert_follows_torch(ZeRO(parameters_as_bucket_view=bucket_views), how)


@pytest.mark.distributed(2)
def test_consolidated_state_is_that_of_one_process():
    how = Training(two_groups=True)
    _, optimizer = train(ZeRO(), RAdam, how)
    _, plain = train(Wrapper(), RAdam, how)
    states = []
    for _ in range(2):
        optimizer.consolidate_state_dict(to=0)
        state = [optimizer.state_dict() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(state)
        states.append(dict(state[0]["state"]))  # loading deletes what other ranks step
        optimizer = ZeRO().optimizer(RAdam, how.net(), how)
        optimizer.load_state_dict(state[0])
    torch.testing.assert_close(states[0], plain.state_dict()["state"], **CLOSE)
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
