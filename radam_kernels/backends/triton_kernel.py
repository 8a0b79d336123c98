"""The element update in Triton, and the kernels; csrc/core/update.h is the same in C++."""

import math

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..modules import DTYPES, cpu
from ..schedule import Action, StepScalars
from .triton_formats import (
    _BLOCK,
    _BLOCK8,
    _FLOAT64,
    _M,
    _MASTER24,
    _MASTER32,
    _V,
    _load_moment,
    _load_weight,
    _pointer,
    _random_words,
    _remainder_pointer,
    _store_moment,
    _store_weight,
    _widen,
)
from .upload import Upload

# Elements that one program steps, and its warps; bench/gpu/tune.py measures others.
CHUNK, WARPS = 2048, 4

# Kernels see constants of the module only as tl.constexpr.
_SKIP = tl.constexpr(int(Action.SKIP))
_HOLD = tl.constexpr(int(Action.HOLD))
_MOMENTUM = tl.constexpr(int(Action.MOMENTUM))
_RECTIFIED = tl.constexpr(int(Action.RECTIFIED))
_SEGMENT_WIDTH = tl.constexpr(len(cpu.segment_fields))
_PARAM, _EXP_AVG, _EXP_AVG_SQ, _NUMEL, _SCALARS = (
    tl.constexpr(cpu.segment_fields.index(name))
    for name in ("param", "exp_avg", "exp_avg_sq", "numel", "scalars")
)
_LOW_MEMORY_WIDTH = tl.constexpr(len(cpu.low_memory_fields))
_REMAINDER, _EXP_AVG_EXPONENT, _EXP_AVG_SQ_EXPONENT, _FIRST_INDEX, _PARAMETER_KEY = (
    tl.constexpr(cpu.low_memory_fields.index(name))
    for name in ("remainder", "exp_avg_exponent", "exp_avg_sq_exponent", "first_index", "key")
)
_SCALARS_WIDTH = tl.constexpr(len(StepScalars._fields))
_FIELDS = {name: tl.constexpr(i) for i, name in enumerate(StepScalars._fields)}
_GRAD_SCALE, _WEIGHT_DECAY, _DECAY = (_FIELDS[n] for n in ("grad_scale", "weight_decay", "decay"))
_ONE_MINUS_BETA1, _BETA2 = _FIELDS["one_minus_beta1"], _FIELDS["beta2"]
_ONE_MINUS_BETA2, _EPS = _FIELDS["one_minus_beta2"], _FIELDS["eps"]
_STEP_SIZE, _ACTION = _FIELDS["step_size"], _FIELDS["action"]
_KEY_LOW, _KEY_HIGH = _FIELDS["key_low"], _FIELDS["key_high"]


@triton.jit
def _sqrt(x):
    # sqrt_rn knows no float64, where the plain one is exact already; likewise for division.
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:  # without it, both returns are compiled
        return tl.sqrt_rn(x)


@triton.jit
def _divide(a, b):
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _radam_update(p, g, m, v, s, l2, action):
    """One RAdam step of a block; `s` holds the scalars in the dtype of the computation."""
    grad_scale, weight_decay, decay, one_minus_beta1, beta2, one_minus_beta2, eps, step_size = s
    g = g * grad_scale
    if l2:
        g = g + weight_decay * p
    p = p * decay
    m = m + one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * (g * g)
    if action == _RECTIFIED:
        p = p - step_size * _divide(m, _sqrt(v) + eps)
    elif action == _MOMENTUM:
        p = p - step_size * m
    return p, m, v


@triton.jit
def _step_block(
    param, grad, exp_avg, exp_avg_sq, extra, first, numel, s, l2, action,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Steps BLOCK elements; `extra` as radam_step_kernel makes it."""
    at = first + tl.arange(0, BLOCK)
    mask = None if ALIGNED else at < numel
    p_ptr, g_ptr = _pointer(param, PARAM, ALIGNED) + at, _pointer(grad, GRAD, ALIGNED) + at
    m_ptr, v_ptr = _pointer(exp_avg, STATE, ALIGNED) + at, _pointer(exp_avg_sq, STATE, ALIGNED) + at
    r_ptr, m_exponent_ptr, v_exponent_ptr, exponent_mask, words = None, None, None, None, None
    if extra is not None:
        remainder, exp_avg_exponent, exp_avg_sq_exponent, first_index, key_low, key_high = extra
        if (PARAM == _MASTER24) | (PARAM == _MASTER32):
            r_ptr = _remainder_pointer(remainder, PARAM, ALIGNED) + at
        if STATE == _BLOCK8:
            block = first // _BLOCK + tl.arange(0, BLOCK // _BLOCK)
            exponent_mask = None if ALIGNED else block * _BLOCK < numel
            m_exponent_ptr = exp_avg_exponent.to(tl.pointer_type(tl.uint8)) + block
            v_exponent_ptr = exp_avg_sq_exponent.to(tl.pointer_type(tl.uint8)) + block
    p = _load_weight(p_ptr, r_ptr, mask, PARAM)
    g = _widen(tl.load(g_ptr, mask))
    m = _load_moment(m_ptr, m_exponent_ptr, mask, exponent_mask, _M, BLOCK)
    v = _load_moment(v_ptr, v_exponent_ptr, mask, exponent_mask, _V, BLOCK)
    if extra is not None:
        words = _random_words(key_low, key_high, first_index + first, BLOCK, ALIGNED)
    p, m, v = _radam_update(p, g, m, v, s, l2, action)
    if action != _HOLD:
        _store_weight(p_ptr, r_ptr, p, words, mask, PARAM)
    _store_moment(m_ptr, m_exponent_ptr, m, words, mask, exponent_mask, STATE, _M, BLOCK)
    _store_moment(v_ptr, v_exponent_ptr, v, words, mask, exponent_mask, STATE, _V, BLOCK)


@triton.jit
def _place(numels, work, run, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The tensor that a program works on, its first element there, and the tensor's size."""
    # A row of work is for 2^run programs, so walk on from where the first of them begins.
    program = tl.program_id(0).to(tl.int64)
    row = work + 2 * (program >> run)
    index = tl.load(row).to(tl.int64)
    chunk = tl.load(row + 1) + (program & ((1 << run) - 1))
    numel = tl.load(numels + index * WIDTH)
    while chunk >= tl.cdiv(numel, BLOCK):
        chunk -= tl.cdiv(numel, BLOCK)
        index += 1
        numel = tl.load(numels + index * WIDTH)
    return index, chunk * BLOCK, numel


@triton.jit(do_not_specialize=["run", "factor"])
def radam_step_kernel(
    segments, grads, low_memory, work, scalars, factor, run,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Steps one chunk of one segment; tables as in upload.py.

    `low_memory` is None for plain dtypes, and `factor` where there is none.
    """
    index, begin, numel = _place(segments + _NUMEL, work, run, _SEGMENT_WIDTH, BLOCK)
    segment = segments + index * _SEGMENT_WIDTH
    param, grad = tl.load(segment + _PARAM), tl.load(grads + index)
    exp_avg, exp_avg_sq = tl.load(segment + _EXP_AVG), tl.load(segment + _EXP_AVG_SQ)
    row = scalars + tl.load(segment + _SCALARS) * _SCALARS_WIDTH

    # float64 in memory, because a Python float argument is float32 when compiled; narrowed once.
    T: tl.constexpr = tl.float64 if PARAM == _FLOAT64 else tl.float32
    grad_scale = tl.load(row + _GRAD_SCALE)
    if factor is not None:
        grad_scale *= tl.load(factor)
    s = (
        grad_scale.to(T), tl.load(row + _WEIGHT_DECAY).to(T),
        tl.load(row + _DECAY).to(T), tl.load(row + _ONE_MINUS_BETA1).to(T),
        tl.load(row + _BETA2).to(T), tl.load(row + _ONE_MINUS_BETA2).to(T),
        tl.load(row + _EPS).to(T), tl.load(row + _STEP_SIZE).to(T),
    )  # fmt: skip
    action = tl.load(row + _ACTION).to(tl.int32)
    l2 = s[1] != 0
    # A mask of unknown divisibility would turn 16-byte accesses into single ones.
    whole = (begin + BLOCK <= numel) & (((param | grad | exp_avg | exp_avg_sq) & 15) == 0)
    extra = None
    if low_memory is not None:
        low_memory += index * _LOW_MEMORY_WIDTH
        remainder, key = tl.load(low_memory + _REMAINDER), tl.load(low_memory + _PARAMETER_KEY)
        first_index = tl.load(low_memory + _FIRST_INDEX)
        extra = (
            remainder, tl.load(low_memory + _EXP_AVG_EXPONENT),
            tl.load(low_memory + _EXP_AVG_SQ_EXPONENT), first_index,
            tl.load(row + _KEY_LOW).to(tl.uint32) ^ key.to(tl.uint32),
            tl.load(row + _KEY_HIGH).to(tl.uint32) ^ (key >> 32).to(tl.uint32),
        )  # fmt: skip
        whole &= (remainder & 15) == 0
        # The random words of such a chunk have one key.
        whole &= (first_index + begin).to(tl.uint32) <= 0x100000000 - BLOCK

    if action != _SKIP:
        if whole:
            _step_block(
                param, grad, exp_avg, exp_avg_sq, extra, begin, numel, s, l2, action,
                PARAM, GRAD, STATE, BLOCK, True,
            )  # fmt: skip
        else:
            # In small parts: single accesses take many registers, which the path above lacks then.
            for first in range(begin, tl.minimum(begin + BLOCK, numel), PART):
                _step_block(
                    param, grad, exp_avg, exp_avg_sq, extra, first, numel, s, l2, action,
                    PARAM, GRAD, STATE, PART, False,
                )  # fmt: skip


# Bytes that one program of the norm reads, partial sums that the last one reads at a time, and the
# warps of both.
_NORM_BYTES, _NORM_WARPS = 16384, 8
_TOTAL_BLOCK, _TOTAL_WARPS = 8192, 16
_LARGEST, _SQUARES = tl.constexpr(0), tl.constexpr(2)  # norms; 1 is the sum of |g|


@triton.jit
def _doubled(x):
    """The bits of |x| shifted left: unsigned numbers, in whose order NaN is above infinity.

    Not masked, which LLVM would turn into a floating-point abs, whose NaN is unspecified.
    """
    if x.dtype == tl.float64:
        return x.to(tl.uint64, bitcast=True) << 1
    else:
        return x.to(tl.uint32, bitcast=True) << 1


@triton.jit
def _power_sum(x, NORM: tl.constexpr):
    """The sum of |x|**NORM, or the largest |x|, in float64; csrc/cuda/norm_cuda.cu explains it.

    A program has one scale here, and in CUDA each thread.
    """
    if NORM == _LARGEST:
        return (tl.max(_doubled(x)) >> 1).to(x.dtype, bitcast=True).to(tl.float64)
    elif x.dtype == tl.float64:
        return tl.sum(x * x if NORM == _SQUARES else tl.abs(x))
    else:
        exponent = tl.minimum((tl.max(_doubled(x)) >> 24).to(tl.int32), 253)
        x = x * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        total = tl.sum(x * x if NORM == _SQUARES else tl.abs(x)).to(tl.float64)
        back = (1023 + NORM * (exponent - 127)).to(tl.int64) << 52
        return total * back.to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["run"])
def radam_norm_kernel(
    grads, work, partials, run, GRAD: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds up one chunk of one gradient; rows of `grads` are an address and a size."""
    index, begin, numel = _place(grads + 1, work, run, 2, BLOCK)
    grad = tl.load(grads + 2 * index)
    at = begin + tl.arange(0, BLOCK)
    # A mask of unknown divisibility would turn 16-byte accesses into single ones.
    if (begin + BLOCK <= numel) & ((grad & 15) == 0):
        g = tl.load(_pointer(grad, GRAD, True) + at)
    else:
        g = tl.load(_pointer(grad, GRAD, False) + at, at < numel, 0)
    tl.store(partials + tl.program_id(0), _power_sum(_widen(g), NORM))


@triton.jit(do_not_specialize=["count"])
def radam_norm_total_kernel(partials, result, count, NORM: tl.constexpr, BLOCK: tl.constexpr):
    """Adds up the partial sums in a fixed order, which torch's sum leaves open."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.uint64 if NORM == _LARGEST else tl.float64)
    for first in range(0, count, BLOCK):
        at = first + lanes
        part = tl.load(partials + at, at < count, 0)
        if NORM == _LARGEST:
            total = tl.maximum(total, _doubled(part))
        else:
            total += part
    if NORM == _LARGEST:
        tl.store(result, (tl.max(total) >> 1).to(tl.float64, bitcast=True))
    else:
        tl.store(result, tl.sum(total))


_WORDS = 64  # 32-bit words that an upload carries as arguments


@triton.jit(do_not_specialize=["count", *(f"w{i}" for i in range(_WORDS))])
def radam_upload_kernel(
    to, count,
    w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15,
    w16, w17, w18, w19, w20, w21, w22, w23, w24, w25, w26, w27, w28, w29, w30, w31,
    w32, w33, w34, w35, w36, w37, w38, w39, w40, w41, w42, w43, w44, w45, w46, w47,
    w48, w49, w50, w51, w52, w53, w54, w55, w56, w57, w58, w59, w60, w61, w62, w63,
):  # fmt: skip
    """Writes up to 64 words that travel as arguments of the launch, as int32."""
    words = (
        w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15,
        w16, w17, w18, w19, w20, w21, w22, w23, w24, w25, w26, w27, w28, w29, w30, w31,
        w32, w33, w34, w35, w36, w37, w38, w39, w40, w41, w42, w43, w44, w45, w46, w47,
        w48, w49, w50, w51, w52, w53, w54, w55, w56, w57, w58, w59, w60, w61, w62, w63,
    )  # fmt: skip
    for i in tl.static_range(64):
        tl.store(to + i, words[i], mask=i < count)


def upload_by_arguments(device: torch.device) -> Upload:
    """An upload that a graph can capture: what it copies is part of its launches."""

    def upload(rows: bytes) -> Tensor:
        words = np.frombuffer(rows, np.int32)
        room = torch.empty(len(words), dtype=torch.int32, device=device)
        for begin in range(0, len(words), _WORDS):
            some = words[begin : begin + _WORDS].tolist()
            padding = [0] * (_WORDS - len(some))
            radam_upload_kernel[(1,)](
                room[begin:], len(some), *some, *padding, enable_fp_fusion=False
            )
        return room.view(torch.int64)

    return upload


# triton.jit has looked at TRITON_INTERPRET, which has several spellings.
INTERPRETED = not isinstance(radam_step_kernel, triton.JITFunction)


def launch_(
    segments: Tensor, grads: Tensor, work: Tensor, scalars: Tensor, factor: Tensor | None, run: int,
    blocks: int, dtypes: tuple[int, ...], low_memory: Tensor | None = None,
) -> None:  # fmt: skip
    """Launches the kernel on the current stream.

    Args:
        segments, grads, work, scalars, low_memory: tables as tensors of 8-byte words.
        factor: a float64 that multiplies the gradients.
        dtypes: codes of dtypes or formats.
    """
    if blocks:
        warps = 2 * WARPS if dtypes[0] == _FLOAT64.value else WARPS  # else registers spill
        # No autotuning: it would run a kernel that works in place several times over.
        radam_step_kernel[(blocks,)](
            segments, grads, low_memory, work.view(torch.int32), scalars.view(torch.float64),
            factor, run, *dtypes, CHUNK, CHUNK // 4, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def norm_chunk(dtype: int) -> int:
    """Elements of a gradient that one program adds up."""
    return _NORM_BYTES // DTYPES[dtype].itemsize


def launch_power_sum(
    grads: Tensor, work: Tensor, run: int, blocks: int, dtype: int, norm_type: float
) -> Tensor:
    """Launches both kernels of the norm on the current stream; returns the result, float64."""
    norm = 0 if norm_type == math.inf else int(norm_type)
    partials = torch.empty(blocks, dtype=torch.float64, device=grads.device)
    result = torch.empty((), dtype=torch.float64, device=grads.device)
    if blocks:
        radam_norm_kernel[(blocks,)](
            grads, work.view(torch.int32), partials, run, dtype, norm, norm_chunk(dtype),
            num_warps=_NORM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    radam_norm_total_kernel[(1,)](
        partials, result, blocks, norm, _TOTAL_BLOCK, num_warps=_TOTAL_WARPS, enable_fp_fusion=False
    )
    return result
