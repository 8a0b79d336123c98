"""torchao: int8 weights that stay as they are, and int8 weights that are trained."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from radam_kernels import RAdam
from tests.frameworks.training import FLOAT32, Make, assert_trains_as_with_torch
from tests.helpers import TorchRAdam, randn, saved

pytest.importorskip("torchao", reason="pip install 'radam_kernels[frameworks]'")

from torchao.prototype.quantized_training import int8_weight_only_quantized_training
from torchao.quantization import Int8WeightOnlyConfig, quantize_


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)).to(dtype)


def int8_network(dtype: torch.dtype) -> nn.Sequential:
    """The first layer has a weight that is trained in int8, with stochastic rounding."""
    model = network(dtype)
    quantize_(model[0], int8_weight_only_quantized_training(), filter_fn=lambda *_: True)
    return model


def train(model: nn.Module, optimizer: Optimizer, steps: int = 12, first: int = 0) -> None:
    torch.manual_seed(first)  # of stochastic rounding
    for step in range(first, first + steps):
        optimizer.zero_grad()
        x = randn(16, 32, dtype=next(model.parameters()).dtype, seed=step)
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("flatten", [False, True], ids=["", "flatten"])
def test_layers_beside_frozen_int8_weights_train_as_with_torch(flatten):
    def run(make: Make):
        model = network()
        quantize_(model[0], Int8WeightOnlyConfig(), filter_fn=lambda *_: True)
        frozen = model[0].weight.dequantize()
        options = {"flatten": True} if flatten and make is RAdam else {}
        optimizer = make(model.parameters(), lr=0.01, **options)
        train(model, optimizer)
        assert torch.equal(model[0].weight.dequantize(), frozen)
        return nn.ModuleList([nn.ParameterList([model[0].bias]), model[2]]), optimizer

    assert_trains_as_with_torch(run, **FLOAT32)


@pytest.mark.parametrize("capturable", [False, True], ids=["", "capturable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights_that_are_trained_take_torchs_steps(dtype, capturable):
    """From a checkpoint of torch's: at its first step ours tries out a copy, and draws for it."""
    other = int8_network(dtype)
    torchs = TorchRAdam(other.parameters(), lr=0.01)
    train(other, torchs, 2)
    model = copy.deepcopy(other)
    # With moments as torch has them for bfloat16 parameters.
    ours = RAdam(model.parameters(), lr=0.01, capturable=capturable, state_dtype=dtype)
    own_options = ours.state_dict()["param_groups"]
    ours.load_state_dict(copy.deepcopy({**torchs.state_dict(), "param_groups": own_options}))
    train(model, ours, 10, first=2)
    train(other, torchs, 10, first=2)
    a, b = model[0].weight, other[0].weight
    # Without the same draws, more than a third of them differ.
    assert (a.int_data != b.int_data).float().mean() < 0.01
    torch.testing.assert_close(a.scale, b.scale, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("capturable", [False, True], ids=["", "capturable"])
def test_int8_weights_are_resumed_to_the_bit(capturable):
    whole = int8_network(torch.bfloat16)
    optimizer = RAdam(whole.parameters(), lr=0.01, capturable=capturable)
    train(whole, optimizer, 7)
    resumed = copy.deepcopy(whole)
    other = RAdam(resumed.parameters(), lr=0.01, capturable=capturable)
    other.load_state_dict(saved(optimizer.state_dict()))
    train(whole, optimizer, first=7)
    train(resumed, other, first=7)
    assert torch.equal(resumed[0].weight.int_data, whole[0].weight.int_data)
    assert torch.equal(resumed[0].weight.scale, whole[0].weight.scale)
