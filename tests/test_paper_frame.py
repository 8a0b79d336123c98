"""The paper's frame: what it says of each optimizer is what it does, and the fused one does it."""

import math

import pytest
import torch

import radam_kernels
from bench.paper import frame
from bench.paper.optimizers import MAKE, hold, warmup

LR, STEPS = 0.01, 12


def gradients(steps: int = STEPS) -> torch.Tensor:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(steps, 5, generator=draws, dtype=torch.float64)


def trajectory(make, grads: torch.Tensor) -> torch.Tensor:
    """The parameters after each step from zero; in two tensors, as those of a model are in many."""
    params = [torch.zeros(2, 1, dtype=grads.dtype), torch.zeros(3, dtype=grads.dtype)]
    optimizer = make([p.requires_grad_() for p in params])
    path = []
    for grad in grads:
        for p, part in zip(params, grad.split([2, 3]), strict=True):
            p.grad = part.view_as(p).clone()
        optimizer.step()
        path.append(torch.cat([p.detach().flatten() for p in params]))
    return torch.stack(path)


def steps_of(make, grads: torch.Tensor) -> torch.Tensor:
    path = trajectory(make, grads)
    return torch.diff(path, dim=0, prepend=torch.zeros_like(path[:1]))


def psi_of(grads: torch.Tensor, beta2: float, eps: float = 0.0) -> torch.Tensor:
    """The adaptive rate after all of `grads`, as the sum that the paper writes."""
    t = len(grads)
    weights = beta2 ** torch.arange(t - 1.0, -1, -1, dtype=torch.float64)[:, None]
    root = ((1 - beta2) * (weights * grads.square()).sum(0)).sqrt()
    return math.sqrt(1 - beta2**t) / (eps + root)


@pytest.mark.parametrize("rho_threshold", [4.0, 5.0])
@pytest.mark.parametrize("form", ["first_order", "exact"])
def test_frame_and_fused_optimizer_take_the_same_steps(rho_threshold, form):
    options = {"rho_threshold": rho_threshold, "rectification": form}
    framed = trajectory(lambda p: frame.RAdam(p, LR, **options), gradients())
    fused = trajectory(lambda p: radam_kernels.RAdam(p, LR, **options), gradients())
    torch.testing.assert_close(framed, fused, rtol=1e-13, atol=0)


def test_the_frames_adam_is_torchs_where_eps_plays_no_part():
    framed = trajectory(lambda p: frame.Adam(p, LR, eps=0.0), gradients())
    torchs = trajectory(lambda p: torch.optim.Adam(p, LR, eps=0.0), gradients())
    torch.testing.assert_close(framed, torchs, rtol=1e-13, atol=0)


def test_phi_and_psi_are_the_sums_that_the_paper_writes():
    t, beta1, beta2, eps = 7, 0.8, 0.97, 1e-3
    weights = beta1 ** torch.arange(t - 1.0, -1, -1, dtype=torch.float64)[:, None]
    phi = (1 - beta1) * (weights * gradients(t)).sum(0) / (1 - beta1**t)
    psi = psi_of(gradients(t), beta2, eps)
    last = {
        kind: steps_of(lambda p, kind=kind: kind(p, LR, (beta1, beta2), eps), gradients(t))[-1]
        for kind in (frame.Momentum, frame.Adam)
    }
    torch.testing.assert_close(last[frame.Momentum], -LR * phi, rtol=1e-10, atol=0)
    torch.testing.assert_close(last[frame.Adam], -LR * phi * psi, rtol=1e-10, atol=0)


def test_warmup_scales_the_steps_of_adam():
    plain, warm = (
        steps_of(lambda p, t=t: frame.Adam(p, LR, warmup=t), gradients()) for t in (0, 4)
    )
    factor = (torch.arange(1, STEPS + 1) / 4).clamp(max=1)[:, None]
    torch.testing.assert_close(warm, factor * plain, rtol=1e-10, atol=1e-15)


def test_adam_2k_fills_psi_alone_and_then_begins():
    k = 5
    held = steps_of(lambda p: frame.Adam(p, LR, hold=k), gradients())
    assert not held[:k].any()
    phi = steps_of(lambda p: frame.Momentum(p, LR), gradients()[k:])  # times -LR
    psi = torch.stack([psi_of(gradients()[:t], 0.999) for t in range(k + 1, STEPS + 1)])
    torch.testing.assert_close(held[k:], phi * psi, rtol=1e-6, atol=0)


def test_the_studied_optimizers_are_what_their_names_say():
    steps = 700
    assert (warmup(steps), hold(steps)) == (140, 20)  # a fifth; 2,000 of 70,000
    options = {
        name: make([torch.zeros(1, requires_grad=True)], LR, steps).param_groups[0]
        for name, make in MAKE.items()
    }
    assert options["Adam"]["eps"] == 1e-8
    assert options["Adam-eps"]["eps"] == 1e-4
    assert options["Adam-2k"]["hold"] == 20
    assert options["Adam-2k, longer"]["hold"] == 140
    assert options["Adam with warmup"]["warmup"] == 140
    chosen = {
        (options[name]["rho_threshold"], options[name]["rectification"])
        for name in MAKE
        if name.startswith("RAdam")
    }
    assert chosen == {(4.0, "exact"), (4.0, "first_order"), (5.0, "exact"), (5.0, "first_order")}
    assert all(group["lr"] == LR for group in options.values())
