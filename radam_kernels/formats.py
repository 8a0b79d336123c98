"""The formats for low memory in torch operations: what the kernels must match bit for bit.

Three codecs around the update, in integer operations only; csrc/core/formats.h is the same in C++.

- A float32 weight is a bfloat16 and a remainder: int16, or int8 with stochastic rounding.
- bfloat16 with stochastic rounding: the bits that are cut off carry into the others with the
  probability that they stand for, so that updates below a bfloat16's resolution count on average.
- "block8": 8-bit floats, and for each block of 128 the largest exponent. A code is the top of a
  float32 (exp_avg: sign, 4 exponent bits, 3 mantissa bits; exp_avg_sq: 5 and 3), its exponent
  counted down from the block's. With power-of-two scales a value that does not change keeps its
  code, whatever random bits it is rounded with; scaled by a maximum it would be rounded again, and
  wander, at every step.

Random bits are a hash of (seed, step, parameter, element), so they are the same on every backend,
for any number of threads, and after a resume.

Tensors of bits here are int64 with values in [0, 2^32), as torch has few operations on uint32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
REMAINDERS = {24: torch.int8, 32: torch.int16}  # dtype of the remainder, by `master_weights`
_MASK = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_DROPPED = 20  # mantissa bits that a code of block8 lacks
_SPANS = {"exp_avg": 15, "exp_avg_sq": 31}  # exponents of a block8 code, less one
LEAST_EXPONENT = {moment: span + 1 for moment, span in _SPANS.items()}  # of a block


class Key(NamedTuple):
    """Two uint32: the key of a step, or of a parameter in a step."""

    low: int
    high: int


def splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def step_key(seed: int, step: float) -> Key:
    key = splitmix64(seed << 32 ^ int(step))
    return Key(key & _MASK, key >> 32)


def parameter_key(ordinal: int, shard: int) -> int:
    """Hashed twice, so that it is not the key of a step.

    Args:
        ordinal: the parameter's place among all parameters of the optimizer.
        shard: tells apart shards that have no index in the whole parameter.
    """
    return splitmix64(splitmix64(shard << 32 | ordinal))


def _mix(x: Tensor, high: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15) ^ high
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def random_words(
    step: Key, parameter: int, first_index: int, numel: int, device: torch.device
) -> Tensor:
    """The random word of each of `numel` elements from `first_index`."""
    index = torch.arange(first_index, first_index + numel, device=device)
    low = torch.full_like(index, step.low ^ (parameter & _MASK))
    high = torch.full_like(index, step.high ^ (parameter >> 32))
    # Beyond 2^32 elements the upper half of the index is hashed into the key.
    upper, index = index >> 32, index & _MASK
    folded_low, folded_high = _mix(low ^ upper, high), _mix(high ^ upper, low)
    low = torch.where(upper == 0, low, folded_low)
    high = torch.where(upper == 0, high, folded_high)
    return _mix((index * 0x9E3779B1 + low) & _MASK, high)


# What the streams take of a word. exp_avg has 8 bits, and half of the last: its error averages out.
# exp_avg_sq needs all 16, or it decays too fast. A bfloat16 weight has 16 of its own.


def random_exp_avg(words: Tensor) -> Tensor:
    return words & 0xFF00 | 0x80


def random_exp_avg_sq(words: Tensor) -> Tensor:
    return words >> 16


def random_weight16(words: Tensor) -> Tensor:
    return ((words ^ (words >> 15)) * 0x2C1B3C6D & _MASK) >> 16


def random_weight8(words: Tensor) -> Tensor:
    return words & 0xFF


NEAREST_WORD = 0x80008000  # a word of which both moments take half: ties away from zero

RANDOM_MOMENT = {"exp_avg": random_exp_avg, "exp_avg_sq": random_exp_avg_sq}


def bits_of(x: Tensor) -> Tensor:
    """The bits of a float32 tensor."""
    return x.view(torch.int32).long() & _MASK


def _float_of(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def _is_nan(bits: Tensor) -> Tensor:
    return (bits & 0x7FFFFFFF) > 0x7F800000


def _bfloat16_of(bits: Tensor) -> Tensor:
    return bits.to(torch.int16).view(torch.bfloat16)


def round_stochastically(x: Tensor, random16: Tensor) -> Tensor:
    """float32 as bfloat16: up in magnitude if the bits cut off and 16 random ones carry."""
    bits = bits_of(x)
    return _bfloat16_of(torch.where(_is_nan(bits), 0x7FC0, (bits + random16) >> 16))


def split_weight(x: Tensor, random8: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A float32 as bfloat16 and int16; or with random bits as bfloat16 and int8, rounded.

    The bfloat16 is the nearest, ties away from zero: ties to even could not be joined again.
    """
    bits = bits_of(x)
    rounded = bits if random8 is None else bits + random8
    bits = torch.where(_is_nan(bits), 0x7FC00000, rounded)
    weight = _bfloat16_of((bits + 0x8000) >> 16)
    if random8 is None:
        return weight, bits.to(torch.int16)
    return weight, (bits >> 8).to(torch.int8)


def join_weight(weight: Tensor, remainder: Tensor) -> Tensor:
    """The float32 of a bfloat16 weight and its remainder.

    A weight that was set by hand has a stale remainder, of at most half its last place. Set to zero
    or infinity, it could become NaN: then the remainder counts as 0.
    """
    high = weight.view(torch.int16).long()
    rest = remainder.long() << (8 if remainder.dtype == torch.int8 else 0)
    magnitude = high & 0x7FFF
    stale = (magnitude == 0) & (rest < 0) | (magnitude == 0x7F80) & (rest > 0)
    return _float_of((high << 16) + torch.where(stale, 0, rest))


def convert_remainder(remainder: Tensor, dtype: torch.dtype) -> Tensor:
    """Between int16 and int8, which loses the lower half."""
    if remainder.dtype == dtype:
        return remainder
    wide = remainder.to(torch.int16)  # from int32, too, where a state dict has it
    if dtype == torch.int8:
        return (wide >> 8).to(dtype)
    return wide << 8 if remainder.dtype == torch.int8 else wide


def blocks(numel: int) -> int:
    return -(-numel // BLOCK)


def encode_block8(x: Tensor, moment: str, words: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and exponents, uint8, of float32 [n].

    An exponent is that of the largest element after rounding up, so that this one never overflows.
    255, and NaN for the whole block, if an element is not finite.

    Args:
        moment: "exp_avg" or "exp_avg_sq", which has no sign.
    """
    span = _SPANS[moment]
    bits = bits_of(x)
    magnitude = bits & 0x7FFFFFFF
    padded = torch.nn.functional.pad(magnitude, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    exponents = (padded.amax(1) + ((1 << _DROPPED) - 1) >> 23).clamp(LEAST_EXPONENT[moment], 255)
    each = exponents.repeat_interleave(BLOCK)[: len(x)]
    base = torch.where(each == 255, 512, each - span) << 3
    top = (magnitude + (RANDOM_MOMENT[moment](words) << 4) >> _DROPPED) - base
    if moment == "exp_avg":
        codes = top.clamp(min=0) | bits >> 31 << 7
    else:
        codes = torch.maximum(top, magnitude.clamp(max=1))  # never 0, as it divides
    return codes.to(torch.uint8), exponents.to(torch.uint8)


def decode_block8(codes: Tensor, exponents: Tensor, moment: str) -> Tensor:
    """float32 [n]; every value but NaN is a bfloat16."""
    code = codes.long()
    top = code & 0x7F if moment == "exp_avg" else code
    each = exponents.long().repeat_interleave(BLOCK)[: len(codes)]
    bits = torch.where(top == 0, 0, (top << _DROPPED) + (each - _SPANS[moment] << 23))
    bits = torch.where(each == 255, bits | 0x7FC00000, bits)
    return _float_of(bits | (code >> 7 << 31) if moment == "exp_avg" else bits)


class LowMemory(NamedTuple):
    """What a parameter has beside the four tensors of a plain dtype, as csrc/core/segment.h has it.

    Tensors are one-dimensional here, or None where the format has none.
    """

    remainder: Tensor | None = None
    exp_avg_exponent: Tensor | None = None
    exp_avg_sq_exponent: Tensor | None = None
    first_index: int = 0  # of the first element, in the whole parameter
    key: int = 0  # parameter_key()


def in_memory_order(tensor: Tensor) -> Tensor:
    """A dense tensor as a vector in the order of its memory: that of indices and blocks."""
    return tensor.as_strided((tensor.numel(),), (1,))


def decode_weight(weight: Tensor, remainder: Tensor | None) -> Tensor:
    return weight.float() if remainder is None else join_weight(weight, remainder)


def encode_weight_(
    weight: Tensor, remainder: Tensor | None, values: Tensor, format: str, words: Tensor
) -> None:
    """Stores float32 values in a weight of `format`: a name of `_cpu.dtypes` or `_cpu.formats`."""
    if remainder is not None:
        random8 = random_weight8(words) if format == "master24" else None
        high, low = split_weight(values, random8)
        weight.copy_(high)
        remainder.copy_(low)
    elif format == "bfloat16_stochastic":
        weight.copy_(round_stochastically(values, random_weight16(words)))
    else:
        weight.copy_(values)


def decode_moment(stored: Tensor, exponents: Tensor | None, moment: str) -> Tensor:
    return stored.float() if exponents is None else decode_block8(stored, exponents, moment)


def encode_moment_(
    stored: Tensor,
    exponents: Tensor | None,
    values: Tensor,
    moment: str,
    format: str,
    words: Tensor,
) -> None:
    """Stores float32 values in a moment of `format`: a name of `_cpu.dtypes` or `_cpu.formats`."""
    if exponents is not None:
        codes, found = encode_block8(values, moment, words)
        stored.copy_(codes)
        exponents.copy_(found)
    elif format == "bfloat16_stochastic":
        stored.copy_(round_stochastically(values, RANDOM_MOMENT[moment](words)))
    else:
        stored.copy_(values)
