"""Parameters that are DTensors: stepped by their local parts, in C++ where placements agree."""

import sys

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from radam_kernels import RAdam
from radam_kernels.modules import cpu
from tests.distributed.training import fully_shard
from tests.helpers import MOMENTS

tensor = pytest.importorskip("torch.distributed.tensor")


def sharded(values: Tensor, mesh, placement=None) -> Tensor:
    """On a mesh of one process, whose part is the whole."""
    return tensor.DTensor.from_local(values.clone(), mesh, [placement or tensor.Shard(0)])


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
    assert all(optimizer.state[p][key]._spec is p._spec for key in MOMENTS)
    torchs = torch.optim.RAdam([q := Parameter(sharded(torch.ones(8), mesh))])
    q.grad = p.grad
    torchs.step()
    optimizer.load_state_dict(torchs.state_dict())
    assert all(optimizer.state[p][key]._spec is p._spec for key in MOMENTS)
    assert torch.equal(optimizer.state[p]["exp_avg"].to_local(), torch.full((8,), 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_dtensors_are_stepped_as_plain_tensors_are(mesh, dtype):
    values = torch.randn(6, 4, dtype=dtype)
    p, q = Parameter(sharded(values, mesh)), Parameter(values.clone())
    optimizers = [RAdam([p], lr=0.1), RAdam([q], lr=0.1)]
    for i in range(8):
        q.grad = torch.randn(6, 4, dtype=dtype)
        p.grad = sharded(q.grad, mesh, tensor.Replicate() if i % 2 else None)
        if i == 4:
            checkpoint = optimizers[0].state_dict()
            optimizers[0] = RAdam([p], lr=0.1)
            optimizers[0].load_state_dict(checkpoint)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(p.to_local(), q)
    ours, plain = optimizers[0].state[p], optimizers[1].state[q]
    for key in MOMENTS:
        assert ours[key].placements == p.placements
        assert torch.equal(ours[key].to_local(), plain[key])
        assert ours[key].dtype == plain[key].dtype


def test_a_step_bumps_the_version_of_the_dtensor(mesh):
    p = Parameter(sharded(torch.ones(8), mesh))
    optimizer = RAdam([p])
    for _ in range(2):
        p.grad = sharded(torch.ones(8), mesh)
        before = p._version
        optimizer.step()
        assert p._version > before


@pytest.mark.parametrize("put", ["Replicate", "plain"])
def test_a_moment_put_into_the_state_is_placed_as_its_parameter(mesh_of, put):
    """The second of two ranks steps without the other one."""
    mesh = mesh_of(2, rank=1)
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


@pytest.mark.parametrize("loaded", ["Replicate", "plain", "Shard"])
def test_a_moment_placed_otherwise_is_redistributed_at_load(mesh_of, loaded):
    """The first of two ranks steps without the other one."""
    mesh = mesh_of(2, rank=0)
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
    for key in MOMENTS:
        assert torch.equal(optimizer.state[p][key].to_local(), whole[:3])
        assert optimizer.state[p][key].placements == p.placements


def test_a_bias_of_as_many_elements_as_ranks_is_not_broadcast(mesh_of):
    mesh = mesh_of(4, rank=1)
    moment = tensor.DTensor.from_local(torch.ones(1), mesh, [tensor.Shard(0)])
    local = torch.arange(4.0)
    p = Parameter(tensor.DTensor.from_local(local, mesh, [tensor.Shard(0)]))
    optimizer = RAdam([p])
    state = {0: {"step": torch.tensor(3.0), "exp_avg": moment, "exp_avg_sq": moment}}
    with pytest.raises(ValueError, match=r"expected shape \(16,\), got \(4,\)"):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    assert not optimizer.state


def test_a_moment_of_equal_local_shape_but_other_placement_is_redistributed(mesh_of):
    """Its local shapes are the same either way."""
    mesh = mesh_of(2, 2, rank=0)
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


def test_a_replicated_gradient_of_a_sharded_parameter(mesh_of):
    mesh = mesh_of(2, rank=0)
    p = Parameter(tensor.DTensor.from_local(torch.zeros(3, 4), mesh, [tensor.Shard(0)]))
    grad = torch.arange(24.0).view(6, 4)
    p.grad = tensor.DTensor.from_local(grad, mesh, [tensor.Replicate()])
    optimizer = RAdam([p], lr=1.0)
    optimizer.step()
    torch.testing.assert_close(p.to_local(), -grad[:3])
    assert optimizer.state[p]["exp_avg"].to_local().shape == (3, 4)
    assert optimizer.state[p]["exp_avg"].shape == (6, 4)


def test_a_step_waits_for_gradients_that_a_collective_is_still_writing(mesh):
    from torch.distributed import _functional_collectives as collectives

    def reduced(*shape: int) -> Tensor:
        return collectives.all_reduce(torch.ones(shape), "sum", mesh)

    results = []
    for cls in (RAdam, torch.optim.RAdam):
        params = [
            Parameter(torch.ones(8)),
            Parameter(torch.ones(4, 2).t()),
            Parameter(sharded(torch.ones(8), mesh)),
        ]
        optimizer = cls(params, lr=0.1)
        for _ in range(8):
            params[0].grad = reduced(8)
            params[1].grad = reduced(2, 4)
            params[2].grad = tensor.DTensor.from_local(reduced(8), mesh, [tensor.Shard(0)])
            assert type(params[0].grad) is not Tensor
            optimizer.step()
        results.append([*(p.detach() for p in params[:2]), params[2].detach().to_local()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_optimizer_made_before_fully_shard_warns_once(mesh, recwarn):
    """It holds the parameters that fully_shard has replaced."""
    model = torch.nn.Linear(3, 2)
    optimizer = RAdam(model.parameters())
    fully_shard(model, mesh=mesh)
    right = RAdam(model.parameters())
    for p in model.parameters():
        p.grad = p.detach().clone()
    for _ in range(5):
        optimizer.step()
        right.step()
    words = "no parameter has had a gradient in 3 steps"
    assert [words in str(warning.message) for warning in recwarn] == [True]
