"""Three small trainings, each of many seeds at once: parameters have a first dimension of seeds.

A seed decides initial values and batches, so that formats are compared in pairs.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from radam_kernels.train_model import load_text

Weights = dict[str, Tensor]  # by name: (seeds, *shape), or of one seed


class Problem(Protocol):
    """A model and its data."""

    def init(self, generator: torch.Generator) -> Weights:
        """Initial values of one seed."""

    def draw(self, generator: torch.Generator, steps: int) -> tuple[Tensor, ...]:
        """What all batches of one seed are made of: tensors of (steps, ...)."""

    def loss(self, weights: Weights, *batch: Tensor) -> Tensor:
        """Nats, of each seed, on one step's share of what was drawn: tensors of (seeds, ...)."""

    def held_out(self, weights: Weights) -> Tensor:
        """Nats, of each seed, on data that no step sees."""


class Task(NamedTuple):
    """A training: the learning rate is the largest, at the start of a cosine."""

    make: Callable[[], Problem]
    steps: int
    lr: float


def _normal(generator: torch.Generator, *shape: int, std: float) -> Tensor:
    return std * torch.randn(shape, generator=generator)


def _linear(generator: torch.Generator, inputs: int, outputs: int) -> Tensor:
    return _normal(generator, inputs, outputs, std=inputs**-0.5)


def _lookup(table: Tensor, index: Tensor) -> Tensor:
    """Rows of each seed's table (seeds, rows, width) for indices (seeds, ...)."""
    first = torch.arange(len(table)).view(-1, *[1] * (index.dim() - 1)) * table.shape[1]
    return F.embedding(index + first, table.flatten(0, 1))


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each seed; logits (seeds, n, classes), labels (seeds, n)."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(len(logits), -1).mean(1)


class Bytes:
    """A transformer of two layers over the bytes of Python's help texts."""

    WIDTH, CONTEXT, BATCH, LAYERS = 32, 24, 8, 2

    def __init__(self) -> None:
        self._train, held_out = load_text(None, self.CONTEXT)
        starts = torch.linspace(0, len(held_out) - self.CONTEXT - 1, 64).long()
        self._held_out = self._windows(held_out, starts)

    def init(self, generator: torch.Generator) -> Weights:
        w = self.WIDTH
        weights = {
            "token": _normal(generator, 256, w, std=0.02),
            "position": _normal(generator, self.CONTEXT, w, std=0.02),
            "head": _linear(generator, w, 256),
            "norm": torch.ones(w),
            "bias": torch.zeros(w),
        }
        for i in range(self.LAYERS):
            for name, inputs, outputs in (
                ("qkv", w, 3 * w), ("proj", w, w), ("up", w, 4 * w), ("down", 4 * w, w)
            ):  # fmt: skip
                weights[f"{name}{i}"] = _linear(generator, inputs, outputs)
                weights[f"{name}_bias{i}"] = torch.zeros(outputs)
            for norm in ("norm1", "norm2"):
                weights[f"{norm}{i}"] = torch.ones(w)
                weights[f"{norm}_bias{i}"] = torch.zeros(w)
        return weights

    def draw(self, generator: torch.Generator, steps: int) -> tuple[Tensor, ...]:
        last = len(self._train) - self.CONTEXT
        return (torch.randint(last, (steps, self.BATCH), generator=generator),)

    def loss(self, weights: Weights, starts: Tensor) -> Tensor:
        return self._loss(weights, self._windows(self._train, starts))

    def held_out(self, weights: Weights) -> Tensor:
        windows = self._held_out.expand(len(weights["head"]), -1, -1)
        return self._loss(weights, windows)

    def _windows(self, text: Tensor, starts: Tensor) -> Tensor:
        return text[starts[..., None] + torch.arange(self.CONTEXT + 1)]

    def _loss(self, weights: Weights, windows: Tensor) -> Tensor:
        seeds, batch, _ = windows.shape

        def linear(x: Tensor, name: str, i: int) -> Tensor:
            return torch.baddbmm(weights[f"{name}_bias{i}"][:, None], x, weights[f"{name}{i}"])

        def norm(x: Tensor, weight: str, bias: str) -> Tensor:
            return F.layer_norm(x, x.shape[-1:]) * weights[weight][:, None] + weights[bias][:, None]

        x = _lookup(weights["token"], windows[..., :-1]) + weights["position"][:, None]
        x = x.flatten(1, 2)
        for i in range(self.LAYERS):
            qkv = linear(norm(x, f"norm1{i}", f"norm1_bias{i}"), "qkv", i)
            q, k, v = qkv.view(seeds * batch, 1, -1, 3 * self.WIDTH).chunk(3, -1)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + linear(mixed.reshape(x.shape), "proj", i)
            hidden = F.gelu(linear(norm(x, f"norm2{i}", f"norm2_bias{i}"), "up", i))
            x = x + linear(hidden, "down", i)
        logits = norm(x, "norm", "bias") @ weights["head"]
        return _losses(logits, windows[..., 1:].flatten(1))


class Zipf:
    """Bags of words of Zipf's law, classified by the mean of their embeddings.

    Most rows of the embedding have a gradient of zero at most steps.
    """

    WORDS, WIDTH, CLASSES, BAG, BATCH = 500, 32, 8, 12, 32

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._odds = 1 / torch.arange(1, self.WORDS + 1)
        self._teacher = 2.5 * torch.randn(self.WORDS, self.CLASSES, generator=generator)
        self._held_out = self.draw(generator, 64)

    def init(self, generator: torch.Generator) -> Weights:
        return {
            "words": _normal(generator, self.WORDS, self.WIDTH, std=0.1),
            "head": _linear(generator, self.WIDTH, self.CLASSES),
            "bias": torch.zeros(self.CLASSES),
        }

    def draw(self, generator: torch.Generator, steps: int) -> tuple[Tensor, ...]:
        bags = torch.multinomial(
            self._odds, steps * self.BATCH * self.BAG, replacement=True, generator=generator
        ).view(-1, self.BAG)
        odds = self._teacher[bags].mean(1).mul(self.BAG**0.5).softmax(-1)
        labels = torch.multinomial(odds, 1, generator=generator)
        return bags.view(steps, self.BATCH, self.BAG), labels.view(steps, self.BATCH)

    def loss(self, weights: Weights, bags: Tensor, labels: Tensor) -> Tensor:
        mean = _lookup(weights["words"], bags).mean(-2)
        return _losses(torch.baddbmm(weights["bias"][:, None], mean, weights["head"]), labels)

    def held_out(self, weights: Weights) -> Tensor:
        seeds = len(weights["head"])
        return self.loss(
            weights, *(x.flatten(0, 1).expand(seeds, -1, *x.shape[2:]) for x in self._held_out)
        )


class Digits:
    """A convolutional network on scikit-learn's digits, with noise of its own at every step."""

    NOISE, BATCH, CHANNELS = 0.2, 16, (12, 24)

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        images, labels = (torch.as_tensor(x) for x in load_digits(return_X_y=True))
        images = images.float().view(-1, 8, 8) / 16
        held_out = torch.arange(len(images)) % 3 == 0
        self._images, self._labels = images[~held_out], labels[~held_out]
        noise = torch.randn(images[held_out].shape, generator=torch.Generator().manual_seed(0))
        self._held_out = images[held_out] + self.NOISE * noise, labels[held_out]

    def init(self, generator: torch.Generator) -> Weights:
        first, second = self.CHANNELS
        return {
            "conv1": _linear(generator, 9, first),
            "bias1": torch.zeros(first),
            "conv2": _linear(generator, 9 * first, second),
            "bias2": torch.zeros(second),
            "head": _linear(generator, 4 * second, 10),
            "bias": torch.zeros(10),
        }

    def draw(self, generator: torch.Generator, steps: int) -> tuple[Tensor, ...]:
        chosen = torch.randint(len(self._images), (steps, self.BATCH), generator=generator)
        return chosen, torch.randn(steps, self.BATCH, 8, 8, generator=generator)

    def loss(self, weights: Weights, chosen: Tensor, noise: Tensor) -> Tensor:
        images = self._images[chosen] + self.NOISE * noise
        return self._loss(weights, images, self._labels[chosen])

    def held_out(self, weights: Weights) -> Tensor:
        seeds = len(weights["head"])
        images, labels = self._held_out
        return self._loss(weights, images.expand(seeds, -1, -1, -1), labels.expand(seeds, -1))

    def _loss(self, weights: Weights, images: Tensor, labels: Tensor) -> Tensor:
        seeds, batch = labels.shape
        x = images.reshape(seeds * batch, 1, 8, 8)
        for name, side in (("1", 8), ("2", 4)):
            patches = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(seeds, -1, 9 * x.shape[1])
            x = torch.baddbmm(weights[f"bias{name}"][:, None], patches, weights[f"conv{name}"])
            x = x.view(seeds * batch, side, side, -1).permute(0, 3, 1, 2)
            x = F.avg_pool2d(F.gelu(x), 2)
        x = x.reshape(seeds, batch, -1)
        return _losses(torch.baddbmm(weights["bias"][:, None], x, weights["head"]), labels)


TASKS = {
    "bytes": Task(Bytes, 500, 4e-3),
    "zipf": Task(Zipf, 1000, 1e-2),
    "digits": Task(Digits, 1000, 4e-3),
}
