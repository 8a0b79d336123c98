"""A post-layer-norm transformer over bytes, and its training on Python's help texts."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from radam_kernels.train_model import (
    Block,
    ByteModel,
    held_out_loss,
    load_text,
    loss_of,
    windows,
)

from .optimizers import MAKE

HELD_OUT_WINDOWS = 128
UNIFORM_LOSS = math.log(256)  # nats per byte, when all bytes are equally likely


class PostNormBlock(Block):
    """As in the first transformers, sums are normalized: no residual path bypasses a norm."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class PostNormModel(ByteModel):
    """`ByteModel` with such blocks, and without its final norm, which the last block has."""

    def __init__(self, layers: int, width: int, context: int) -> None:
        super().__init__(layers, width, context)
        self.blocks = nn.Sequential(*(PostNormBlock(width) for _ in range(layers)))
        self.norm = nn.Identity()


class TrainingStep(NamedTuple):
    """The state of a training after a step."""

    step: int  # from 1
    loss: float  # on this step's batch, before the update
    model: PostNormModel  # with this step's gradients
    optimizer: torch.optim.Optimizer
    held_out: Tensor  # windows of text that is not trained on

    def held_out_loss(self) -> float:
        """Nats per byte; UNIFORM_LOSS at most, also where training has diverged."""
        loss = held_out_loss(self.model, self.held_out)
        return loss if loss < UNIFORM_LOSS else UNIFORM_LOSS


def training(
    optimizer_name: str,
    lr: float,
    steps: int,
    *,
    seed: int,
    layers: int,
    width: int = 64,
    context: int = 32,
    batch: int = 8,
) -> Iterator[TrainingStep]:
    """Trains a new model for `steps` steps; initial values and batches depend on the seed only."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = PostNormModel(layers, width, context)
    optimizer = MAKE[optimizer_name](model.parameters(), lr, steps)
    train, held_out = load_text(None, context)
    starts = torch.linspace(0, len(held_out) - context - 1, HELD_OUT_WINDOWS).long()
    held_out_batch = windows(held_out, starts, context, torch.device("cpu"))
    for step in range(1, steps + 1):
        starts = torch.randint(len(train) - context, (batch,), generator=generator)
        loss = loss_of(model, windows(train, starts, context, torch.device("cpu")))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield TrainingStep(step, loss.item(), model, optimizer, held_out_batch)
