"""The optimizers under study: they compute what the paper writes, and match the fused optimizer."""

import math

import pytest
import torch

import radam_kernels
from bench.paper.harness import optimizers
from bench.paper.harness.optimizers import MAKE, hold_steps, warmup_steps

LR, STEPS = 0.01, 12
GRADIENTS = torch.randn(STEPS, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def trajectory(make, grads: torch.Tensor = GRADIENTS) -> torch.Tensor:
    """The parameters after each step from zero; they are two tensors."""
    params = [torch.zeros(2, 1, dtype=grads.dtype), torch.zeros(3, dtype=grads.dtype)]
    optimizer = make([p.requires_grad_() for p in params])
    path = []
    for grad in grads:
        for p, part in zip(params, grad.split([2, 3]), strict=True):
            p.grad = part.view_as(p).clone()
        optimizer.step()
        path.append(torch.cat([p.detach().flatten() for p in params]))
    return torch.stack(path)


def steps_of(make, grads: torch.Tensor = GRADIENTS) -> torch.Tensor:
    path = trajectory(make, grads)
    return torch.diff(path, dim=0, prepend=torch.zeros_like(path[:1]))


def weighted_sum(values: torch.Tensor, beta: float) -> torch.Tensor:
    """(1 - b) sum b^(t-i) x_i, as the paper writes it."""
    weights = beta ** torch.arange(len(values) - 1.0, -1, -1, dtype=torch.float64)[:, None]
    return (1 - beta) * (weights * values).sum(0)


def psi_of(grads: torch.Tensor, beta2: float, eps: float = 0.0) -> torch.Tensor:
    root = weighted_sum(grads.square(), beta2).sqrt()
    return math.sqrt(1 - beta2 ** len(grads)) / (eps + root)


@pytest.mark.parametrize("rho_threshold", [4.0, 5.0])
@pytest.mark.parametrize("form", ["first_order", "exact"])
def test_algorithm_2_and_the_fused_optimizer_take_the_same_steps(rho_threshold, form):
    options = {"rho_threshold": rho_threshold, "rectification": form}
    readable = trajectory(lambda p: optimizers.RAdam(p, LR, **options))
    fused = trajectory(lambda p: radam_kernels.RAdam(p, LR, **options))
    torch.testing.assert_close(readable, fused, rtol=1e-13, atol=0)


def test_adam_is_torchs_without_eps():
    readable = trajectory(lambda p: optimizers.Adam(p, LR, eps=0.0))
    torchs = trajectory(lambda p: torch.optim.Adam(p, LR, eps=0.0))
    torch.testing.assert_close(readable, torchs, rtol=1e-13, atol=0)


def test_phi_and_psi_are_the_sums_that_the_paper_writes():
    beta1, beta2, eps = 0.8, 0.97, 1e-3
    phi = weighted_sum(GRADIENTS, beta1) / (1 - beta1**STEPS)
    psi = psi_of(GRADIENTS, beta2, eps)
    for kind, rate in ((optimizers.Momentum, 1.0), (optimizers.Adam, psi)):
        last = steps_of(lambda p, kind=kind: kind(p, LR, (beta1, beta2), eps))[-1]
        torch.testing.assert_close(last, -LR * phi * rate, rtol=1e-10, atol=0)


def test_warmup_scales_the_steps_of_adam():
    plain, warm = (steps_of(lambda p, t=t: optimizers.Adam(p, LR, warmup=t)) for t in (0, 4))
    factor = (torch.arange(1, STEPS + 1) / 4).clamp(max=1)[:, None]
    torch.testing.assert_close(warm, factor * plain, rtol=1e-10, atol=1e-15)


def test_adam_2k_updates_only_psi_before_its_first_step():
    k = 5
    held = steps_of(lambda p: optimizers.Adam(p, LR, hold=k, warmup=3))
    assert not held[:k].any()
    phi = steps_of(lambda p: optimizers.Momentum(p, LR, warmup=3), GRADIENTS[k:])
    psi = torch.stack([psi_of(GRADIENTS[:t], 0.999) for t in range(k + 1, STEPS + 1)])
    torch.testing.assert_close(held[k:], phi * psi, rtol=1e-6, atol=0)


def test_the_studied_optimizers_are_what_their_names_say():
    steps = 700
    assert (warmup_steps(steps), hold_steps(steps)) == (140, 20)  # a fifth; 2,000 of 70,000
    for name, options in {
        "Adam": {"eps": 1e-8, "hold": 0, "warmup": 0},
        "Adam-eps": {"eps": 1e-4},
        "Adam-2k": {"hold": 20},
        "Adam-2k, longer": {"hold": 140},
        "Adam with warmup": {"warmup": 140},
        "RAdam": {"rho_threshold": 5.0, "rectification": "first_order"},
        "RAdam, threshold 4": {"rho_threshold": 4.0, "rectification": "first_order"},
        "RAdam, exact": {"rho_threshold": 5.0, "rectification": "exact"},
        "RAdam, exact, threshold 4": {"rho_threshold": 4.0, "rectification": "exact"},
    }.items():
        group = MAKE[name]([torch.zeros(1, requires_grad=True)], LR, steps).param_groups[0]
        if name.startswith("RAdam"):
            group = radam_kernels.RAdam.hyperparameters(group)
        assert group.items() >= (options | {"lr": LR}).items(), name
