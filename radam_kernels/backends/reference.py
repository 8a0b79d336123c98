"""The step in readable torch operations: the reference that every kernel must match bit for bit."""

import math

import numpy as np
import torch
from torch import Tensor

from .. import formats
from ..modules import FORMAT_NAMES, cpu
from ..schedule import Action, StepScalars, group_scalars


def why_not(device_type: str) -> str | None:
    return None


@torch.no_grad()
def run(bucket: cpu.Bucket) -> None:
    loss_scale, found_inf, factor = bucket.scaling.numbers()
    if bucket.capturable:
        rows = _advance(bucket, loss_scale, found_inf)
    else:
        rows = [group_scalars(bucket.groups[group], step) for group, step in bucket.counts]
    rows = [row._replace(grad_scale=row.grad_scale * factor) for row in rows]
    tables = zip(bucket.tensors, bucket.scalar_indices, strict=True)
    if bucket.low_memory:
        for (tensors, row), fields in zip(tables, bucket.low_memory, strict=True):
            extra = formats.LowMemory(*fields)
            if extra.remainder is not None:
                extra = extra._replace(remainder=formats.in_memory_order(extra.remainder))
            param, grad, exp_avg, exp_avg_sq = map(formats.in_memory_order, tensors)
            low_memory_update_(param, grad, exp_avg, exp_avg_sq, extra, rows[row], bucket.dtypes)
        return
    compute = torch.float64 if FORMAT_NAMES[bucket.dtypes[0]] == "float64" else torch.float32
    for tensors, row in tables:
        param, grad, exp_avg, exp_avg_sq = map(real, tensors)
        radam_update_(param, grad, exp_avg, exp_avg_sq, rows[row], compute)


def _advance(bucket: cpu.Bucket, loss_scale: float, found_inf: float) -> list[StepScalars]:
    """Advances step counts on the device. Synchronizes, unlike csrc/core/advance.h."""
    rows = []
    for step, group in bucket.steps:
        t = float(step + 1)
        if found_inf != 0 or not (1 <= t <= 2**53 and t.is_integer()):
            rows.append(StepScalars(*[0.0] * len(StepScalars._fields)))  # Action.SKIP
        else:
            rows.append(group_scalars({**bucket.groups[group], "grad_scale": 1.0 / loss_scale}, t))
            step.fill_(t)
    return rows


@torch.no_grad()
def power_sum(bucket: cpu.GradientBucket, norm_type: float) -> Tensor:
    """As the protocol says, and for any `norm_type` above 0, of complex gradients, too."""
    parts = [torch.zeros((), dtype=torch.float64, device=bucket.tensors[0].device)]
    for grad in bucket.tensors:
        wide = grad.to(torch.complex128 if grad.is_complex() else torch.float64).abs()
        if norm_type != math.inf:
            parts.append(wide.pow(norm_type).sum())
        elif wide.numel():
            parts.append(wide.amax())
    together = torch.stack(parts)
    return together.amax() if norm_type == math.inf else together.sum()


def real(tensor: Tensor) -> Tensor:
    """A view of a complex tensor as pairs of reals; any other tensor unchanged."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def radam_update_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: StepScalars,
    compute: torch.dtype,
) -> None:
    """One RAdam step in place, on tensors of one shape; csrc/core/update.h is the same in C++.

    Every operation rounds once to `compute` (float32, or float64 for float64 parameters). 16-bit
    results are rounded to nearest even at the end.
    """
    if scalars.action == Action.SKIP:
        return
    p, g, m, v = (t.to(compute) for t in (param, grad, exp_avg, exp_avg_sq))
    p, m, v = _radam_update(p, g, m, v, scalars)
    if scalars.action != Action.HOLD:
        param.copy_(p)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)


def low_memory_update_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    extra: formats.LowMemory,
    scalars: StepScalars,
    codes: tuple[int, int, int],
) -> None:
    """As radam_update_, for one-dimensional tensors in the formats that `codes` name."""
    if scalars.action == Action.SKIP:
        return
    format, state_format = FORMAT_NAMES[codes[0]], FORMAT_NAMES[codes[2]]
    key = formats.Key(int(scalars.key_low), int(scalars.key_high))
    words = formats.random_words(key, extra.key, extra.first_index, param.numel(), param.device)
    moments = {
        "exp_avg": (exp_avg, extra.exp_avg_exponent),
        "exp_avg_sq": (exp_avg_sq, extra.exp_avg_sq_exponent),
    }
    p = formats.decode_weight(param, extra.remainder)
    m, v = (formats.decode_moment(*stored, moment) for moment, stored in moments.items())
    p, m, v = _radam_update(p, grad.float(), m, v, scalars)
    if scalars.action != Action.HOLD:
        formats.encode_weight_(param, extra.remainder, p, format, words)
    for (moment, stored), values in zip(moments.items(), (m, v), strict=True):
        formats.encode_moment_(*stored, values, moment, state_format, words)


def _radam_update(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, scalars: StepScalars
) -> tuple[Tensor, Tensor, Tensor]:
    # 0-dim tensors of the compute dtype: narrowed once, as in the kernels.
    grad_scale, weight_decay, decay, one_minus_beta1, beta2, one_minus_beta2, eps, step_size = (
        torch.tensor(x, dtype=p.dtype, device=p.device) for x in scalars[:8]
    )
    g = g * grad_scale
    if weight_decay != 0:  # 0 * p would turn an infinite p into NaN
        g = g + weight_decay * p
    p = p * decay
    m = m + one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * (g * g)
    if scalars.action == Action.RECTIFIED:
        p = p - step_size * (m / (_sqrt(v) + eps))
    elif scalars.action == Action.MOMENTUM:
        p = p - step_size * m
    return p, m, v


def _sqrt(v: Tensor) -> Tensor:
    """The correctly rounded square root; on the CPU torch.sqrt is off by an ulp for some values."""
    if v.dtype == torch.float32:
        return v.double().sqrt().float()
    if v.device.type == "cpu":
        with np.errstate(invalid="ignore"):
            return torch.as_tensor(np.sqrt(v.numpy()))
    return v.sqrt()
