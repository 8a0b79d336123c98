"""parallelize_module, alone and under fully_shard, and gradients of other placements."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import Parameter
from torch.torch_version import TorchVersion

from radam_kernels import RAdam
from tests.distributed.training import Net, Training, Wrapper, assert_follows_torch, fully_shard
from tests.helpers import MOMENTS, STEPS, randn, same_bits

parallel = pytest.importorskip("torch.distributed.tensor.parallel")
tensor = pytest.importorskip("torch.distributed.tensor")


class TensorParallel(Wrapper):
    """On a mesh of one dimension; of two, fully sharded over the first."""

    def __init__(self, *shape: int) -> None:
        self.mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "model")[-len(shape) :])
        if len(shape) == 2:
            self.rank, self.world = self.mesh["data"].get_local_rank(), shape[0]

    def wrap(self, net: Net) -> nn.Module:
        sequence = tensor.Shard(1)
        plan = {
            "first": parallel.ColwiseParallel(),
            "second": parallel.RowwiseParallel(output_layouts=sequence),
            "norm": parallel.SequenceParallel(),
            "third": parallel.ColwiseParallel(input_layouts=sequence),
            "last": parallel.RowwiseParallel(),
        }
        net = parallel.parallelize_module(net, self.mesh["model"], plan)
        if self.world > 1:
            for layer in (net.second, net.third):
                fully_shard(layer, mesh=self.mesh["data"])
            fully_shard(net, mesh=self.mesh["data"])
        return net

    def make_infinite(self, model: nn.Module) -> None:
        """On one rank only."""
        if dist.get_rank() == dist.get_world_size() - 1:
            super().make_infinite(model)


TRAININGS = {
    "clip, two groups": Training(width=8, clip=True, two_groups=True),
    "GradScaler": Training(width=8, inf_at=4),
    "GradScaler, capturable": Training(width=8, inf_at=4, ours={"capturable": True}),
}


@pytest.mark.distributed(2)
@pytest.mark.parametrize("how", TRAININGS.values(), ids=TRAININGS)
def test_trains_as_torch_does(how, world):
    # torch 2.6 clips gradients of tensor-parallel parameters by another norm.
    alone = not how.clip or TorchVersion(torch.__version__) >= (2, 7)
    assert_follows_torch(TensorParallel(world), how, alone=alone)


@pytest.mark.distributed(4)
@pytest.mark.parametrize("training", ["clip, two groups", "GradScaler, capturable"])
def test_trains_fully_sharded_as_torch_does(training):
    assert_follows_torch(TensorParallel(2, 2), TRAININGS[training])


@pytest.mark.distributed(2, 4)
def test_gradients_placed_otherwise(world):
    """The parts of a Partial gradient are zero but for one rank's, so that its sum is exact."""
    mesh = init_device_mesh("cpu", (world,))
    placements = [tensor.Shard(0), tensor.Shard(1), tensor.Replicate()]
    values = torch.arange(15.0).view(5, 3)
    plain = Parameter(values.clone())
    params, kinds = [], []
    for own, other in itertools.product(placements, [*placements, tensor.Partial()]):
        params.append(Parameter(tensor.distribute_tensor(values.clone(), mesh, [own])))
        kinds.append(other)
    optimizer, alone = RAdam(params, lr=0.1), RAdam([plain], lr=0.1)
    for step in range(STEPS):
        plain.grad = randn(5, 3, seed=step)
        for p, other in zip(params, kinds, strict=True):
            if other.is_partial():
                part = plain.grad * (dist.get_rank() == world - 1)
                p.grad = tensor.DTensor.from_local(part, mesh, [other])
            else:
                p.grad = tensor.distribute_tensor(plain.grad, mesh, [other])
        optimizer.step()
        alone.step()
    for p in params:
        assert same_bits(p.full_tensor(), plain)
        for key in MOMENTS:
            assert optimizer.state[p][key].placements == p.placements
            assert same_bits(optimizer.state[p][key].full_tensor(), alone.state[plain][key])
