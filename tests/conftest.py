"""Lets the Triton backend run on a machine without a GPU, and says what "the same bits" means."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of every element, with one pattern for all NaNs."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    tensor = torch.where(tensor.isnan(), torch.nan, tensor).contiguous()
    return tensor.view(_BITS[tensor.element_size()])


@pytest.fixture(scope="session")
def same_bits():
    """Whether two tensors hold the same bits: NaN is NaN, -0.0 is not 0.0."""

    def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(_bits(a.detach().cpu()), _bits(b.detach().cpu()))
        )

    return same_bits
