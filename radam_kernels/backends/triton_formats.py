"""Loads, stores and conversions of every dtype and format in Triton; csrc/core/formats.h in C++."""

import triton
import triton.language as tl

from .. import formats
from ..modules import cpu

# Kernels see constants of the module only as tl.constexpr.
# Codes: dtypes, and then formats.
_FLOAT32, _BFLOAT16, _FLOAT16, _FLOAT64, _BFLOAT16_STOCHASTIC, _MASTER24, _MASTER32, _BLOCK8 = (
    tl.constexpr(i) for i in range(len(cpu.dtypes) + len(cpu.formats))
)
_BLOCK = tl.constexpr(formats.BLOCK)
# The moments, by the span of the exponents in their codes of block8.
_M, _V = tl.constexpr(15), tl.constexpr(31)


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    # bfloat16 travels as its bits: the interpreter would truncate instead of rounding.
    if DTYPE == _FLOAT32:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif DTYPE == _FLOAT16:
        pointer = address.to(tl.pointer_type(tl.float16))
    elif DTYPE == _FLOAT64:
        pointer = address.to(tl.pointer_type(tl.float64))
    elif DTYPE == _BLOCK8:
        pointer = address.to(tl.pointer_type(tl.uint8))
    else:
        pointer = address.to(tl.pointer_type(tl.uint16))
    # Here and not at the call, where Triton before 3.9 forgets it.
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _remainder_pointer(address, PARAM: tl.constexpr, ALIGNED: tl.constexpr):
    if PARAM == _MASTER24:
        pointer = address.to(tl.pointer_type(tl.int8))
    else:
        pointer = address.to(tl.pointer_type(tl.int16))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _widen(x):
    if x.dtype == tl.uint16:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.float16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def _narrow(x, DTYPE: tl.constexpr):
    if DTYPE == _BFLOAT16:
        u = x.to(tl.uint32, bitcast=True)
        rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        nan = (u >> 16) | 0x40
        return tl.where((u & 0x7FFFFFFF) > 0x7F800000, nan, rounded).to(tl.uint16)
    elif DTYPE == _FLOAT16:
        return x.to(tl.float16)
    else:
        return x


@triton.jit
def _mix(x, high):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= (x >> 15) ^ high
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _random_words_of(key_low, key_high, upper, index):
    """The random words of elements whose indices have the same upper 32 bits."""
    low, high = key_low, key_high
    if upper != 0:
        low, high = _mix(key_low ^ upper, key_high), _mix(key_high ^ upper, key_low)
    return _mix(index * 0x9E3779B1 + low, high)


@triton.jit
def _random_words(key_low, key_high, first, BLOCK: tl.constexpr, SAME_UPPER: tl.constexpr):
    """The random words of BLOCK elements, of which the first has the index `first`.

    SAME_UPPER: whether their indices are known to have the same upper 32 bits.
    """
    begin, upper = first.to(tl.uint32), (first >> 32).to(tl.uint32)
    index = begin + tl.arange(0, BLOCK).to(tl.uint32)
    words = _random_words_of(key_low, key_high, upper, index)
    if not SAME_UPPER:  # noqa: SIM102 (that is known when this is compiled)
        if begin + (BLOCK - 1) < begin:
            after = _random_words_of(key_low, key_high, upper + 1, index)
            words = tl.where(index < begin, after, words)
    return words


@triton.jit
def _random16(words, MOMENT: tl.constexpr):
    return (words & 0xFF00) | 0x80 if MOMENT == _M else words >> 16


@triton.jit
def _round_stochastically(x, random16):
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(x == x, (bits + random16) >> 16, 0x7FC0).to(tl.uint16)


@triton.jit
def _load_weight(pointer, remainder_pointer, mask, PARAM: tl.constexpr):
    weight = _widen(tl.load(pointer, mask))
    if remainder_pointer is not None:
        remainder = tl.load(remainder_pointer, mask).to(tl.int32)
        if PARAM == _MASTER24:
            remainder <<= 8
        bits = weight.to(tl.uint32, bitcast=True) + remainder.to(tl.uint32, bitcast=True)
        joined = bits.to(tl.float32, bitcast=True)
        # NaN if the weight is; or if it was set to zero or infinity since, and the sum is neither.
        weight = tl.where(joined == joined, joined, weight)
    return weight


@triton.jit
def _store_weight(pointer, remainder_pointer, x, words, mask, PARAM: tl.constexpr):
    if remainder_pointer is not None:
        bits = x.to(tl.uint32, bitcast=True)
        if PARAM == _MASTER24:
            bits += words & 0xFF
        bits = tl.where(x == x, bits, 0x7FC00000)
        tl.store(pointer, ((bits + 0x8000) >> 16).to(tl.uint16), mask)
        remainder = (bits >> 8).to(tl.int8) if PARAM == _MASTER24 else bits.to(tl.int16)
        tl.store(remainder_pointer, remainder, mask)
    elif PARAM == _BFLOAT16_STOCHASTIC:
        random16 = ((words ^ (words >> 15)) * 0x2C1B3C6D) >> 16
        tl.store(pointer, _round_stochastically(x, random16), mask)
    else:
        tl.store(pointer, _narrow(x, PARAM), mask)


@triton.jit
def _each(x, BLOCK: tl.constexpr):
    """A number for each of block8's blocks, repeated for their elements."""
    repeated = tl.broadcast_to(tl.expand_dims(x, 1), (BLOCK // _BLOCK, _BLOCK))
    return tl.reshape(repeated, (BLOCK,))


@triton.jit
def _load_moment(
    pointer, exponent_pointer, mask, exponent_mask, MOMENT: tl.constexpr, BLOCK: tl.constexpr
):
    stored = tl.load(pointer, mask)
    if exponent_pointer is None:
        return _widen(stored)
    else:
        code = stored.to(tl.uint32)
        exponent = tl.load(exponent_pointer, exponent_mask).to(tl.uint32)
        top = code & 0x7F if MOMENT == _M else code
        scale = _each((exponent - MOMENT) << 23, BLOCK)
        nan = _each(tl.where(exponent == 255, 0x7FC00000, 0).to(tl.uint32), BLOCK)
        bits = tl.where(top == 0, 0, (top << 20) + scale) | nan
        if MOMENT == _M:
            bits |= code >> 7 << 31
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _store_moment(
    pointer, exponent_pointer, x, words, mask, exponent_mask, STATE: tl.constexpr,
    MOMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if exponent_pointer is not None:
        bits = x.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        counted = magnitude if mask is None else tl.where(mask, magnitude, 0)
        largest = tl.max(tl.reshape(counted, (BLOCK // _BLOCK, _BLOCK)), 1)
        exponent = ((largest + 0xFFFFF) >> 23).to(tl.int32)
        exponent = tl.minimum(tl.maximum(exponent, MOMENT + 1), 255)
        tl.store(exponent_pointer, exponent.to(tl.uint8), exponent_mask)
        base = _each(tl.where(exponent == 255, 512, exponent - MOMENT) << 3, BLOCK)
        top = ((magnitude + (_random16(words, MOMENT) << 4)) >> 20).to(tl.int32) - base
        if MOMENT == _M:
            code = tl.maximum(top, 0) | (bits >> 31 << 7).to(tl.int32)
        else:  # never 0, as it divides
            code = tl.maximum(top, tl.minimum(magnitude, 1).to(tl.int32))
        tl.store(pointer, code.to(tl.uint8), mask)
    elif STATE == _BFLOAT16_STOCHASTIC:
        tl.store(pointer, _round_stochastically(x, _random16(words, MOMENT)), mask)
    else:
        tl.store(pointer, _narrow(x, STATE), mask)
