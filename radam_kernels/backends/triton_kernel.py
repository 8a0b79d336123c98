"""The element update in Triton and the kernel around it; csrc/radam_math.h says it in C++."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..flat import SEGMENT_FIELDS
from ..modules import cpu
from ..schedule import Action, StepScalars

CHUNK = 4096  # elements that one program steps

# Kernels see constants of the module only as tl.constexpr.
_SKIP = tl.constexpr(int(Action.SKIP))
_HOLD = tl.constexpr(int(Action.HOLD))
_MOMENTUM = tl.constexpr(int(Action.MOMENTUM))
_RECTIFIED = tl.constexpr(int(Action.RECTIFIED))
_SEGMENT_WIDTH = tl.constexpr(len(SEGMENT_FIELDS))
_SCALARS_WIDTH = tl.constexpr(len(StepScalars._fields))
_FLOAT32, _BFLOAT16, _FLOAT16, _FLOAT64 = (tl.constexpr(i) for i in range(len(cpu.dtypes)))


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
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    # bfloat16 travels as its bits: the interpreter would truncate instead of rounding.
    if DTYPE == _FLOAT32:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif DTYPE == _BFLOAT16:
        pointer = address.to(tl.pointer_type(tl.uint16))
    elif DTYPE == _FLOAT16:
        pointer = address.to(tl.pointer_type(tl.float16))
    else:
        pointer = address.to(tl.pointer_type(tl.float64))
    # Here and not at the call, where Triton before 3.9 forgets it.
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _widen(x, DTYPE: tl.constexpr):
    if DTYPE == _BFLOAT16:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == _FLOAT16:
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
def _step_block(
    param, grad, exp_avg, exp_avg_sq, at, mask, s, l2, action,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    p_ptr, g_ptr = _pointer(param, PARAM, ALIGNED) + at, _pointer(grad, GRAD, ALIGNED) + at
    m_ptr, v_ptr = _pointer(exp_avg, STATE, ALIGNED) + at, _pointer(exp_avg_sq, STATE, ALIGNED) + at
    p = _widen(tl.load(p_ptr, mask), PARAM)
    g = _widen(tl.load(g_ptr, mask), GRAD)
    m = _widen(tl.load(m_ptr, mask), STATE)
    v = _widen(tl.load(v_ptr, mask), STATE)
    p, m, v = _radam_update(p, g, m, v, s, l2, action)
    if action != _HOLD:
        tl.store(p_ptr, _narrow(p, PARAM), mask)
    tl.store(m_ptr, _narrow(m, STATE), mask)
    tl.store(v_ptr, _narrow(v, STATE), mask)


@triton.jit(do_not_specialize=["run"])
def radam_step_kernel(
    segments, work, scalars, run,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Steps one chunk of one segment; tables as in device_tables.py."""
    # A row of work is for 2^run programs, so walk on from where the first of them begins.
    program = tl.program_id(0).to(tl.int64)
    row = work + 2 * (program >> run)
    segment = segments + tl.load(row).to(tl.int64) * _SEGMENT_WIDTH
    chunk = tl.load(row + 1) + (program & ((1 << run) - 1))
    chunks = tl.cdiv(tl.load(segment + 4), BLOCK)
    while chunk >= chunks:
        chunk -= chunks
        segment += _SEGMENT_WIDTH
        chunks = tl.cdiv(tl.load(segment + 4), BLOCK)
    begin = chunk * BLOCK
    param, grad = tl.load(segment), tl.load(segment + 1)
    exp_avg, exp_avg_sq = tl.load(segment + 2), tl.load(segment + 3)
    numel = tl.load(segment + 4)
    row = scalars + tl.load(segment + 5) * _SCALARS_WIDTH

    # float64 in memory, because a Python float argument is float32 when compiled; narrowed once.
    T: tl.constexpr = tl.float64 if PARAM == _FLOAT64 else tl.float32
    s = (
        tl.load(row).to(T), tl.load(row + 1).to(T), tl.load(row + 2).to(T), tl.load(row + 3).to(T),
        tl.load(row + 4).to(T), tl.load(row + 5).to(T), tl.load(row + 6).to(T),
        tl.load(row + 7).to(T),
    )  # fmt: skip
    action = tl.load(row + 8).to(tl.int32)
    l2 = s[1] != 0

    if action != _SKIP:
        # A mask of unknown divisibility would turn 16-byte accesses into single ones.
        if (begin + BLOCK <= numel) & (((param | grad | exp_avg | exp_avg_sq) & 15) == 0):
            _step_block(
                param, grad, exp_avg, exp_avg_sq, begin + tl.arange(0, BLOCK), None, s, l2, action,
                PARAM, GRAD, STATE, True,
            )  # fmt: skip
        else:
            # In small parts: single accesses take many registers, which the path above lacks then.
            for first in range(begin, tl.minimum(begin + BLOCK, numel), PART):
                at = first + tl.arange(0, PART)
                _step_block(
                    param, grad, exp_avg, exp_avg_sq, at, at < numel, s, l2, action,
                    PARAM, GRAD, STATE, False,
                )  # fmt: skip


# triton.jit has looked at TRITON_INTERPRET, which has several spellings.
INTERPRETED = not isinstance(radam_step_kernel, triton.JITFunction)


def launch_(
    segments: Tensor, work: Tensor, scalars: Tensor, run: int, blocks: int, dtypes: tuple[int, ...]
) -> None:
    """Launches the kernel on the current stream: tables as tensors of 8-byte words, dtype codes."""
    if blocks:
        # No autotuning: it would run a kernel that works in place several times over.
        radam_step_kernel[(blocks,)](
            segments, work.view(torch.int32), scalars.view(torch.float64), run, *dtypes,
            CHUNK, CHUNK // 4, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
