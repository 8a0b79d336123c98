"""Compares a step of any RAdam with the formula in float64: a wrong result has no time."""

import math
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from radam_kernels.formats import BLOCK, decode_block8, join_weight

from .cases import local
from .optimizers import Optimizer, Session

MEASURED, WRONG, NOT_MEASURED = "measured", "wrong", "not measured"  # what a row can be
EDGE = 64  # elements at either end of a tensor that are compared: kernels err in tails
TENSORS = 8  # at either end of a list
# A store rounds by half an epsilon; torch's 16-bit steps round in between too.
EPSILONS = 8
CANCELLED = 1e-10  # float64 has more digits than rho_t keeps where it is written as in the paper
LARGE_LR = 50.0  # at the first rectified steps r_t is near 0.02; updates of 1 show in 16 bits too
SIZES = (5000, 1, 257, 33 * 65, 4096)


def radam_float64(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, *, t: int, lr: float, beta1: float, beta2: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The rectified step, as in the paper."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1**t)
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    r = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    p = p - lr * math.sqrt(r * (1 - beta2**t)) * m_hat / (v.sqrt() + eps)
    return p, m, v


@torch.no_grad()
def wrong(row: Optimizer, session: Session) -> str | None:
    """Takes one step; what is wrong with it, or None. Compares the ends of tensors and of lists."""
    optimizer, params = session.optimizer, session.params
    compared = params if len(params) <= 2 * TENSORS else [*params[:TENSORS], *params[-TENSORS:]]
    factor = _factor(session)
    expected = [_expected(row, optimizer, param, factor) for param in compared]
    session.step()
    for i, (param, truths) in enumerate(zip(compared, expected, strict=True)):
        state = optimizer.state[param]
        for name, truth in truths.items():
            found = _read(param, state, name)
            # Squares of gradients are not negative.
            scale = truth.abs() + (0 if name == "exp_avg_sq" else found.floor)
            errors = ((found.ends - truth).abs() / scale.clamp_min(1e-30)).nan_to_num(math.inf)
            error = errors.max().item() if len(errors) else 0.0
            bound = max(found.bound, CANCELLED, row.slack)
            if error > bound:
                return f"{name} of tensor {i} is off by {error:.1e}, more than {bound:.1e}"
    return None


def check(row: Optimizer, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with a step of small tensors, with updates of about 1; None if nothing is."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for size in SIZES:
        param, grad = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(2))
        params.append(Parameter(param))
        params[-1].grad = grad
    session = row.start(params, LARGE_LR)
    for param in params:  # the warm-up has moved them, and they must not be large now
        param.detach().copy_(torch.randn(param.shape, generator=generator))
    return wrong(row, session)


def refusals(
    rows: Iterable[Optimizer],
    device: torch.device,
    dtype: torch.dtype,
    deadline: float = math.inf,
) -> dict[str, dict[str, Any]]:
    """The status and the reason of each RAdam that is wrong, or does not work here."""
    refused = {}
    for row in rows:
        # Compiling takes long; its steps are checked where they are timed.
        if not row.radam or row.form == "compiled" or time.monotonic() > deadline:
            continue
        try:
            if fault := check(row, device, dtype):
                refused[row.name] = {"status": WRONG, "reason": fault}
        except Exception as error:
            refused[row.name] = {"status": NOT_MEASURED, "reason": brief(error)}
    return refused


def brief(error: BaseException) -> str:
    """An error as one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _factor(session: Session) -> float:
    """What the gradients are multiplied by, if the session clips them."""
    if session.max_norm is None:
        return 1.0
    squares = [local(param.grad).double().square().sum() for param in session.params]
    return min(1.0, session.max_norm / (math.sqrt(sum(squares)) + 1e-6))


def _expected(
    row: Optimizer, optimizer: torch.optim.Optimizer, param: Tensor, factor: float
) -> dict[str, Tensor]:
    group, state = optimizer.param_groups[0], optimizer.state[param]
    beta1, beta2 = group["betas"] if "betas" in group else (group["beta1"], group["beta2"])
    t = 1 + int(state["step"] if "step" in state else group["step"])
    p, m, v = (_read(param, state, name).ends for name in ("param", "exp_avg", "exp_avg_sq"))
    g = _ends(param.grad) * factor
    eps = group["eps"]
    if row.debiased:  # eps is added after the division
        m, v = m * (1 - beta1 ** (t - 1)), v * (1 - beta2 ** (t - 1))
        eps *= math.sqrt(1 - beta2**t)
    p, m, v = radam_float64(
        p, g, m, v, t=t, lr=float(group["lr"]), beta1=beta1, beta2=beta2, eps=eps
    )
    if row.debiased:
        m, v = m / (1 - beta1**t), v / (1 - beta2**t)
    return {"param": p, "exp_avg": m, "exp_avg_sq": v}


class _Stored(NamedTuple):
    """The values at the ends of a tensor in float64, and what storing may have changed."""

    ends: Tensor
    bound: float  # of errors, relative to the magnitude and the floor
    floor: float = 1.0  # sums cancel, so the bound is absolute below


def _read(param: Tensor, state: dict[str, Any], name: str) -> _Stored:
    """A weight with its remainder, or a moment, in whatever format it is stored."""
    tensor = param if name == "param" else state[name]
    if name == "param" and "param_remainder" in state:
        rest = state["param_remainder"]
        weight = join_weight(_ends_of(param).cpu(), _ends_of(rest).cpu())
        return _Stored(weight.double(), EPSILONS * (2**-16 if rest.itemsize == 1 else 2**-23))
    exponents = state.get(f"{name}_exponent")
    if exponents is None:
        return _Stored(_ends(tensor), EPSILONS * torch.finfo(tensor.dtype).eps)
    codes = local(tensor).reshape(-1)
    last = max(0, len(codes) - EDGE) // BLOCK  # the block that the end begins in
    first = decode_block8(codes[:BLOCK].cpu(), exponents[:1].cpu(), name)
    rest = decode_block8(codes[last * BLOCK :].cpu(), exponents[last:].cpu(), name)
    short = len(codes) <= 2 * EDGE
    ends = rest if short else torch.cat([first[:EDGE], rest[-EDGE:]])
    # Rounded up or down among 3 bits; what is far below the largest of a block becomes 0.
    return _Stored(ends.double(), 1.01 * 2**-3, 2**-6)


def _ends(tensor: Tensor) -> Tensor:
    return _ends_of(tensor).cpu().double()


def _ends_of(tensor: Tensor) -> Tensor:
    flat = local(tensor.detach()).reshape(-1)
    return flat if flat.numel() <= 2 * EDGE else torch.cat([flat[:EDGE], flat[-EDGE:]])
