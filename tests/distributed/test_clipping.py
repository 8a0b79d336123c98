"""clip_grad_norm_ of sharded gradients: the norm of all ranks together, in few collectives."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import Parameter

from radam_kernels import RAdam
from tests.distributed.training import fully_shard
from tests.helpers import randn

# On 2 and 4 ranks: equal shards; uneven ones; ranks with nothing.
SHAPES = [(8, 3), (5, 2), (1, 3), (3,)]


class Twins:
    """The same parameters with the same gradients, placed in some way and plain."""

    def __init__(self, kinds, norm_type: float) -> None:
        """
        Args:
            kinds: (shape, mesh or None for a plain tensor, placements) of each parameter.
        """
        self.norm_type = norm_type
        self.placed, self.plain = [], []
        for i, (shape, mesh, placements) in enumerate(kinds):
            values, grad = (randn(*shape, dtype=torch.float64, seed=2 * i + j) for j in range(2))
            self.plain.append(Parameter(values.clone()))
            self.plain[-1].grad = grad.clone()
            if mesh is not None:
                values, grad = (distribute_tensor(x, mesh, placements) for x in (values, grad))
            self.placed.append(Parameter(values))
            self.placed[-1].grad = grad

    def step(self) -> CommDebugMode:
        """Clips and steps both, and compares; returns what the placed ones communicated."""
        ours, plain = (RAdam(params, lr=0.1) for params in (self.placed, self.plain))
        with CommDebugMode() as communication:
            norm = ours.clip_grad_norm_(0.1, self.norm_type)
        assert not isinstance(norm, DTensor)
        truth = plain.clip_grad_norm_(0.1, self.norm_type)
        torch.testing.assert_close(norm, truth, rtol=1e-14, atol=0, equal_nan=True)
        every = [torch.empty_like(norm) for _ in range(dist.get_world_size())]
        dist.all_gather(every, norm)
        assert all(other.isnan() if norm.isnan() else torch.equal(other, norm) for other in every)
        for optimizer in (ours, plain):
            optimizer.step()
        for p, q in zip(self.placed, self.plain, strict=True):
            p = p.full_tensor() if isinstance(p, DTensor) else p
            torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-15, equal_nan=True)
        return communication


@pytest.mark.distributed(2, 4)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf, 3.0])
def test_shards_replicas_and_plain_tensors_together(world, norm_type):
    mesh = init_device_mesh("cpu", (world,))
    kinds = [(shape, mesh, [Shard(0)]) for shape in SHAPES]
    kinds += [(shape, mesh, [Replicate()]) for shape in SHAPES]
    kinds += [((4, 4), mesh, [Shard(1)]), ((7,), None, None)]
    communication = Twins(kinds, norm_type).step()
    assert communication.get_total_counts() == 1


@pytest.mark.distributed(4)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_a_mesh_of_two_dimensions_takes_one_all_reduce_for_each(norm_type):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    both = itertools.product([Shard(0), Shard(1), Replicate()], repeat=2)
    kinds = [((6, 5), mesh, list(placements)) for placements in both]
    # Parts of the same mesh share its process groups.
    kinds += [(shape, mesh["model"], [Shard(0)]) for shape in SHAPES]
    kinds += [((3, 4), mesh["data"], [Shard(1)]), ((3, 4), mesh["data"], [Replicate()])]
    assert Twins(kinds, norm_type).step().get_total_counts() == 2


@pytest.mark.distributed(4)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize(("value", "other"), [(math.inf, 0.0), (math.nan, math.inf)])
def test_every_rank_sees_what_is_not_finite_on_one(norm_type, value, other):
    mesh = init_device_mesh("cpu", (4,))
    twins = Twins([((8, 3), mesh, [Shard(0)]), ((8,), mesh, [Shard(0)])], norm_type)
    for p, i, bad in ((0, 5, value), (1, 0, other)):
        twins.plain[p].grad[i] = bad
        twins.placed[p].grad = distribute_tensor(twins.plain[p].grad, mesh, [Shard(0)])
    twins.step()


@pytest.mark.distributed(2, 4)
def test_pending_sums_are_summed_before_the_norm(world):
    mesh = init_device_mesh("cpu", (world,))
    total = torch.arange(12.0, dtype=torch.float64).view(4, 3)
    share = total if dist.get_rank() == 0 else torch.zeros_like(total)
    for placement in (Replicate(), Shard(0)):
        param = Parameter(distribute_tensor(torch.zeros_like(total), mesh, [placement]))
        param.grad = DTensor.from_local(share.clone(), mesh, [Partial()], run_check=False)
        optimizer = RAdam([param], lr=0.1)
        norm = optimizer.clip_grad_norm_(1.0)
        torch.testing.assert_close(norm, total.norm(), rtol=1e-14, atol=0)
        assert param.grad.placements == (Partial(),)
        optimizer.step()
        moved = total / (total.norm() + 1e-6)
        torch.testing.assert_close(param.full_tensor(), -0.1 * moved, rtol=1e-12, atol=0)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.last = nn.Linear(6, 1)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.last(x)


@pytest.mark.distributed(2, 4)
def test_fully_sharded_training_clips_as_one_process_does(world):
    train(init_device_mesh("cpu", (world,)))


@pytest.mark.distributed(4)
def test_so_does_hybrid_sharded_training():
    train(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def train(mesh: DeviceMesh) -> None:
    sharded, plain = Tower().double(), Tower().double()
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    optimizers = [RAdam(model.parameters(), lr=0.1) for model in (sharded, plain)]
    for step in range(8):
        rows = randn(8, 6, dtype=torch.float64, seed=step)
        mine = rows.chunk(dist.get_world_size())[dist.get_rank()]
        norms = []
        for model, optimizer, x in zip((sharded, plain), optimizers, (mine, rows), strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            norms.append(optimizer.clip_grad_norm_(0.01))
            optimizer.step()
        assert norms[0] > 0.01
        torch.testing.assert_close(*norms, rtol=1e-12, atol=0)
    for p, q in zip(sharded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.distributed(2)
def test_accumulation_after_the_clip_is_refused():
    model = Tower()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = RAdam(model.parameters(), lr=0.1)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.clip_grad_norm_(0.01)
    model(torch.ones(2, 6)).sum().backward()
    with pytest.raises(RuntimeError, match="changed in place"):
        optimizer.step()


@pytest.mark.distributed(2)
def test_flat_parameters_of_fsdp1_are_refused():
    for use_orig_params in (False, True):
        model = FullyShardedDataParallel(
            Tower(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
        )
        optimizer = RAdam(model.parameters())
        model(torch.ones(2, 6)).sum().backward()
        with pytest.raises(RuntimeError, match=r"clip_grad_norm_\(\) of the FSDP module"):
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
