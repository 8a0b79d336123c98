"""Emulations of other packages' formats, in torch operations on float32.

They are this project's own code, written from descriptions of the formats. They show what a format
does to a training, not what a package does: the update is RAdam's, and the rounding of every
intermediate operation is that of float32.

A codec stores float32 tensors of shape (..., n), n a multiple of 256, as a tuple of tensors.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from radam_kernels import formats

Stored = tuple[Tensor, ...]


class Codec(Protocol):
    """Stores float32 values, and gives them back as they were rounded."""

    def encode(self, x: Tensor) -> Stored: ...

    def decode(self, *stored: Tensor) -> Tensor: ...


def _groups(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Groups of that many neighbours, and the largest magnitude of each."""
    x = x.unflatten(-1, (-1, size))
    return x, x.abs().amax(-1, keepdim=True)


class Float32:
    def encode(self, x: Tensor) -> Stored:
        return (x,)

    def decode(self, x: Tensor) -> Tensor:
        return x


class BFloat16:
    """To nearest."""

    def encode(self, x: Tensor) -> Stored:
        return (x.bfloat16(),)

    def decode(self, x: Tensor) -> Tensor:
        return x.float()


class BFloat16Random:
    """Stochastic rounding with torch.randint, as torchao rounds weights."""

    def encode(self, x: Tensor) -> Stored:
        random16 = torch.randint(0, 1 << 16, x.shape)
        return (formats.round_stochastically(x, random16),)

    def decode(self, x: Tensor) -> Tensor:
        return x.float()


class Exact:
    """bfloat16 and 16 more bits: a float32 weight."""

    def encode(self, x: Tensor) -> Stored:
        return formats.split_weight(x)

    def decode(self, weight: Tensor, remainder: Tensor) -> Tensor:
        return formats.join_weight(weight, remainder)


class Kahan:
    """torch-optimi: bfloat16, and the error of its rounding in bfloat16."""

    def encode(self, x: Tensor) -> Stored:
        weight = x.bfloat16()
        return weight, (x - weight.float()).bfloat16()

    def decode(self, weight: Tensor, error: Tensor) -> Tensor:
        return weight.float() + error.float()


class ErrorInt8:
    """flashoptim: bfloat16, and its error in 127ths of half of the weight's last place."""

    def encode(self, x: Tensor) -> Stored:
        weight = x.bfloat16()
        error = (x - weight.float()) / self._half_place(weight) * 127
        return weight, (error + 0.5).floor().clamp(-127, 127).to(torch.int8)

    def decode(self, weight: Tensor, error: Tensor) -> Tensor:
        return weight.float() + error.float() / 127 * self._half_place(weight)

    @staticmethod
    def _half_place(weight: Tensor) -> Tensor:
        """Half of the last of 8 mantissa bits of each weight."""
        exponent = (weight.view(torch.int16) >> 7 & 0xFF).clamp(min=1).int() - 127
        return torch.ldexp(torch.ones_like(exponent), exponent - 8).float()


class SoftsignInt8:
    """flashoptim's exp_avg: int8 of 2x / (1 + |x|), x a share of its group's largest.

    Groups of 32, fp16 scales.
    """

    def encode(self, x: Tensor) -> Stored:
        x, largest = _groups(x, 32)
        largest = largest.clamp(min=1e-12)
        x = x / largest
        codes = (2 * x / (1 + x.abs()) * 127 + 0.5).floor().to(torch.int8)
        return codes, largest.half()

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        y = codes.float() / 127
        return (y / (2 - y.abs()) * scale.float()).flatten(-2)


class RootUint8:
    """flashoptim's exp_avg_sq: uint8 of the root, groups of 32, fp16 scales."""

    def encode(self, x: Tensor) -> Stored:
        x, largest = _groups(x.sqrt(), 32)
        largest = largest.clamp(min=1e-12)
        return (x / largest * 255 + 0.5).floor().to(torch.uint8), largest.half()

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return (codes.float() / 255 * scale.float()).square().flatten(-2)


def dynamic_values(*, signed: bool) -> Tensor:
    """The 256 values of bitsandbytes' 8-bit floats: leading zeros count decades, then a fraction.

    Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2015: middles of equal parts
    of (0.1, 1), twice as many in each decade as in the one below; and 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [*middles.tolist(), *(-middles if signed else middles[:0]).tolist()]
    return torch.tensor(sorted(values))


class Dynamic8:
    """bitsandbytes: the nearest of those values, blocks of 256, scales in float32."""

    def __init__(self, *, signed: bool) -> None:
        self._values = dynamic_values(signed=signed)
        self._middles = (self._values[:-1] + self._values[1:]) / 2

    def encode(self, x: Tensor) -> Stored:
        x, largest = _groups(x, 256)
        codes = torch.bucketize(x / largest.clamp(min=1e-38), self._middles)
        return codes.to(torch.uint8), largest

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return (self._values[codes.int()] * scale).flatten(-2)


class Float8:
    """torchao: e4m3 of values scaled by a block's largest, blocks of 256, scales in float32."""

    def encode(self, x: Tensor) -> Stored:
        x, largest = _groups(x, 256)
        scale = largest.clamp(min=1e-12) / 448
        return (x / scale).to(torch.float8_e4m3fn), scale

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return (codes.float() * scale).flatten(-2)


class Moments(NamedTuple):
    exp_avg: Codec
    exp_avg_sq: Codec


FLOAT32 = Moments(Float32(), Float32())
NEAREST = Moments(BFloat16(), BFloat16())
FLASH = Moments(SoftsignInt8(), RootUint8())
DYNAMIC = Moments(Dynamic8(signed=True), Dynamic8(signed=False))
FLOAT8 = Moments(Float8(), Float8())
