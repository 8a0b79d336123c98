"""The step as a function on raw tensors, for people who keep their own flat buffers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import check_name
from .launch import launch
from .modules import cpu


def radam_(
    params: Tensor | Sequence[Tensor],
    grads: Tensor | Sequence[Tensor],
    exp_avgs: Tensor | Sequence[Tensor],
    exp_avg_sqs: Tensor | Sequence[Tensor],
    *,
    step: int,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    rho_threshold: float = 5.0,
    degenerated_to_sgd: bool = True,
    rectification: str = "first_order",
    grad_scale: float = 1.0,
    backend: str = "auto",
) -> None:
    """One RAdam step in place, in one launch for each device and dtype set.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: a tensor or equally many tensors each. The four of
            one index have one shape, one device and one dense memory layout (any permutation of
            contiguous). float32, bfloat16 and float16 mix freely, and compute in float32;
            float64 goes with float64; complex tensors are stepped as pairs of reals. Gradients
            are only read.
        step: how many steps this one makes, from 1 (torch's functional form advances a tensor
            instead; here the caller counts).
        lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, maximize, rho_threshold,
            degenerated_to_sgd, rectification: as for `RAdam`.
        grad_scale: multiplies the gradients first, for example 1 / loss scale.
        backend: "auto" or a name from `available_backends()`.

    Raises:
        ValueError: lists of different lengths, tensors that do not fit each other or share memory,
            or betas, eps or a threshold out of range. Nothing is changed.
        RuntimeError: no such backend works for these tensors here. Nothing is changed.
    """
    lists = [
        [x] if isinstance(x, Tensor) else list(x) for x in (params, grads, exp_avgs, exp_avg_sqs)
    ]
    if len({len(tensors) for tensors in lists}) != 1:
        raise ValueError(
            "params, grads, exp_avgs and exp_avg_sqs: expected equally many tensors, got "
            f"{[len(tensors) for tensors in lists]}"
        )
    check_name(backend)
    group = {
        "lr": lr,
        "betas": (beta1, beta2),
        "eps": eps,
        "weight_decay": weight_decay,
        "decoupled_weight_decay": decoupled_weight_decay,
        "maximize": maximize,
        "rho_threshold": rho_threshold,
        "degenerated_to_sgd": degenerated_to_sgd,
        "rectification": rectification,
        "grad_scale": grad_scale,
    }
    table = cpu.Table()
    for i, tensors in enumerate(zip(*lists, strict=True)):
        try:
            table.add(*map(_real, tensors), float(step), 0, tensors[0])
        except ValueError as error:
            shapes = ", ".join(
                f"{name} {str(t.dtype).removeprefix('torch.')} {tuple(t.shape)} on {t.device}"
                for name, t in zip(("param", "grad", "exp_avg", "exp_avg_sq"), tensors, strict=True)
            )
            raise ValueError(f"tensors {i}: {error}; got {shapes}") from None
    launch(table, [group], backend, lambda i: f"params[{i}]")
    if lists[2]:
        torch.autograd.graph.increment_version(lists[2] + lists[3])


def _real(tensor: Tensor) -> Tensor:
    if not tensor.is_complex():
        return tensor
    with torch.no_grad():
        return torch.view_as_real(tensor)
