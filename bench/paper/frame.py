"""Algorithm 1 of the paper: optimizers that differ only in alpha, phi and psi, to be read.

theta_t = theta_{t-1} - alpha_t phi(g_1, ..., g_t) psi(g_1, ..., g_t), for theta one long vector.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.optimizer import Optimizer, ParamsT

from radam_kernels.schedule import rectification

Group = dict[str, Any]  # hyperparameters, as torch keeps them


class Momentum(Optimizer):
    """SGD with momentum: the frame itself, with psi = 1.

    Args:
        warmup: T of linear warmup; 0 for none.
        hold: updates k at the beginning that go into psi alone, while parameters and momentum stay
            (Adam-2k is k = 2000). alpha and phi count from there.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        warmup: int = 0,
        hold: int = 0,
        **more: float | str,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "warmup": warmup, "hold": hold}
        super().__init__(params, defaults | more)
        self.t = 0
        self.exp_avg: Tensor | float = 0.0  # (1 - b1) sum b1^(t-i) g_i
        self.exp_avg_sq: Tensor | float = 0.0  # (1 - b2) sum b2^(t-i) g_i^2

    @staticmethod
    def alpha(group: Group, t: int) -> float:
        """The learning rate: constant, or lr min(t, T)/T."""
        return group["lr"] * min(1.0, t / group["warmup"] if group["warmup"] else 1.0)

    @staticmethod
    def phi(group: Group, exp_avg: Tensor, t: int) -> Tensor:
        """Momentum: (1 - b1) sum b1^(t-i) g_i / (1 - b1^t)."""
        return exp_avg / (1 - group["betas"][0] ** t)

    @staticmethod
    def psi(group: Group, exp_avg_sq: Tensor, t: int) -> Tensor | float:
        """The adaptive rate: none."""
        return 1.0

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # the experiments have no closures
        (group,) = self.param_groups
        params, (beta1, beta2), hold = group["params"], group["betas"], group["hold"]
        theta = parameters_to_vector(params)
        g = parameters_to_vector([p.grad for p in params])
        self.t += 1
        self.exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * g * g
        if self.t > hold:
            self.exp_avg = beta1 * self.exp_avg + (1 - beta1) * g
            alpha = self.alpha(group, self.t - hold)
            phi = self.phi(group, self.exp_avg, self.t - hold)
            psi = self.psi(group, self.exp_avg_sq, self.t)
            vector_to_parameters(theta - alpha * phi * psi, params)


class Adam(Momentum):
    """Adam; Adam-2k with `hold`, Adam-eps with eps=1e-4, linear warmup with `warmup`."""

    @staticmethod
    def psi(group: Group, exp_avg_sq: Tensor, t: int) -> Tensor:
        """sqrt((1 - b2^t) / ((1 - b2) sum b2^(t-i) g_i^2)), with eps where the paper has it.

        torch adds eps after the bias correction. For Adam-eps that matters: at step 1, b2 = 0.999,
        its eps of 1e-4 would act as one of 3.2e-6 here.
        """
        return math.sqrt(1 - group["betas"][1] ** t) / (exp_avg_sq.sqrt() + group["eps"])


class RAdam(Adam):
    """Algorithm 2, for reading; the experiments run `radam_kernels.RAdam`."""

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *args: Any,
        rho_threshold: float = 5.0,
        rectification: str = "first_order",
        **more: Any,
    ) -> None:
        more |= {"rho_threshold": rho_threshold, "rectification": rectification}
        super().__init__(params, lr, *args, **more)

    @staticmethod
    def psi(group: Group, exp_avg_sq: Tensor, t: int) -> Tensor | float:
        """Adam's times r_t; 1 while its variance is intractable."""
        form, threshold = group["rectification"], group["rho_threshold"]
        r_t = rectification(t, group["betas"][1], form=form, rho_threshold=threshold)
        return 1.0 if r_t is None else r_t * Adam.psi(group, exp_avg_sq, t)
