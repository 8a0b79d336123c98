"""parallelize_module, alone and under fully_shard, and gradients of other placements."""

import pytest
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from tests.distributed.training import Net, Training, Wrapper, assert_follows_torch

parallel = pytest.importorskip("torch.distributed.tensor.parallel")
fsdp = pytest.importorskip("torch.distributed.fsdp")
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
                fsdp.fully_shard(layer, mesh=self.mesh["data"])
            fsdp.fully_shard(net, mesh=self.mesh["data"])
        return net


@pytest.mark.distributed(2, 4)
@pytest.mark.parametrize("how", [Training(width=8), Training(width=8, clip=True, two_groups=True)])
def test_trains_as_torch_does(how, world):
    assert_follows_torch(TensorParallel(world), how)


@pytest.mark.distributed(4)
@pytest.mark.parametrize(
    "how", [Training(width=8), Training(width=8, inf_at=4, unscale=True, clip=True)]
)
def test_trains_fully_sharded_as_torch_does(how):
    assert_follows_torch(TensorParallel(2, 2), how)
