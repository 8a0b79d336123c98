"""What the demo trains: a small transformer over the bytes of a text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .train_processes import UserError

HEAD_WIDTH = 32


class Block(nn.Module):
    """A transformer block: pre-norm attention and MLP with residual connections."""

    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    qkv: nn.Linear
    proj: nn.Linear
    up: nn.Linear
    down: nn.Linear

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attention(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, -1, HEAD_WIDTH))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ByteModel(nn.Module):
    """A decoder-only transformer over bytes: int64 (batch, time) to logits (batch, time, 256)."""

    token: nn.Embedding
    position: nn.Embedding
    blocks: nn.Sequential
    norm: nn.LayerNorm
    head: nn.Linear

    def __init__(self, layers: int, width: int, context: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def load_text(path: Path | None, context: int) -> tuple[Tensor, Tensor]:
    """The bytes to train on and the held-out last tenth, both int64 of shape (bytes,)."""
    if path is not None:
        try:
            text = path.read_bytes()
        except OSError as error:
            raise UserError(f"--text: cannot read {path}: {error.strerror}") from error
    else:
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise UserError(
                "this Python lacks pydoc_data.topics, the English text to train on (some Linux "
                "distributions strip it); give any text of some 100 KB with --text FILE"
            ) from error
        text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    if len(text) < 20 * (context + 1):
        raise UserError(
            f"--text: {len(text)} bytes are too few for windows of {context} bytes; "
            f"give at least {20 * (context + 1)}, better 100 KB"
        )
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    split = len(data) * 9 // 10
    return data[:split], data[split:]


def windows(data: Tensor, starts: Tensor, context: int, device: torch.device) -> Tensor:
    """`context + 1` bytes of `data` from each of `starts`: int64 (len(starts), context + 1)."""
    return data[starts[:, None] + torch.arange(context + 1)].to(device)


def loss_of(model: ByteModel, batch: Tensor) -> Tensor:
    """Mean cross-entropy of each next byte in `batch` (n, context + 1), in nats per byte."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: ByteModel, batch: Tensor) -> float:
    """`loss_of` without a graph, as a number."""
    return loss_of(model, batch).item()
