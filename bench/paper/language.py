"""A post-layer-norm transformer over bytes, and its training on the help texts of Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from radam_kernels.train import Block, ByteModel, held_out_loss, load_text, loss_of, windows

HELD_OUT_WINDOWS = 128
GUESS = math.log(256)  # the loss of one who knows nothing, in nats per byte


class PostNormBlock(Block):
    """As in the first transformers: what is normalized is the sum, so no path leads past it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class PostNormModel(ByteModel):
    """`ByteModel` of such blocks, the last of which ends in a norm."""

    def __init__(self, layers: int, width: int, context: int) -> None:
        super().__init__(layers, width, context)
        self.blocks = nn.Sequential(*(PostNormBlock(width) for _ in range(layers)))
        self.norm = nn.Identity()


class Moment(NamedTuple):
    """A training after one of its steps."""

    step: int  # from 1
    loss: float  # of this step's batch, before the step
    model: PostNormModel  # its gradients are this step's
    optimizer: torch.optim.Optimizer
    held_out: Tensor  # windows that no batch is from

    def held_out_loss(self) -> float:
        """Nats per byte; where training has diverged, those of a guess."""
        loss = held_out_loss(self.model, self.held_out)
        return loss if loss < GUESS else GUESS


def training(
    make_optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    *,
    seed: int,
    layers: int,
    width: int,
    context: int,
    batch: int,
    steps: int,
) -> Iterator[Moment]:
    """Trains a fresh model; initial values and batches follow from the seed alone."""
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)
    model = PostNormModel(layers, width, context)
    optimizer = make_optimizer(model.parameters())
    train, held_out = load_text(None, context)
    starts = torch.linspace(0, len(held_out) - context - 1, HELD_OUT_WINDOWS).long()
    held_out_batch = windows(held_out, starts, context, torch.device("cpu"))
    for step in range(1, steps + 1):
        starts = torch.randint(len(train) - context, (batch,), generator=draws)
        loss = loss_of(model, windows(train, starts, context, torch.device("cpu")))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield Moment(step, loss.item(), model, optimizer, held_out_batch)
