"""What the tests of several folders share: tensors, optimizers, and what "the same bits" means."""

import io
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim import RAdam as TorchRAdam

from radam_kernels import RAdam
from radam_kernels.modules import DTYPES, FORMAT_NAMES, cpu

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = ("step", *MOMENTS)
USUAL = dict(lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8)
# Codes of every (param, grad, moments) that the kernels take, and sizes around their vectors.
DTYPE_SETS = [
    codes for codes in itertools.product(range(len(DTYPES)), repeat=3) if cpu.supported(*codes)
]
# Likewise, of every set with a format for low memory.
LOW_MEMORY_SETS = [
    codes
    for codes in itertools.product(range(len(FORMAT_NAMES)), repeat=3)
    if cpu.supported(*codes) and codes not in DTYPE_SETS
]
SIZES = (0, 1, 3, 4, 5, 255, 256, 257, 5000)

# For a test, or one of its parameters, that needs a GPU: `pytest -m gpu` runs it.
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="torch finds no GPU (torch.cuda.is_available() is False)",
    ),
]

every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])


def dtypes_id(codes: tuple[int, ...]) -> str:
    """The name of a dtype set, for the id of a test."""
    return "-".join(FORMAT_NAMES[code] for code in codes)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values; of real dtypes the same ones, rounded."""
    made_in = dtype if dtype.is_complex else torch.float64
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=made_in).to(dtype)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    """The bits of every element, with one pattern for all NaNs."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    tensor = torch.where(tensor.isnan(), torch.nan, tensor).contiguous()
    return tensor.view(_BITS[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits: NaN equals NaN, -0.0 does not equal 0.0."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(_bits(a.detach().cpu()), _bits(b.detach().cpu()))
    )


# Optimizers, and their steps on gradients that the number of a step decides.


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Parameters of several shapes and layouts."""
    shapes = [(257,), (4, 5), (), (0,), (3, 8)]
    params = [Parameter(randn(*shape, dtype=dtype, seed=i)) for i, shape in enumerate(shapes)]
    params[-1].data = params[-1].data.t()
    return params


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_gradients(optimizer: Optimizer, number: int = 0) -> None:
    """The gradients of step `number`."""
    for i, p in enumerate(params_of(optimizer)):
        p.grad = randn(*p.shape, dtype=p.dtype, seed=1000 * number + i)


def take_steps(optimizer: Optimizer, count: int = 1, first: int = 1) -> None:
    """Takes the steps `first` and those after it, each with its gradients."""
    for number in range(first, first + count):
        give_gradients(optimizer, number)
        optimizer.step()


def saved(state_dict: dict) -> dict:
    """The state after torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def twin(optimizer: Optimizer, cls: type = RAdam, **options) -> Optimizer:
    """A new optimizer on copies of the parameters, with no state."""
    groups = [
        {**group, "params": [Parameter(p.detach().clone()) for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    if cls is TorchRAdam:
        for group in groups:
            for key in set(group) - set(TorchRAdam([Parameter(torch.ones(1))]).param_groups[0]):
                del group[key]
    return cls(groups, **options)


def assert_same(a: Optimizer, b: Optimizer, **tolerance: float) -> None:
    """Parameters and states of two optimizers are equal: to the bit if no tolerances are given."""
    exact = not tolerance
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for i, (p, q) in enumerate(zip(params_of(a), params_of(b), strict=True)):
        torch.testing.assert_close(p, q, **tolerance, msg=lambda m, i=i: f"param {i}: {m}")
        assert list(a.state.get(p, ())) == list(b.state.get(q, ()))
        for key in a.state.get(p, ()):
            torch.testing.assert_close(
                a.state[p][key],
                b.state[q][key],
                **tolerance,
                check_stride=exact and key != "step",
                msg=lambda m, i=i, key=key: f"{key} of param {i}: {m}",
            )


# A small model and its training.

STEPS = 9  # with the default betas, torch rectifies from step 6


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(16, 6, dtype=dtype, seed=step)


def train(model: nn.Module, optimizer, steps: int = STEPS, first: int = 0) -> None:
    """Trains a network on the batches `first` and those after it."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model(batch(step, next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()


def assert_same_parameters(a: nn.Module, b: nn.Module, **tolerance: float) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **tolerance)
