"""What the tests of several folders share: tensors, optimizers, and what "the same bits" means."""

import itertools

import pytest
import torch
from torch import Tensor

from radam_kernels.modules import DTYPES, cpu

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = ("step", *MOMENTS)
USUAL = dict(lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8)
# Codes of every (param, grad, moments) that the kernels take, and sizes around their vectors.
DTYPE_SETS = [
    codes for codes in itertools.product(range(len(DTYPES)), repeat=3) if cpu.supported(*codes)
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


def dtypes_id(codes: tuple[int, ...]) -> str:
    """The name of a dtype set, for the id of a test."""
    return "-".join(cpu.dtypes[code] for code in codes)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values; of real dtypes the same ones, rounded."""
    made_in = dtype if dtype.is_complex else torch.float64
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=made_in).to(dtype)


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


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
