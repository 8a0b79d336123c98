"""The optimizers under study, most of them in the form of the paper's Algorithm 1.

theta_t = theta_{t-1} - alpha_t phi(g_1, ..., g_t) psi(g_1, ..., g_t), where theta is the vector of
all parameters. The classes here differ only in alpha, phi and psi, and are written for reading.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.optimizer import Optimizer, ParamsT

import radam_kernels
from radam_kernels.schedule import rectification as rectification_term

Group = dict[str, Any]  # hyperparameters: a parameter group of torch


class Momentum(Optimizer):
    """SGD with momentum: Algorithm 1 with psi = 1.

    Args:
        warmup: number of steps T of linear warmup; 0 for none.
        hold: number of first updates k that only update psi, while parameters and momentum stay
            (k = 2000 is Adam-2k). alpha and phi count their steps from there.
        rectification, rho_threshold: as in `radam_kernels.RAdam`; only RAdam's psi uses them.
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
        rectification: str = "first_order",
        rho_threshold: float = 5.0,
    ) -> None:
        schedule = {"lr": lr, "warmup": warmup, "hold": hold}
        rectified = {"rectification": rectification, "rho_threshold": rho_threshold}
        super().__init__(params, {"betas": betas, "eps": eps, **schedule, **rectified})
        self.t = 0
        self.exp_avg: Tensor | float = 0.0  # (1 - b1) sum b1^(t-i) g_i
        self.exp_avg_sq: Tensor | float = 0.0  # (1 - b2) sum b2^(t-i) g_i^2

    @staticmethod
    def alpha(group: Group, t: int) -> float:
        """The learning rate: constant, or lr min(t, T)/T with warmup."""
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
    def step(self) -> None:  # type: ignore[override]  # without a closure
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
        """sqrt((1 - b2^t) / ((1 - b2) sum b2^(t-i) g_i^2)), with the paper's placement of eps.

        torch adds eps after the bias correction. This matters for Adam-eps: at step 1 with
        b2 = 0.999, torch's eps of 1e-4 would be equivalent to 3.2e-6 here.
        """
        return math.sqrt(1 - group["betas"][1] ** t) / (exp_avg_sq.sqrt() + group["eps"])


class RAdam(Adam):
    """Algorithm 2, for reading; the experiments use `radam_kernels.RAdam`."""

    @staticmethod
    def psi(group: Group, exp_avg_sq: Tensor, t: int) -> Tensor | float:
        """Adam's psi times r_t; 1 while its variance is intractable."""
        group = radam_kernels.RAdam.hyperparameters(group)
        form, threshold = group["rectification"], group["rho_threshold"]
        r_t = rectification_term(t, group["betas"][1], form=form, rho_threshold=threshold)
        return 1.0 if r_t is None else r_t * Adam.psi(group, exp_avg_sq, t)


def warmup_steps(steps: int) -> int:
    """T for a run of `steps` steps: a fifth of them.

    The authors' recipe for IWSLT'14 De-En has 4,000 of 70,000. That share of a few hundred steps
    is too short: deep models stall with it.
    """
    return -(-steps // 5)


def hold_steps(steps: int) -> int:
    """k of Adam-2k for a run of `steps` steps: 2,000 of 70,000.

    70,000 updates is the length of the authors' recipe for IWSLT'14 De-En.
    """
    return -(-steps * 2_000 // 70_000)


def _fused(**options: Any) -> Callable[[Iterable[Tensor], float, int], Optimizer]:
    return lambda params, lr, steps: radam_kernels.RAdam(params, lr, **options)


# By their names in tables and figures, from parameters, lr and the number of steps of the run.
MAKE: dict[str, Callable[[Iterable[Tensor], float, int], Optimizer]] = {
    "Adam": lambda params, lr, steps: Adam(params, lr),
    "Adam-2k": lambda params, lr, steps: Adam(params, lr, hold=hold_steps(steps)),
    "Adam-2k, longer": lambda params, lr, steps: Adam(params, lr, hold=warmup_steps(steps)),
    "Adam-eps": lambda params, lr, steps: Adam(params, lr, eps=1e-4),
    "Adam with warmup": lambda params, lr, steps: Adam(params, lr, warmup=warmup_steps(steps)),
    "RAdam": _fused(),
    "RAdam, threshold 4": _fused(rho_threshold=4.0),
    "RAdam, exact": _fused(rectification="exact"),
    "RAdam, exact, threshold 4": _fused(rectification="exact", rho_threshold=4.0),
    "SGD with momentum": lambda params, lr, steps: Momentum(params, lr),
}
