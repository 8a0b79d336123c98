"""Holds the formats for low memory to what they promise, and every kernel to the reference."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from radam_kernels import formats
from radam_kernels.backends import reference, triton_
from radam_kernels.formats import BLOCK, Key, LowMemory
from radam_kernels.modules import DTYPES, FORMAT_NAMES, cpu
from radam_kernels.schedule import Action, StepScalars
from tests.helpers import LOW_MEMORY_SETS, dtypes_id, same_bits
from tests.kernels.stepping import (
    CUDA,
    HOLD,
    MOMENTUM,
    RECTIFIED,
    SCALARS,
    SKIP,
    TRITON,
    Arena,
    Codes,
    Kernel,
    Tensors,
    make_kernels,
)

F32, BF16, F16, F64 = DTYPES
MOMENTS = ("exp_avg", "exp_avg_sq")
NAMES = ("param", "grad", "exp_avg", "exp_avg_sq", "remainder", *(f"{m}_exponent" for m in MOMENTS))
# Around vectors, and around blocks.
SIZES = (0, 1, 3, 15, 16, 17, 31, 32, 33, 127, 128, 129, 255, 256, 257, 384)
NO_CHANGE = StepScalars(1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, float(Action.RECTIFIED))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["cpu", CUDA])
def kernels(request) -> list[Kernel]:
    """The kernels of each backend."""
    return make_kernels(request.param)


@pytest.fixture(params=["triton", TRITON])
def triton(request) -> list[Kernel]:
    """Triton's kernel, interpreted or on a GPU."""
    return make_kernels(request.param)


by_codes = pytest.mark.parametrize("codes", LOW_MEMORY_SETS, ids=dtypes_id)
by_moment = pytest.mark.parametrize("moment", MOMENTS)


def code_of(*names: str) -> Codes:
    param, grad, state = (FORMAT_NAMES.index(name) for name in names)
    return param, grad, state


# A few sets that have every format, where a test is about something else.
FEW_SETS = [
    code_of("master24", "bfloat16", "block8"),
    code_of("bfloat16_stochastic", "float32", "bfloat16_stochastic"),
    code_of("master32", "bfloat16", "bfloat16"),
    code_of("float32", "float32", "block8"),
    code_of("master24", "float32", "float32"),
]
by_few_codes = pytest.mark.parametrize("codes", FEW_SETS, ids=dtypes_id)


# Segments, and steps of them.


class Segment(NamedTuple):
    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    extra: LowMemory

    def tensors(self) -> Tensors:
        return (*self[:4], *self.extra[:3])

    def clone(self) -> "Segment":
        tensors = [t if t is None else t.clone() for t in self.tensors()]
        return Segment(*tensors[:4], LowMemory(*tensors[4:], *self.extra[3:]))


def storage(format: str) -> torch.dtype:
    return torch.uint8 if format == "block8" else getattr(torch, format, BF16)


def encoded(
    codes: Codes, p: Tensor, g: Tensor, m: Tensor, v: Tensor, first_index: int = 0, key: int = 0
) -> Segment:
    """float32 values in the formats of a set."""
    format, _, state = (FORMAT_NAMES[code] for code in codes)
    n = len(p)
    words = formats.random_words(Key(1, 2), 3, 0, n, p.device)
    param, remainder = p.new_empty(n, dtype=storage(format)), None
    if format.startswith("master"):
        remainder = p.new_empty(n, dtype=formats.REMAINDERS[int(format.removeprefix("master"))])
    formats.encode_weight_(param, remainder, p, format, words)
    moments = [p.new_empty(n, dtype=storage(state)) for _ in MOMENTS]
    exponents = [None, None]
    if state == "block8":
        exponents = [p.new_empty(formats.blocks(n), dtype=torch.uint8) for _ in MOMENTS]
    for stored, exponent, values, moment in zip(moments, exponents, (m, v), MOMENTS, strict=True):
        formats.encode_moment_(stored, exponent, values, moment, state, words)
    extra = LowMemory(remainder, *exponents, first_index, key)
    return Segment(param, g.to(DTYPES[codes[1]]), *moments, extra)


def decoded(segment: Segment) -> tuple[Tensor, Tensor, Tensor]:
    """float32 weights and moments."""
    remainder, *exponents = segment.extra[:3]
    moments = zip(segment[2:4], exponents, MOMENTS, strict=True)
    return formats.decode_weight(segment.param, remainder), *(
        formats.decode_moment(*moment) for moment in moments
    )


def place(i: int) -> tuple[int, int]:
    """An index of the first element, and a key, that are those of no other segment."""
    return (0, 1, 127, 1000, 2**20 + 3)[i % 5], formats.parameter_key(i, i % 3)


def ordinary(n: int, codes: Codes, seed: int = 0) -> Segment:
    """Values as training has them, over many magnitudes."""
    random = torch.Generator().manual_seed(seed)
    p, g, m, v = (
        torch.randn(n, generator=random) * 10 ** (6 * torch.rand(n, generator=random) - 5)
        for _ in range(4)
    )
    return encoded(codes, p, g, m, v.abs(), *place(seed))


def any_bits(n: int, codes: Codes, seed: int = 0, small: bool = False) -> Segment:
    """Any bits in every tensor: inf, NaN, stale remainders and exponents that no step writes.

    Args:
        small: no weight or gradient of 2 or more, so that blocks stay finite.
    """
    random = np.random.default_rng(seed)

    def bits(dtype: torch.dtype, n: int = n) -> Tensor:
        return torch.from_numpy(random.integers(0, 256, n * dtype.itemsize, np.uint8)).view(dtype)

    format, _, state = (FORMAT_NAMES[code] for code in codes)
    p, g = bits(storage(format)), bits(DTYPES[codes[1]])
    if small:
        for x in (p, g):
            x.view(torch.uint8)[x.itemsize - 1 :: x.itemsize] &= 0xBF
    remainder, exponents = None, (None, None)
    if format.startswith("master"):
        remainder = bits(formats.REMAINDERS[int(format.removeprefix("master"))])
    if state == "block8":
        exponents = [bits(torch.uint8, formats.blocks(n)) for _ in MOMENTS]
    extra = LowMemory(remainder, *exponents, *place(seed))
    return Segment(p, g, bits(storage(state)), bits(storage(state)), extra)


def stepped_by_reference(segment: Segment, row: StepScalars, codes: Codes) -> Segment:
    result = segment.clone()
    reference.low_memory_update_(*result, row, codes)
    return result


def assert_equal(got: Tensors, want: Segment, codes: Codes, where: str) -> None:
    """To the bit. Of a block of block8 that is NaN, only that it is."""
    state = FORMAT_NAMES[codes[2]]
    for name, a, b in zip(NAMES, got, want.tensors(), strict=True):
        if b is None:
            continue
        if state == "block8" and name in MOMENTS:
            exponents = want.extra[1 + MOMENTS.index(name)]
            nan = exponents.repeat_interleave(BLOCK)[: len(b)] == 255
            a, b = a.masked_fill(nan, 0), b.masked_fill(nan, 0)
        # Formats write one NaN; dtypes may keep its payload.
        format = FORMAT_NAMES[codes[0] if name == "param" else codes[2]]
        integers = not b.is_floating_point() or format in cpu.formats
        same = torch.equal(*(x.view(torch.uint8) for x in (a, b))) if integers else same_bits(a, b)
        if not same:
            at = (a != b).nonzero().flatten()[:4]
            raise AssertionError(f"{where}: {name} differs at {at}: {a[at]} against {b[at]}")


def check(
    kernels: list[Kernel],
    segments: Sequence[Segment],
    scalars: Sequence[StepScalars],
    codes: Codes,
    which: Sequence[int] | None = None,
    offsets=None,
) -> list[Segment]:
    """Steps segments with every kernel, and holds each to the reference, which it returns."""
    which = which or [i % len(scalars) for i in range(len(segments))]
    # Keys of each row, as steps have them.
    scalars = [
        row._replace(key_low=float(key.low), key_high=float(key.high))
        for row, key in ((row, formats.step_key(7, i)) for i, row in enumerate(scalars))
    ]
    expected = [
        stepped_by_reference(segment, scalars[row], codes)
        for segment, row in zip(segments, which, strict=True)
    ]
    extras = [segment.extra for segment in segments]
    right = None  # the memory after a kernel that gave the bits of the reference
    for kernel in kernels:
        arena = Arena([segment.tensors() for segment in segments], kernel.device, offsets)
        kernel.launch(*arena.tables(which, extras), codes, np.array(scalars))
        if right is not None and torch.equal(arena.memory, right):
            continue
        for i, (got, want) in enumerate(zip(arena.read(), expected, strict=True)):
            where = f"{kernel.name}: segment {i} of {len(want.param)} with {scalars[which[i]]}"
            assert_equal(got, want, codes, where)
        right = arena.memory
    return expected


@by_codes
def test_every_size_form_and_action_in_one_table(kernels, codes):
    segments = [ordinary(n, codes, i) for i, n in enumerate(SIZES) for _ in SCALARS]
    check(kernels, segments, SCALARS, codes)


# Interpreted, Triton takes some 10 ms a program.
@by_few_codes
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_triton_in_every_form_and_action(triton, codes):
    segments = [ordinary(SIZES[i % len(SIZES)], codes, i) for i in range(len(SCALARS))]
    segments += [any_bits(5000, codes, i, small=i > 0) for i in range(3)]
    check(triton, segments, SCALARS, codes, [*range(len(SCALARS)), 0, 1, 4])


@by_few_codes
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_triton_where_streams_and_indices_start_anywhere(triton, codes):
    chunk = triton_.triton_kernel.CHUNK
    firsts = (3, 2**32 - chunk, 2**32 - chunk + 1, 2**32 - 300, 2**33 - 77, 2**40 + 3)
    segments = [
        segment._replace(extra=segment.extra._replace(first_index=first))
        for first in firsts
        for segment in [ordinary(chunk + 300, codes)]
    ]
    streams = len(segments[0].tensors())
    offsets = [(0,) * streams] * 3 + [(0,) * i + (1,) + (0,) * (streams - i - 1) for i in (0, 3, 4)]
    check(triton, segments, [RECTIFIED], codes, offsets=offsets)


@by_codes
def test_any_bits(kernels, codes):
    rows = range(len(SCALARS))
    segments = [any_bits(5000, codes, i, small=i % 4 > 0) for i in rows]
    stepped = check(kernels, segments, SCALARS, codes)
    values = torch.cat([torch.cat(decoded(segment)) for segment in stepped])
    assert values.isnan().any()
    assert values.isfinite().float().mean() > 0.3


@by_codes
def test_negative_second_moments(kernels, codes):
    """Which bfloat16 can hold; their root is NaN, and so is the weight."""
    p, g, m, v = (torch.linspace(-1, 1, 300) for _ in range(4))
    [stepped] = check(kernels, [encoded(codes, p, g, m, v)], [RECTIFIED], codes)
    if FORMAT_NAMES[codes[2]] != "block8":
        assert decoded(stepped)[0].isnan().any()


@by_codes
def test_streams_start_anywhere(kernels, codes):
    sizes = [16 // (1 if t is None else t.itemsize) for t in ordinary(1, codes).tensors()]
    alone = [
        tuple(k if i == stream else 0 for i in range(len(sizes)))
        for stream in range(len(sizes))
        for k in range(1, sizes[stream], 3)
    ]
    offsets = alone + [tuple(k % size for size in sizes) for k in range(1, 16)]
    segments = [ordinary(300, codes, i) for i in range(len(offsets))]
    check(kernels, segments, [RECTIFIED], codes, offsets=offsets)


@by_codes
def test_threads_divide_a_large_tensor(kernels, codes):
    check(kernels, [ordinary(100_003, codes)], [RECTIFIED], codes)


@by_few_codes
def test_threads_divide_elements_wherever_segments_end(kernels, codes):
    sizes = (5000, 0, 257, 12345, 0, 0, 3, 9999, 1, 8191, 1, 0, 20001, 0)
    segments = [ordinary(n, codes, i) for i, n in enumerate(sizes)]
    check(kernels, segments, SCALARS, codes)


@by_codes
def test_indices_near_and_beyond_32_bits(kernels, codes):
    firsts = [2**32 - k for k in (1, 16, 100, 128, 150, 299, 300, 301)]
    firsts += [2**32, 2**33 - 77, 2**40 + 3, 2**62]
    segments = [
        segment._replace(extra=segment.extra._replace(first_index=first))
        for first in firsts
        for segment in [ordinary(300, codes)]
    ]
    check(kernels, segments, [RECTIFIED], codes)


@by_codes
def test_many_steps_in_a_row(kernels, codes):
    segment = ordinary(1000, codes)
    expected = segment.clone()
    arenas = [Arena([segment.tensors()], kernel.device) for kernel in kernels]
    gradients = torch.Generator().manual_seed(1)
    for step in range(1, 31):
        key = formats.step_key(0, step)
        row = RECTIFIED if step > 5 else MOMENTUM
        row = row._replace(key_low=float(key.low), key_high=float(key.high))
        grad = torch.randn(1000, generator=gradients).to(expected.grad.dtype)
        expected.grad.copy_(grad)
        reference.low_memory_update_(*expected, row, codes)
        for kernel, arena in zip(kernels, arenas, strict=True):
            arena.read()[0][1].copy_(grad)
            kernel.launch(*arena.tables([0], [segment.extra]), codes, np.array([row]))
    for kernel, arena in zip(kernels, arenas, strict=True):
        assert_equal(arena.read()[0], expected, codes, kernel.name)


@by_codes
def test_a_skipped_step_writes_nothing_and_hold_keeps_the_weight(kernels, codes):
    segments = [any_bits(1000, codes, i) for i in range(2)]
    skipped, held = check(kernels, segments, [SKIP, HOLD], codes)
    for before, after in ((segments[0], skipped.tensors()), (segments[1], (held.param,))):
        for a, b in zip(before.tensors(), after, strict=False):
            assert a is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    if held.extra.remainder is not None:
        assert torch.equal(held.extra.remainder, segments[1].extra.remainder)


@pytest.mark.parametrize("format", ["master24", "master32"])
def test_weights_set_by_hand_are_read_without_their_stale_remainder(kernels, format):
    codes = code_of(format, "bfloat16", "float32")
    remainder = ordinary(1000, codes).extra.remainder
    p, g, m, v = torch.ones(1000), torch.zeros(1000), torch.zeros(1000), torch.ones(1000)
    segments = []
    for value in (0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0):
        segment = encoded(codes, p, g, m, v)
        segment.param.fill_(value)
        segment.extra.remainder.copy_(remainder)
        segments.append(segment)
    stepped = check(kernels, segments, [NO_CHANGE], codes)
    *zeros, inf, minus_inf, nan, one = (decoded(segment)[0] for segment in stepped)
    for x in zeros:
        assert (x.abs() < 1e-38).all()
        assert (x == 0).any()  # negative remainders of +0.0 count as 0, and so for -0.0
    assert (inf >= torch.finfo(BF16).max).all()
    assert (minus_inf <= torch.finfo(BF16).min).all()
    assert nan.isnan().all()
    assert ((one - 1).abs() <= 2**-8).all()


@by_moment
def test_kernels_keep_every_code_under_every_exponent(kernels, moment):
    """By a step that changes nothing, with three sets of random bits."""
    codes = code_of("float32", "float32", "block8")
    which = MOMENTS.index(moment)
    blocks, every = every_code(moment), every_exponent(moment)
    n = len(blocks) * len(every)
    # The other moment is zero.
    stored = [torch.zeros(n, dtype=torch.uint8) for _ in MOMENTS]
    exponents = [torch.full((n // BLOCK,), e, dtype=torch.uint8) for e in (16, 32)]
    stored[which] = blocks.repeat(len(every))
    exponents[which] = every.repeat_interleave(len(blocks) // BLOCK)
    zeros = torch.zeros(n)
    segments = [
        Segment(zeros, zeros, *stored, LowMemory(None, *exponents, 0, key)) for key in range(3)
    ]
    kept = stored[which]
    if moment == "exp_avg":  # the step adds 0 to it, which makes -0.0 a 0.0
        kept = torch.where(kept == 0x80, 0, kept)
    for stepped in check(kernels, segments, [NO_CHANGE], codes):
        assert torch.equal(stepped[2 + which], kept)
        assert torch.equal(stepped.extra[1 + which], exponents[which])


def test_the_cpu_kernel_refuses_incomplete_rows():
    codes = code_of("master32", "bfloat16", "block8")
    segment = ordinary(300, codes)
    arena = Arena([segment.tensors()], "cpu")
    rows, grads, low_memory = arena.tables([0], [segment.extra])
    scalars = np.array([RECTIFIED])

    def step(low_memory_address: int) -> None:
        tables = rows.ctypes.data, grads.ctypes.data
        cpu.step(*tables, 1, *codes, scalars.ctypes.data, 1, 1, 0, low_memory_address)

    step(low_memory.ctypes.data)
    with pytest.raises(ValueError, match="null"):
        step(0)
    for column, value in [(0, 0), (1, 0), (2, 0), (0, int(low_memory[0, 0]) + 1)]:
        broken = low_memory.copy()
        broken[0, column] = value
        before = arena.memory.clone()
        with pytest.raises(ValueError, match="segment 0 of 1"):
            step(broken.ctypes.data)
        assert torch.equal(arena.memory, before)


# The codecs.


def every_code(moment: str) -> Tensor:
    """All codes, in three blocks that each have the largest, which keeps the exponent."""
    largest = 0x7F if moment == "exp_avg" else 0xFF
    blocks = torch.full((3, BLOCK), largest, dtype=torch.uint8)
    codes = torch.arange(256, dtype=torch.uint8)
    for block, part in zip(blocks, codes.split(BLOCK - 1), strict=True):
        block[: len(part)] = part
    return blocks.flatten()


def every_exponent(moment: str) -> Tensor:
    """Of finite blocks."""
    return torch.arange(formats._SPANS[moment] + 1, 255, dtype=torch.uint8)


EDGES = (0, 1, 0x7FFF, 0x8000, 0xFFFF)


def same_words(n: int, random16: int) -> Tensor:
    """Words with these random bits in both halves."""
    return torch.full((n,), random16 << 16 | random16)


def hashed_words(n: int, seed: int = 0) -> Tensor:
    return formats.random_words(formats.step_key(0, seed + 1), 0, 0, n, torch.device("cpu"))


def floats(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(F32)


@by_moment
@pytest.mark.parametrize("random16", EDGES)
def test_a_decoded_code_is_encoded_as_itself(moment, random16):
    blocks, every = every_code(moment), every_exponent(moment)
    codes = blocks.repeat(len(every))
    exponents = every.repeat_interleave(len(blocks) // BLOCK)
    values = formats.decode_block8(codes, exponents, moment)
    assert torch.equal(values, values.to(BF16).float()), "a value that is no bfloat16"
    got = formats.encode_block8(values, moment, same_words(len(values), random16))
    assert torch.equal(got[0], codes)
    assert torch.equal(got[1], exponents)


def model_of_block8(block: np.ndarray, moment: str, random16: int) -> np.ndarray:
    """What a block of finite values becomes, in float64: exact for 24 + 16 bits."""
    if moment == "exp_avg":
        random16 = random16 & 0xFF00 | 0x80
    span = formats._SPANS[moment]
    magnitude = np.abs(block.astype(np.float64))
    binade = np.maximum(np.frexp(magnitude)[1] - 1.0, -126)
    unit = np.exp2(binade - 3)  # of a mantissa of 3 bits
    largest = np.max(np.ceil(magnitude / unit) * unit)
    top = max(np.frexp(largest)[1] - 1.0, span + 1 - 127)  # the block's exponent, without its bias
    rounded = np.floor(magnitude / unit + random16 / 65536) * unit
    least = np.exp2(top - span)  # the value whose code would be 0
    if moment == "exp_avg":
        return np.copysign(np.where(rounded > least, rounded, 0), block)
    return np.where(rounded > least, rounded, np.where(magnitude > 0, least * 1.125, 0))


MANTISSAS = [k << 20 | low for k in range(8) for low in (0, 1, 0x7FFFF, 0x80000, 0x80001, 0xFFFFF)]


@by_moment
@pytest.mark.parametrize("random16", EDGES)
def test_block8_is_what_a_model_in_float64_says(moment, random16):
    """For every exponent of a float32 and edges of the mantissa, in blocks with all larger ones."""
    mantissas = torch.tensor(MANTISSAS)
    random = torch.Generator().manual_seed(0)
    blocks = []
    for exponent in range(254):
        # The largest of each block, and what lies up to 40 exponents below it.
        for first in mantissas.split(8):
            below = exponent - torch.randint(0, 41, (BLOCK,), generator=random)
            picked = mantissas[torch.randint(0, len(mantissas), (BLOCK,), generator=random)]
            bits = (below.clamp(min=0) << 23) + picked
            bits[: len(first)] = torch.minimum(bits[: len(first)], (exponent << 23) + first)
            bits[0] = (exponent << 23) + first[0]
            blocks.append(bits)
    values = floats(torch.cat(blocks))
    if moment == "exp_avg":
        values[::3] *= -1
    got = formats.encode_block8(values, moment, same_words(len(values), random16))
    got = formats.decode_block8(*got, moment).double().numpy().reshape(-1, BLOCK)
    for block, decoded_block in zip(values.numpy().reshape(-1, BLOCK), got, strict=True):
        want = model_of_block8(block, moment, random16)
        assert np.array_equal(want, decoded_block), (block, want, decoded_block)


@by_moment
def test_one_value_that_is_not_finite_makes_its_block_nan_and_no_other(moment):
    for value in (torch.inf, -torch.inf, torch.nan, 1.95 * 2.0**127):
        x = torch.ones(3 * BLOCK)
        x[BLOCK + 5] = value
        codes, exponents = formats.encode_block8(x, moment, hashed_words(len(x)))
        y = formats.decode_block8(codes, exponents, moment)
        assert y[BLOCK : 2 * BLOCK].isnan().all()
        assert torch.equal(y[:BLOCK], x[:BLOCK])
        assert torch.equal(y[2 * BLOCK :], x[:BLOCK])


def test_a_second_moment_never_becomes_zero_and_a_zero_stays_zero():
    x = floats(torch.arange(1, BLOCK + 1))  # subnormals
    x[0], x[1], x[2] = 1e30, 0.0, 1e-10
    for random16 in EDGES:
        words = same_words(BLOCK, random16)
        y = formats.decode_block8(*formats.encode_block8(x, "exp_avg_sq", words), "exp_avg_sq")
        assert torch.equal(y == 0, x == 0)


@by_moment
def test_the_largest_of_a_block_grows_through_a_binade(moment):
    """Its exponent is taken after rounding: before, its code would be stuck at the largest."""
    x = torch.full((BLOCK,), 1.5)
    x[0] = 1.875  # the largest of its binade
    for step in range(2000):
        x[0] *= 1.001
        words = hashed_words(BLOCK, step)
        x = formats.decode_block8(*formats.encode_block8(x, moment, words), moment)
    assert 0.5 < x[0] / (1.875 * 1.001**2000) < 2
    assert (x[1:] == 1.5).all()


DRAWS = 4096


def assert_unbiased(x: Tensor, draws: Tensor, unit: Tensor, bias: float = 0.0) -> None:
    """The mean of draws [DRAWS, n] is x within 4 sigma, and `bias` units.

    Args:
        unit: the distance of the two values that x lies between.
    """
    x, draws, unit = x.double(), draws.double(), unit.double()
    assert ((draws - x).abs() <= unit).all()
    fraction = (x / unit) % 1
    sigma = unit * (fraction * (1 - fraction) / DRAWS).sqrt()
    error = (draws.mean(0) - x).abs()
    assert (error <= 4 * sigma + bias * unit).all(), (error / sigma).max()


def values_to_round() -> Tensor:
    """Over some binades, and near the ends of one."""
    x = torch.linspace(1, 64, 251)
    return torch.cat([x, torch.tensor([63.9999, 1.00001, 1.9999, 31.99999, 62.5])])


def binades(x: Tensor) -> Tensor:
    return torch.exp2(x.log2().floor())


def test_bfloat16_is_rounded_without_bias():
    x = values_to_round()
    words = hashed_words(DRAWS * len(x)).view(DRAWS, -1)
    each = x.expand(DRAWS, -1)
    unit = binades(x) * 2**-7
    for random_bits in (formats.random_weight16, formats.random_exp_avg_sq):
        draws = formats.round_stochastically(each, random_bits(words))
        assert_unbiased(x, draws.float(), unit)
    # 8 random bits and a half: 1/512 of a unit at most.
    draws = formats.round_stochastically(each, formats.random_exp_avg(words))
    assert_unbiased(x, draws.float(), unit, bias=2**-9)


def test_a_weight_of_24_bits_is_rounded_without_bias():
    x = values_to_round()
    words = hashed_words(DRAWS * len(x)).view(DRAWS, -1)
    draws = formats.split_weight(x.expand(DRAWS, -1), formats.random_weight8(words))
    assert_unbiased(x, formats.join_weight(*draws), binades(x) * 2**-15, bias=2**-9)


@by_moment
def test_block8_is_rounded_without_bias(moment):
    x = values_to_round()[-BLOCK:]
    words = hashed_words(DRAWS * BLOCK)
    draws = formats.encode_block8(x.repeat(DRAWS), moment, words)
    draws = formats.decode_block8(*draws, moment).view(DRAWS, BLOCK)
    assert_unbiased(x, draws, binades(x) * 2**-3, bias=2**-9 if moment == "exp_avg" else 0)


def assert_split_is_joined_again(bits: Tensor) -> None:
    x = floats(bits)
    weight, remainder = formats.split_weight(x)
    joined = formats.join_weight(weight, remainder)
    nan = x.isnan()
    assert torch.equal(joined.view(torch.int32)[~nan], x.view(torch.int32)[~nan])
    assert weight[nan].isnan().all()
    assert joined[nan].isnan().all()
    ulp = 2.0 ** (((bits >> 23) & 0xFF).clamp(min=1) - 127 - 7).double()
    finite = x.isfinite() & weight.isfinite()
    error = (weight[finite].double() - x[finite].double()).abs()
    assert (error <= ulp[finite] / 2).all()


def test_a_float32_is_a_bfloat16_and_a_remainder():
    """A sample of 2^24 patterns, and the edges of all exponents."""
    sample = torch.arange(0, 2**32, 257)
    edges = torch.arange(0, 2**32, 2**16)[:, None] + torch.arange(-2, 3)
    middles = edges + 2**15
    assert_split_is_joined_again(sample)
    assert_split_is_joined_again(torch.cat([edges, middles]).flatten() % 2**32)


@pytest.mark.slow
def test_every_seventeenth_float32_is_a_bfloat16_and_a_remainder():
    for first in range(0, 2**32, 17 * 2**18):
        assert_split_is_joined_again(torch.arange(first, min(first + 17 * 2**18, 2**32), 17))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
def test_a_stale_remainder_makes_no_nan(dtype):
    limits = torch.iinfo(dtype)
    remainders = torch.arange(limits.min, limits.max + 1, dtype=dtype)
    for value in (0.0, -0.0, torch.inf, -torch.inf):
        weights = torch.full((len(remainders),), value, dtype=BF16)
        joined = formats.join_weight(weights, remainders)
        assert not joined.isnan().any()
        kept = remainders < 0 if value in (torch.inf, -torch.inf) else remainders > 0
        assert torch.equal(
            joined[~kept].view(torch.int32), weights.float()[~kept].view(torch.int32)
        )
        assert torch.equal(joined.signbit(), weights.signbit())
    nan = torch.full((len(remainders),), torch.nan, dtype=BF16)
    assert formats.join_weight(nan, remainders).isnan().all()


# The stall: a second moment must decay under zero gradients.


def decay_of(kernel: Kernel, codes: Codes, steps: int = 1000) -> tuple[float, float]:
    """The means of v and of sqrt(v) after steps with zero gradients, against exact ones."""
    n = 2**15
    random = torch.Generator().manual_seed(0)
    v = torch.exp(torch.randn(n, generator=random)) * 1e-6
    segment = encoded(codes, torch.zeros(n), torch.zeros(n), torch.zeros(n), v)
    exact = decoded(segment)[2].double() * 0.999**steps
    arena = Arena([segment.tensors()], kernel.device)
    tables = arena.tables([0], [segment.extra] if set(codes) - set(range(len(DTYPES))) else ())
    for step in range(1, steps + 1):
        key = formats.step_key(0, step)
        row = HOLD._replace(key_low=float(key.low), key_high=float(key.high))
        kernel.launch(*tables, codes, np.array([row]))
    tensors = arena.read()[0]
    v = decoded(Segment(*tensors[:4], LowMemory(*tensors[4:])))[2].double()
    return (v.mean() / exact.mean()).item(), (v.sqrt().mean() / exact.sqrt().mean()).item()


def decays(mean: float, mean_of_roots: float) -> bool:
    return abs(mean - 1) < 0.01 and abs(mean_of_roots - 1) < 0.03


@pytest.mark.parametrize("state", ["bfloat16_stochastic", "block8"])
def test_second_moments_decay(kernels, state):
    assert decays(*decay_of(kernels[0], code_of("master32", "bfloat16", state)))


@pytest.mark.parametrize("param", ["master32", "bfloat16"])
def test_second_moments_rounded_to_nearest_do_not_decay(kernels, param):
    assert not decays(*decay_of(kernels[0], code_of(param, "bfloat16", "bfloat16")))


# The hash.


def words_of(step: int, ordinal: int, first_index: int, n: int = 1 << 16) -> np.ndarray:
    key = formats.step_key(0, step)
    parameter = formats.parameter_key(ordinal, 0)
    words = formats.random_words(key, parameter, first_index, n, torch.device("cpu"))
    return words.numpy().astype(np.uint32)


def bits_of_words(words: np.ndarray) -> np.ndarray:
    """[n, 32] of -1 and 1."""
    return np.unpackbits(words.view(np.uint8).reshape(-1, 4), axis=1).astype(np.float64) * 2 - 1


def largest_z(a: np.ndarray, b: np.ndarray) -> float:
    """Of the correlations of each bit of one with each bit of the other."""
    return np.abs(a.T @ b).max() / len(a) ** 0.5


INDICES = (0, 12345, 2**32 - 2**15, 2**32, 2**33, 5 * 2**32 + 1)


@pytest.mark.parametrize("first_index", INDICES)
def test_bits_are_fair_and_neighbours_independent(first_index):
    bits = bits_of_words(words_of(3, 5, first_index))
    assert largest_z(np.ones((len(bits), 1)), bits) < 4.5
    for lag in (1, 2, 3, 4, 8, 64, 128):
        assert largest_z(bits[:-lag], bits[lag:]) < 5.5, lag
    # Of 16 bits each, as weights and second moments take them: all values are as frequent.
    for part in (formats.random_weight16, formats.random_exp_avg_sq):
        values = part(torch.from_numpy(words_of(3, 5, first_index).astype(np.int64)))
        counts = torch.bincount(values >> 8, minlength=256).double()
        expected = len(bits) / 256
        assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 5 * (2 * 255) ** 0.5


def test_the_bits_of_the_streams_are_independent():
    words = torch.from_numpy(words_of(3, 5, 0).astype(np.int64))
    weight, exp_avg, exp_avg_sq = (
        bits_of_words(part(words).numpy().astype(np.uint32))
        for part in (formats.random_weight16, formats.random_exp_avg, formats.random_exp_avg_sq)
    )
    # numpy has the bytes of a word from the lowest, each from its highest bit.
    weight, exp_avg_sq, exp_avg = weight[:, :16], exp_avg_sq[:, :16], exp_avg[:, 8:16]
    assert largest_z(weight, exp_avg) < 5
    assert largest_z(weight, exp_avg_sq) < 5
    assert largest_z(exp_avg, exp_avg_sq) < 5


@pytest.mark.parametrize(
    "other",
    [(4, 5, 0), (3, 6, 0), (5, 3, 0), (3, 5, 2**32), (3, 5, 2**33), (4, 5, 2**32)],
    ids=str,
)
def test_steps_parameters_and_upper_indices_draw_independently(other):
    a, b = bits_of_words(words_of(3, 5, 0)), bits_of_words(words_of(*other))
    assert largest_z(a, b) < 5.5
    assert largest_z(a[:-1], b[1:]) < 5.5


def test_no_two_steps_or_parameters_share_a_key():
    """At seed 0, and none is the key without a step and a parameter."""

    def joined(key: Key) -> int:
        return key.high << 32 | key.low

    steps = np.array([joined(formats.step_key(0, t)) for t in range(1, 2001)], np.uint64)
    parameters = np.array([formats.parameter_key(i, 0) for i in range(2000)], np.uint64)
    keys = np.sort((steps[:, None] ^ parameters).ravel())
    assert (keys[1:] != keys[:-1]).all()
    assert keys[0] != 0
