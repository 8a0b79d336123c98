"""The step as a function of tensors, for callers that keep their own state or flat buffers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from .backends import BackendChoice, check_name
from .hyperparameters import DEFAULTS
from .launch import explain, launch
from .modules import cpu
from .scaling import UNSCALED, Scaling
from .schedule import Form


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
    weight_decay: float = DEFAULTS["weight_decay"],
    decoupled_weight_decay: bool = DEFAULTS["decoupled_weight_decay"],
    maximize: bool = DEFAULTS["maximize"],
    rho_threshold: float = DEFAULTS["rho_threshold"],
    degenerated_to_sgd: bool = DEFAULTS["degenerated_to_sgd"],
    rectification: Form = DEFAULTS["rectification"],
    grad_scale: float | Tensor = 1.0,
    backend: BackendChoice = "auto",
) -> None:
    """Performs one RAdam step in place, with one launch for each device and dtype set.

    Under torch.compile and torch.export it is one operator, `radam_kernels::radam_`. A compiled
    function takes other values of `step`, `lr` and `grad_scale` without compiling again.

    Arguments that are not listed are as for `RAdam`; `beta1` and `beta2` are its `betas`.

    Args:
        params: a tensor or a sequence of tensors. The four tensors of one index have the same
            shape, device and dense memory layout (any permutation of contiguous). float32,
            bfloat16 and float16 mix freely and compute in float32; float64 mixes with float64 only;
            complex tensors are stepped as pairs of reals.
        grads: as many gradients, which are only read.
        exp_avgs: as many running averages of the gradient.
        exp_avg_sqs: as many running averages of the gradient's square.
        step: the number of this step, from 1. The caller counts; torch's functional form advances
            tensors instead.
        grad_scale: multiplies the gradients first, for example 1 / loss scale. A tensor of one
            element is read on its device: nothing waits for a GPU.
        backend: "auto" or a name from `available_backends()`.

    Raises:
        ValueError: lists of different lengths, tensors that do not match or that share memory, or
            betas, eps or a threshold out of range. Nothing is changed.
        RuntimeError: the backend does not work here, or not for these tensors. Nothing is changed.
    """
    lists = _listed(params), _listed(grads), _listed(exp_avgs), _listed(exp_avg_sqs)
    options: dict[str, Any] = {
        "eps": eps,
        "weight_decay": weight_decay,
        "decoupled_weight_decay": decoupled_weight_decay,
        "maximize": maximize,
        "rho_threshold": rho_threshold,
        "degenerated_to_sgd": degenerated_to_sgd,
        "rectification": rectification,
    }
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        numbers = _as_tensor(lr), _as_tensor(grad_scale)
        _op(*lists, *numbers, step, beta1, beta2, backend, **options)
    else:
        _step(*lists, lr, grad_scale, step, beta1, beta2, backend, options)


def _as_tensor(number: float | Tensor) -> Tensor:
    # A multiplication, because torch.compile keeps its factor a variable. It would compile any
    # other use of a float again for each value.
    if isinstance(number, Tensor):
        return number
    return torch.ones((), dtype=torch.float64, device="cpu") * number


def _step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    lr: float | Tensor,
    grad_scale: float | Tensor,
    step: int,
    beta1: float,
    beta2: float,
    backend: BackendChoice,
    options: dict[str, Any],
) -> None:
    lists = params, grads, exp_avgs, exp_avg_sqs
    if len({len(tensors) for tensors in lists}) != 1:
        raise ValueError(
            "params, grads, exp_avgs and exp_avg_sqs: expected equally many tensors, got "
            f"{[len(tensors) for tensors in lists]}"
        )
    check_name(backend)
    scaling = UNSCALED
    if isinstance(grad_scale, Tensor):
        if grad_scale.numel() != 1 or grad_scale.is_complex():
            raise ValueError(
                "grad_scale: expected a number or a real tensor of one element, got "
                f"{grad_scale.dtype} of shape {tuple(grad_scale.shape)}"
            )
        if grad_scale.device.type == "cpu":
            grad_scale = float(grad_scale.detach())
        else:
            scaling, grad_scale = Scaling(factor=grad_scale.detach()), 1.0
    group = options | {"lr": lr, "betas": (beta1, beta2), "grad_scale": grad_scale}
    plan = cpu.Plan()
    try:
        for i, reason in plan.refresh_tensors(*lists, float(step), group, scaling):
            shapes = ", ".join(
                f"{name} {str(t.dtype).removeprefix('torch.')} {tuple(t.shape)} on {t.device}"
                for name, t in zip(_STREAMS, (tensors[i] for tensors in lists), strict=True)
            )
            raise ValueError(f"tensors {i}: {reason}; got {shapes}")
    except (cpu.Refusal, cpu.InvalidGroup) as error:
        raise explain(error, plan, _name_among(params)) from None
    launch(plan, backend)


# For torch.compile, torch.export and dispatch modes. The schema is written out, because older
# versions of torch can't infer it from list[Tensor].
@torch.library.custom_op(
    "radam_kernels::radam_",
    mutates_args=("params", "exp_avgs", "exp_avg_sqs"),
    schema="(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor lr, Tensor grad_scale, SymInt step, float beta1, "
    "float beta2, str backend, *, float eps, float weight_decay, bool decoupled_weight_decay, "
    "bool maximize, float rho_threshold, bool degenerated_to_sgd, str rectification) -> ()",
)
def _op(*arguments: Any, **options: Any) -> None:
    _step(*[*arguments, options])


_STREAMS = ("param", "grad", "exp_avg", "exp_avg_sq")
# Before torch 2.13, inductor copies a tensor from the wrong place if its storage begins before it.
COMPILES_VIEWS = TorchVersion(torch.__version__) >= "2.13"


@_op.register_fake
def _fake(*lists: Any, **_: Any) -> None:
    """Runs while a function is traced: there is nothing to compute."""
    for name, tensors in zip(_STREAMS, lists, strict=False):
        for i, tensor in enumerate(tensors if name != "grad" and not COMPILES_VIEWS else ()):
            if tensor.storage_offset() != 0:
                raise RuntimeError(
                    f"radam_: {name}s[{i}] begins within a storage, as tensors in flat buffers do, "
                    f"and torch {torch.__version__} compiles such writes wrongly; call radam_ "
                    "outside of compiled functions (torch.compiler.disable), give it tensors with "
                    "storages of their own, or use torch 2.13"
                )


def _listed(tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _name_among(params: list[Tensor]) -> Callable[[Tensor], str]:
    def name(owner: Tensor) -> str:
        return next(f"params[{i}]" for i, param in enumerate(params) if param is owner)

    return name
