"""Holds a step of any RAdam to the formula in float64: a wrong result has no speed."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

EDGE = 64  # elements at either end of a tensor that are looked at: tails are where kernels err
TENSORS = 8  # at either end of a list
STREAMS = ("param", "exp_avg", "exp_avg_sq")
# A store rounds by half an epsilon; torch's 16-bit steps round in between too.
EPSILONS = 8
CANCELLED = 1e-10  # float64 has more digits than rho_t keeps where it is written as in the paper
LARGE_LR = 50.0  # at the first rectified steps r_t is near 0.02; updates of 1 show in 16 bits too


def radam_float64(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, *, t: int, lr: float, beta1: float, beta2: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The step as in the paper, with torch's threshold: rectified where rho_t is above 5."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1**t)
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    if rho > 5:
        r = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
        p = p - lr * math.sqrt(r * (1 - beta2**t)) * m_hat / (v.sqrt() + eps)
    else:
        p = p - lr * m_hat
    return p, m, v


@torch.no_grad()
def wrong(
    optimizer: torch.optim.Optimizer,
    step: Callable[[], object],
    params: Sequence[Tensor],
    debiased: bool = False,
    slack: float = 0.0,
) -> str | None:
    """Takes one step; what is wrong with it, or None. Looks at the ends of tensors and of lists.

    Args:
        debiased: the moments are divided by their bias corrections, and eps is added after that.
        slack: an error that is allowed, where it is larger than that of rounding.
    """
    group = optimizer.param_groups[0]
    beta1, beta2 = group["betas"] if "betas" in group else (group["beta1"], group["beta2"])
    looked_at = params if len(params) <= 2 * TENSORS else [*params[:TENSORS], *params[-TENSORS:]]
    expected, largest = [], 0.0
    for param in looked_at:
        state = optimizer.state[param]
        p, g, m, v = (_ends(t) for t in (param, param.grad, state["exp_avg"], state["exp_avg_sq"]))
        t = 1 + int(state["step"] if "step" in state else group["step"])
        eps = group["eps"]
        if debiased:
            m, v = m * (1 - beta1 ** (t - 1)), v * (1 - beta2 ** (t - 1))
            eps *= math.sqrt(1 - beta2**t)
        options = dict(t=t, lr=float(group["lr"]), eps=eps)
        p, m, v = radam_float64(p, g, m, v, beta1=beta1, beta2=beta2, **options)
        if debiased:
            m, v = m / (1 - beta1**t), v / (1 - beta2**t)
        expected.append((p, m, v))
    step()
    for i, (param, truths) in enumerate(zip(looked_at, expected, strict=True)):
        state = optimizer.state[param]
        for name, truth in zip(STREAMS, truths, strict=True):
            tensor = param if name == "param" else state[name]
            # Sums cancel, so the bound is absolute below 1; squares of gradients are not negative.
            scale = truth.abs() if name == "exp_avg_sq" else truth.abs() + 1
            error = ((_ends(tensor) - truth).abs() / scale.clamp_min(1e-30)).nan_to_num(math.inf)
            largest = error.max().item() if len(error) else 0.0
            bound = max(EPSILONS * torch.finfo(tensor.dtype).eps, CANCELLED, slack)
            if largest > bound:
                return f"{name} of tensor {i} is off by {largest:.1e}, more than {bound:.1e}"
    return None


def check(
    start: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype,
    debiased: bool = False,
    slack: float = 0.0,
) -> str | None:
    """What is wrong with a contender's step on small tensors, with updates of about 1."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for size in (5000, 1, 257, 33 * 65, 4096):
        param, grad = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(2))
        params.append(param.requires_grad_())
        params[-1].grad = grad
    started = start(params, LARGE_LR)
    for param in params:  # the warm-up has moved them, and they must not be large now
        param.detach().copy_(torch.randn(param.shape, generator=generator))
    return wrong(started.optimizer, started.step, params, debiased, slack)


def _ends(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    ends = flat if flat.numel() <= 2 * EDGE else torch.cat([flat[:EDGE], flat[-EDGE:]])
    return ends.cpu().double()
