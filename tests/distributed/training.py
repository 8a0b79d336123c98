"""Trains a model on the ranks of a process group, and compares what comes out of several runs."""

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.optim import Optimizer
from torch.optim import RAdam as TorchRAdam

from radam_kernels import RAdam
from radam_kernels.sharding import FULLY_SHARDS_ON_CPU, local
from tests.helpers import MOMENTS, STEPS, params_of, randn, same_bits

ROWS = 8  # of a batch, for up to 4 ranks with 2 micro-batches each
CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # for sums of float64 in another order


def fully_shard(module: nn.Module, **arguments: Any) -> nn.Module:
    """torch's; skips the test, from a rank too, where it does not run on the CPU."""
    if not FULLY_SHARDS_ON_CPU:
        pytest.skip("fully_shard of this torch does not run on the CPU")
    return fsdp.fully_shard(module, **arguments)


class Net(nn.Module):
    """A model for every wrapper.

    Args:
        width: 5 makes shards uneven on 2 and 4 ranks, and a bias of 1 leaves some of them empty.
            Tensor parallelism needs a multiple of the number of ranks.
        tied: two layers share their weight.
    """

    def __init__(self, width: int = 5, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, width)
        self.second = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.third = nn.Linear(width, width)
        self.last = nn.Linear(width, 1)
        self.skips = False
        if tied:
            self.third.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = self.norm(x if self.skips else self.second(x))
        return self.last(torch.tanh(self.third(x)))


@dataclass(frozen=True)
class Training:
    """How to train, whatever the wrapper of the model is.

    Args:
        options: arguments of both optimizers.
        ours: further arguments of radam_kernels.RAdam.
        parts: micro-batches of a step.
        inf_at: the step at which GradScaler finds an infinity; without it there is no scaler.
        unscale: call GradScaler.unscale_ before its step.
        transposed: gradients get other strides than their parameters.
        unused: a layer takes no part in every third step.
        early: make the optimizer before the model is wrapped.
    """

    options: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    width: int = 5
    tied: bool = False
    frozen: bool = False
    two_groups: bool = False
    parts: int = 1
    clip: bool = False
    schedule: bool = False
    inf_at: int | None = None
    unscale: bool = False
    transposed: bool = False
    unused: bool = False
    early: bool = False

    def net(self) -> Net:
        net = Net(self.width, self.tied).to(self.dtype)
        net.second.requires_grad_(not self.frozen)
        return net

    def optimizer(self, cls: Callable[..., Optimizer], model: nn.Module) -> Optimizer:
        weights, biases = [], []
        for name, param in model.named_parameters():
            (biases if self.two_groups and name.endswith("bias") else weights).append(param)
        groups = [{"params": weights, "weight_decay": 0.1}]
        if biases:
            groups.append({"params": biases, "lr": 0.05})
        options = self.options | (self.ours if cls is RAdam else {})
        return cls(groups, **{"lr": 0.1, **options})

    def batch(self, step: int) -> Tensor:
        return randn(ROWS, 4, 6, dtype=self.dtype, seed=1000 + step)

    def loss(self, outputs: Tensor) -> Tensor:
        return outputs.square().mean()


class Wrapper:
    """A way to train a model on several ranks; this one is a single process without a wrapper."""

    rank, world = 0, 1  # this rank's part of a batch, and the number of parts
    steps = STEPS

    def wrap(self, net: Net) -> nn.Module:
        return net

    def optimizer(self, cls: type[Optimizer], model: nn.Module, how: Training) -> Optimizer:
        return how.optimizer(cls, model)

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager:
        """The context of a forward and backward pass, `last` before the step or not."""
        return contextlib.nullcontext()

    def session(self, model: nn.Module) -> AbstractContextManager:
        """The context of all steps."""
        return contextlib.nullcontext()

    def clip(self, model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)

    def make_infinite(self, model: nn.Module) -> None:
        """Makes one element of the reduced gradients infinite, as far as this rank has it."""
        gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
        next(g for g in gradients if g.numel()).view(-1)[0] = math.inf

    def replicated(self, optimizer: Optimizer) -> dict[tuple, Tensor]:
        """This rank's tensors by the index of the parameter, the name and the place of a shard."""
        found = {}
        for i, p in enumerate(params_of(optimizer)):
            for key, tensor in {"param": p, **optimizer.state.get(p, {})}.items():
                where = ()
                if hasattr(tensor, "placements"):
                    coordinate = tensor.device_mesh.get_coordinate()
                    where = tuple(
                        None if placement.is_replicate() else at
                        for placement, at in zip(tensor.placements, coordinate, strict=True)
                    )
                found[i, key, where] = local(tensor).detach()
        return found

    def full(self, model: nn.Module) -> list[Tensor]:
        """All parameters, unsharded."""
        return [full(p) for p in model.parameters()]


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(wrapper: Wrapper, cls: type[Optimizer], how: Training) -> tuple[nn.Module, Optimizer]:
    """Makes the model and its optimizer, and trains it on this rank's part of each batch."""
    net = how.net()
    if how.early:
        optimizer = how.optimizer(cls, net)
    model = wrapper.wrap(net)
    if not how.early:
        optimizer = wrapper.optimizer(cls, model, how)
    scaler = wrapper.scaler() if how.inf_at is not None else None
    schedule = None
    if how.schedule:
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.2, total_steps=wrapper.steps + 1, cycle_momentum=False
        )
    with wrapper.session(model):
        for step in range(wrapper.steps):
            net.skips = how.unused and step % 3 == 1
            optimizer.zero_grad()
            rows = how.batch(step)[wrapper.rank :: wrapper.world]
            for part, x in enumerate(rows.chunk(how.parts)):
                with wrapper.accumulate(model, last=part == how.parts - 1):
                    loss = how.loss(model(x)) / how.parts
                    (scaler.scale(loss) if scaler else loss).backward()
            if step == how.inf_at:
                wrapper.make_infinite(model)
            if how.transposed:
                for p in model.parameters():
                    p.grad = p.grad.mT.contiguous().mT if p.ndim == 2 else p.grad
            if how.unscale:
                scaler.unscale_(optimizer)
            if how.clip:
                wrapper.clip(model)
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            if schedule:
                schedule.step()
    return model, optimizer


def assert_follows_torch(
    wrapper: Wrapper,
    how: Training = Training(),
    tolerance: dict[str, float] = CLOSE,
    alone: bool = True,
) -> None:
    """Asserts that this optimizer trains a wrapped model as torch's does.

    Args:
        alone: the ranks together compute what one process does on whole batches.
    """
    model, optimizer = train(wrapper, RAdam, how)
    torchs_model, torchs = train(wrapper, TorchRAdam, how)
    assert_same_locally(optimizer, torchs, **tolerance)
    assert_replicas_agree(wrapper, optimizer)
    parameters = wrapper.full(model)
    torch.testing.assert_close(parameters, wrapper.full(torchs_model), **tolerance)
    if alone:
        plain, _ = train(Wrapper(), TorchRAdam, how)
        torch.testing.assert_close(parameters, Wrapper().full(plain), **tolerance)


def assert_same_locally(ours: Optimizer, torchs: Optimizer, **tolerance: float) -> None:
    """Parameters and states of two optimizers are close on this rank."""
    for i, (p, q) in enumerate(zip(params_of(ours), params_of(torchs), strict=True)):
        assert list(ours.state.get(p, ())) == list(torchs.state.get(q, ())), f"state of param {i}"
        pairs = {"param": (p, q)}
        pairs |= {key: (ours.state[p][key], torchs.state[q][key]) for key in ours.state.get(p, ())}
        for key, (a, b) in pairs.items():
            torch.testing.assert_close(
                local(a).detach(),
                local(b).detach(),
                **tolerance,
                check_dtype=key not in MOMENTS,  # torch's have the dtype of the parameter
                msg=lambda m, i=i, key=key: f"{key} of param {i}: {m}",
            )


def assert_replicas_agree(wrapper: Wrapper, optimizer: Optimizer) -> None:
    """Ranks that hold the same part of a parameter or moment hold the same bits."""
    mine = wrapper.replicated(optimizer)
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    for rank, others in enumerate(everywhere):
        for at in mine.keys() & others.keys():
            assert same_bits(mine[at], others[at]), f"{at} differs from rank {rank}"
