"""Parameters that are DTensors: stepped by their local parts, in C++ where placements agree."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from bench import dtensors
from radam_kernels import RAdam
from radam_kernels.modules import cpu

tensor = pytest.importorskip("torch.distributed.tensor")

KEYS = ("step", "exp_avg", "exp_avg_sq")


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(values: Tensor, mesh, placement=None) -> Tensor:
    return tensor.distribute_tensor(values.clone(), mesh, [placement or tensor.Shard(0)])


def frames(call) -> int:
    """Python functions that a call enters."""
    entered = 0

    def count(frame, event, arg) -> None:
        nonlocal entered
        entered += event == "call"

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def test_dtensors_take_no_python_per_parameter(mesh):
    """FSDP2 gives gradients the spec object of their parameter."""
    if cpu.tensors_read_by() == "Python":
        pytest.skip("this torch has no DLPack exchange API")
    params = [Parameter(sharded(torch.full((8,), float(i)), mesh)) for i in range(100)]
    optimizer = RAdam(params, lr=0.1)
    for _ in range(2):
        for p in params:
            p.grad = tensor.DTensor(torch.ones(8), p._spec, requires_grad=False)
        entered = frames(optimizer.step)
    assert entered < 100


def test_new_and_loaded_moments_have_the_parameters_own_spec(mesh):
    p = Parameter(sharded(torch.ones(8), mesh))
    optimizer = RAdam([p])
    p.grad = sharded(torch.ones(8), mesh)
    optimizer.step()
    assert all(optimizer.state[p][key]._spec is p._spec for key in KEYS[1:])
    torchs = torch.optim.RAdam([q := Parameter(sharded(torch.ones(8), mesh))])
    q.grad = p.grad
    torchs.step()
    optimizer.load_state_dict(torchs.state_dict())
    assert all(optimizer.state[p][key]._spec is p._spec for key in KEYS[1:])
    assert torch.equal(optimizer.state[p]["exp_avg"].to_local(), torch.full((8,), 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_dtensors_are_stepped_as_plain_tensors_are(mesh, dtype):
    values = torch.randn(6, 4, dtype=dtype)
    p, q = Parameter(sharded(values, mesh)), Parameter(values.clone())
    optimizers = [RAdam([p], lr=0.1), RAdam([q], lr=0.1)]
    for i in range(8):
        q.grad = torch.randn(6, 4, dtype=dtype)
        p.grad = sharded(q.grad, mesh, tensor.Replicate() if i % 2 else None)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(p.to_local(), q)
    ours, plain = optimizers[0].state[p], optimizers[1].state[q]
    assert torch.equal(ours["exp_avg_sq"].to_local(), plain["exp_avg_sq"])
    assert ours["exp_avg"].dtype == plain["exp_avg"].dtype


def test_a_step_bumps_the_version_of_the_dtensor(mesh):
    p = Parameter(sharded(torch.ones(8), mesh))
    optimizer = RAdam([p])
    for _ in range(2):
        p.grad = sharded(torch.ones(8), mesh)
        before = p._version
        optimizer.step()
        assert p._version > before


@pytest.mark.parametrize("put", ["Replicate", "plain"])
def test_a_moment_put_into_the_state_is_placed_as_its_parameter(put):
    """The second of two ranks, without the other one: nothing needs to be sent."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=fake.FakeStore(), rank=1, world_size=2)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        p = Parameter(tensor.DTensor.from_local(torch.zeros(1), mesh, [tensor.Shard(0)]))
        p.grad = tensor.DTensor(torch.zeros(1), p._spec, requires_grad=False)
        optimizer = RAdam([p], betas=(0.5, 0.999))
        optimizer.step()
        whole = torch.tensor([2.0, 4.0])
        if put == "Replicate":
            whole = tensor.DTensor.from_local(whole, mesh, [tensor.Replicate()])
        optimizer.state[p]["exp_avg"] = whole
        optimizer.step()
        assert optimizer.state[p]["exp_avg"].to_local() == 2.0
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("loaded", ["Replicate", "plain", "Shard"])
def test_a_moment_placed_otherwise_is_redistributed_at_load(loaded):
    """The first of two ranks, without the other one: nothing needs to be sent."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        whole = torch.arange(24.0).view(6, 4)
        p = Parameter(tensor.DTensor.from_local(torch.zeros(3, 4), mesh, [tensor.Shard(0)]))
        moment = {
            "Replicate": lambda: tensor.DTensor.from_local(whole, mesh, [tensor.Replicate()]),
            "Shard": lambda: tensor.DTensor.from_local(whole[:3], mesh, [tensor.Shard(0)]),
            "plain": lambda: whole,
        }[loaded]()
        optimizer = RAdam([p])
        state = {0: {"step": torch.tensor(3.0), "exp_avg": moment, "exp_avg_sq": moment}}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        for key in KEYS[1:]:
            assert torch.equal(optimizer.state[p][key].to_local(), whole[:3])
            assert optimizer.state[p][key].placements == p.placements
    finally:
        dist.destroy_process_group()


def test_a_bias_of_as_many_elements_as_ranks_is_not_broadcast():
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=fake.FakeStore(), rank=1, world_size=4)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (4,))
        moment = tensor.DTensor.from_local(torch.ones(1), mesh, [tensor.Shard(0)])
        local = torch.arange(4.0)
        p = Parameter(tensor.DTensor.from_local(local, mesh, [tensor.Shard(0)]))
        optimizer = RAdam([p])
        state = {0: {"step": torch.tensor(3.0), "exp_avg": moment, "exp_avg_sq": moment}}
        with pytest.raises(ValueError, match=r"expected shape \(16,\), got \(4,\)"):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        assert not optimizer.state
    finally:
        dist.destroy_process_group()


def test_the_benchmark_of_dtensors_times_every_optimizer(mesh):
    found = dtensors.measure(3, 0.0)
    assert list(found) == [dtensors.PLAIN, dtensors.OURS, dtensors.ADAM, dtensors.RADAM]
    assert all(seconds > 0 for seconds in found.values())


def test_a_moment_of_equal_local_shape_but_other_placement_is_redistributed():
    """The first of four ranks on a 2 x 2 mesh; its local shapes are the same either way."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=4)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2))
        shards = [tensor.Shard(0), tensor.Shard(1)]
        p = Parameter(tensor.DTensor.from_local(torch.zeros(2, 2), mesh, shards))
        p.grad = tensor.DTensor(torch.ones(2, 2), p._spec, requires_grad=False)
        optimizer = RAdam([p])
        optimizer.step()
        whole = [tensor.Replicate(), tensor.Replicate()]
        moment = tensor.DTensor.from_local(torch.arange(16.0).view(4, 4), mesh, whole)
        optimizer.state[p]["exp_avg"] = moment.redistribute(placements=shards[::-1])
        optimizer.step()
        assert optimizer.state[p]["exp_avg"].placements == tuple(shards)
    finally:
        dist.destroy_process_group()
