"""Checkpoints of torch.distributed.checkpoint, of one process."""

import copy

import pytest

from radam_kernels import RAdam
from tests.helpers import assert_same_parameters, network, train

pytestmark = pytest.mark.usefixtures("mesh")


def test_distributed_checkpoint_state_dicts():
    api = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model, other = network(), network(seed=1)
    optimizer, loaded = RAdam(model.parameters(), lr=0.1), RAdam(other.parameters(), lr=0.1)
    train(model, optimizer, 3)
    saved = api.get_state_dict(model, optimizer)
    api.set_state_dict(
        other, loaded, model_state_dict=saved[0], optim_state_dict=copy.deepcopy(saved[1])
    )
    train(model, optimizer, 5, first=3)
    train(other, loaded, 5, first=3)
    assert_same_parameters(other, model, rtol=0, atol=0)
