"""Models and states of the optimizer in files of safetensors."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from radam_kernels import RAdam
from tests.frameworks.training import own_options
from tests.helpers import STATE, assert_same, network, train

pytest.importorskip("safetensors", reason="pip install 'radam_kernels[frameworks]'")

from safetensors.torch import load_file, save_file


def save_state(optimizer: Optimizer, path: Path) -> None:
    states = optimizer.state_dict()["state"]
    save_file({f"{i}.{key}": x for i, own in states.items() for key, x in own.items()}, path)


def load_state(optimizer: Optimizer, path: Path) -> None:
    tensors = load_file(path)
    states = {
        i: {key: tensors[f"{i}.{key}"] for key in STATE} for i in range(len(tensors) // len(STATE))
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


@own_options
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_is_resumed_to_the_bit(dtype, options, tmp_path):
    def made(seed: int) -> tuple[nn.Module, RAdam]:
        model = network(seed, dtype)
        return model, RAdam(model.parameters(), lr=0.05, **options)

    model, optimizer = made(seed=0)
    train(model, optimizer, 7)
    save_file(model.state_dict(), tmp_path / "model.safetensors")  # save_model refuses flat ones
    save_state(optimizer, tmp_path / "optimizer.safetensors")
    resumed, other = made(seed=1)
    resumed.load_state_dict(load_file(tmp_path / "model.safetensors"))
    load_state(other, tmp_path / "optimizer.safetensors")
    train(model, optimizer, 7, first=7)
    train(resumed, other, 7, first=7)
    assert_same(other, optimizer)
