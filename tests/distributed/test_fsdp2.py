"""fully_shard (FSDP2), alone, over a two-dimensional mesh (HSDP) and with tensor parallelism."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.distributed.training import Net, Training, Wrapper, assert_follows_torch, fully_shard


class FSDP2(Wrapper):
    """
    Args:
        nested: shard two layers by themselves, and the rest together.
        ignored: leave one parameter as it is; its gradients are averaged by a hook.
        arguments: of fully_shard.
    """

    def __init__(self, *, nested: bool = True, ignored: bool = False, **arguments: Any) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.nested, self.ignored = nested, ignored
        self.arguments = {"mesh": self.make_mesh(), **arguments}

    def make_mesh(self) -> DeviceMesh:
        return init_device_mesh("cpu", (self.world,))

    def wrap(self, net: Net) -> nn.Module:
        if self.ignored:
            self.arguments["ignored_params"] = {net.norm.weight}
            net.norm.weight.register_post_accumulate_grad_hook(self._average)
        for layer in (net.second, net.third) if self.nested else ():
            fully_shard(layer, **self.arguments)
        return fully_shard(net, **self.arguments)

    def _average(self, param: nn.Parameter) -> None:
        dist.all_reduce(param.grad)
        param.grad /= self.world

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager:
        model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def make_infinite(self, model: nn.Module) -> None:
        """On one rank only, or on all replicas of one shard."""
        if self.arguments["mesh"].get_coordinate()[-1] == 1:
            super().make_infinite(model)


class HSDP(FSDP2):
    """Shards over two ranks, and replicates the shards over the others."""

    def make_mesh(self) -> DeviceMesh:
        shape, names = (self.world // 2, 2), ("replicate", "shard")
        return init_device_mesh("cpu", shape, mesh_dim_names=names)


BF16 = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
TRAININGS = {
    "nested": ({}, Training()),
    "not nested, tied": ({"nested": False}, Training(tied=True)),
    "not resharded after forward": ({"reshard_after_forward": False}, Training(parts=2)),
    "resharded after forward": ({"reshard_after_forward": True}, Training(parts=2)),
    "frozen, clip": ({}, Training(frozen=True, clip=True)),
    "CPU offload": ({"offload_policy": fsdp.CPUOffloadPolicy(pin_memory=False)}, Training()),
    "ignored parameter": ({"ignored": True}, Training()),
    "two groups, schedule": ({}, Training(two_groups=True, schedule=True)),
    "unused parameters": ({}, Training(unused=True)),
    "other strides": ({}, Training(transposed=True)),
    "foreach": ({}, Training(options={"foreach": True, "decoupled_weight_decay": True})),
    "capturable": ({}, Training(ours={"capturable": True})),
    "GradScaler": ({}, Training(inf_at=4, unscale=True, clip=True)),
    "GradScaler, capturable": ({}, Training(inf_at=4, ours={"capturable": True})),
}


@pytest.mark.distributed(2)
@pytest.mark.parametrize(("arguments", "how"), TRAININGS.values(), ids=TRAININGS)
def test_trains_as_torch_does(arguments, how):
    assert_follows_torch(FSDP2(**arguments), how)


@pytest.mark.distributed(4)
@pytest.mark.parametrize("training", ["nested", "frozen, clip", "GradScaler, capturable"])
def test_trains_on_more_ranks(training):
    arguments, how = TRAININGS[training]
    assert_follows_torch(FSDP2(**arguments), how)


@pytest.mark.distributed(2)
def test_trains_in_mixed_precision():
    assert_follows_torch(FSDP2(mp_policy=BF16), alone=False)


@pytest.mark.distributed(2)
def test_trains_bfloat16_parameters():
    how = Training(dtype=torch.bfloat16, options={"lr": 0.01})
    assert_follows_torch(FSDP2(), how, {"rtol": 0.02, "atol": 0.02}, alone=False)


@pytest.mark.distributed(4)
@pytest.mark.parametrize(
    "how", [Training(parts=2, clip=True), Training(inf_at=4)], ids=["clip", "GradScaler"]
)
def test_trains_replicated_shards(how):
    assert_follows_torch(HSDP(), how)
