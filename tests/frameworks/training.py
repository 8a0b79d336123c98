"""What these tests share: one training by both optimizers, and a small language model."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from radam_kernels import RAdam
from tests.helpers import TorchRAdam, assert_same_parameters

# Either RAdam, with its parameters and options.
Make = Callable[..., Optimizer]
Run = Callable[[Make], tuple[nn.Module, Optimizer]]


# Options that only ours has on the CPU: an optimizer of torch's gets none of them.
own_options = pytest.mark.parametrize(
    "options", [{}, {"flatten": True}, {"capturable": True}], ids=["", "flatten", "capturable"]
)

# Tolerances for float32 weights, computed in float32, and with 16-bit activations, where a last bit
# of a weight may decide that of an activation.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}
MIXED = {"rtol": 1e-3, "atol": 1e-4}

RECTIFIED = 6  # with the default betas, torch rectifies from this step on


def gpt2(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A GPT-2 of one layer, from its configuration."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).to(dtype)


def assert_trains_as_with_torch(run: Run, **tolerance: float) -> None:
    """`run(make)` trains with the optimizer that `make` makes; torch's gives the same parameters.

    Without tolerances, those of a model in float64: only the last bits may differ.
    """
    (model, ours), (other, torchs) = run(RAdam), run(TorchRAdam)
    assert (type(ours), type(torchs)) == (RAdam, TorchRAdam)
    assert counts(ours) == counts(torchs)
    assert min(counts(ours)) > RECTIFIED
    assert_same_parameters(model, other, **(tolerance or {"rtol": 1e-10, "atol": 1e-12}))


def make_with(options: dict, make: Make, *args, **settings) -> Optimizer:
    """The optimizer, with the options if it is ours."""
    return make(*args, **settings, **(options if make is RAdam else {}))


def counts(optimizer: Optimizer) -> list[int]:
    return [int(state["step"]) for state in optimizer.state.values()]
