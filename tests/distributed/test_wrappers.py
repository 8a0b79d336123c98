"""Wrappers of models and optimizers for several processes, here with one: DDP, FSDP2, ZeRO."""

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from radam_kernels import RAdam
from tests.helpers import STEPS, assert_same_parameters, network, train

pytestmark = pytest.mark.usefixtures("mesh")


@pytest.mark.parametrize("flatten", [False, True], ids=["", "flatten"])
@pytest.mark.parametrize("views", [False, True], ids=["", "gradient_as_bucket_view"])
@pytest.mark.parametrize("order", ["before DDP", "after DDP"])
def test_distributed_data_parallel(flatten, views, order):
    plain, model = network(), network()
    train(plain, RAdam(plain.parameters(), lr=0.1))
    if order == "before DDP":
        optimizer = RAdam(model.parameters(), lr=0.1, flatten=flatten)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=views)
    if order == "after DDP":
        optimizer = RAdam(wrapped.parameters(), lr=0.1, flatten=flatten)
    train(wrapped, optimizer)
    assert_same_parameters(model, plain, rtol=1e-6, atol=1e-7)
    assert optimizer.state[model[0].weight]["step"] == STEPS


def test_fully_sharded_parameters(mesh):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    if not hasattr(torch.cpu.current_stream(), "record_event"):
        pytest.skip("fully_shard of this torch does not run on the CPU")
    plain, model = network(), network()
    fsdp.fully_shard(model, mesh=mesh)
    train(plain, RAdam(plain.parameters(), lr=0.1))
    train(model, RAdam(model.parameters(), lr=0.1))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-6, atol=1e-7)


def test_zero_redundancy_optimizer():
    zero = pytest.importorskip("torch.distributed.optim").ZeroRedundancyOptimizer
    plain, model = network(), network()
    train(plain, RAdam(plain.parameters(), lr=0.1))
    optimizer = zero(model.parameters(), optimizer_class=RAdam, lr=0.1)
    train(model, optimizer)
    assert_same_parameters(model, plain, rtol=0, atol=0)


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
