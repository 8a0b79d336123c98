"""State and gradients that are placed in another way than their parameter, on several ranks."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import Parameter

from radam_kernels import RAdam
from tests.helpers import MOMENTS, randn

# On 2 and on 4 ranks: equal shards; one element a rank, which an unchecked copy would broadcast;
# shards that differ; ranks with nothing.
SHAPES = [(8, 3), (2,), (4,), (5, 2), (3,), (1, 3)]
PLACEMENTS = [Shard(0), Replicate()]
by_pair = pytest.mark.parametrize(
    ("before", "after"),
    list(itertools.product([*PLACEMENTS, None], [*PLACEMENTS, None])),
    ids=lambda placement: str(placement or "plain"),
)


def mesh_of(world: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world,))


def place(values: Tensor, placement, mesh: DeviceMesh) -> Tensor:
    """The same full tensor on every rank, as a DTensor; plain for None."""
    return values.clone() if placement is None else distribute_tensor(values, mesh, [placement])


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_everywhere(tensor: Tensor) -> None:
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    assert all(torch.equal(other, tensor) for other in gathered)


class Twins:
    """Optimizers of parameters placed in some way and of plain ones, with the same gradients."""

    def __init__(self, shapes, placement, mesh: DeviceMesh, **options) -> None:
        self.mesh = mesh
        values = [randn(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(shapes)]
        self.plain = [Parameter(v.clone()) for v in values]
        self.placed = [Parameter(place(v, placement, mesh)) for v in values]
        self.optimizers = [RAdam(p, lr=0.1, **options) for p in (self.placed, self.plain)]
        self.steps = 0

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.steps += 1
            for i, (p, q) in enumerate(zip(self.placed, self.plain, strict=True)):
                q.grad = randn(*q.shape, dtype=q.dtype, seed=100 * self.steps + i)
                placement = p.placements[0] if isinstance(p.data, DTensor) else None
                p.grad = place(q.grad, placement, self.mesh)
            for optimizer in self.optimizers:
                optimizer.step()

    def assert_equal(self) -> None:
        ours, plain = self.optimizers
        for p, q in zip(self.placed, self.plain, strict=True):
            assert torch.equal(full(p.detach()), q)
            for key in MOMENTS:
                moment = ours.state[p][key]
                assert isinstance(moment, DTensor) == isinstance(p.data, DTensor)
                if isinstance(moment, DTensor):
                    assert moment.placements == p.placements
                    assert moment.to_local().shape == p.to_local().shape
                assert torch.equal(full(moment), plain.state[q][key])


@pytest.mark.distributed(2, 4)
@by_pair
def test_a_state_dict_loads_into_parameters_placed_in_another_way(world, before, after):
    mesh = mesh_of(world)
    a, b = Twins(SHAPES, before, mesh), Twins(SHAPES, after, mesh)
    a.step(7)
    b.step(1)  # another number, so that the state of before would show
    b.placed[0].grad = None
    for p, q, r in zip(a.placed, b.placed, b.plain, strict=True):
        r.data.copy_(full(p.detach()))
        q.data.copy_(place(r.detach(), after, mesh))
    for ours, theirs in zip(b.optimizers, a.optimizers, strict=True):
        ours.load_state_dict(theirs.state_dict())
    b.steps = a.steps
    b.step(2)
    b.assert_equal()


@pytest.mark.distributed(2, 4)
@by_pair
def test_moments_may_be_replaced_by_ones_placed_in_another_way(world, before, after):
    """The pair is of the moments and the parameter."""
    mesh = mesh_of(world)
    twins = Twins(SHAPES, after, mesh)
    twins.step(7)
    for p in twins.placed:
        state = twins.optimizers[0].state[p]
        for key in MOMENTS:
            state[key] = place(full(state[key]), before, mesh)
    twins.step(2)
    twins.assert_equal()


@pytest.mark.distributed(4)
def test_a_state_dict_loads_from_another_mesh(world):
    line, square = mesh_of(4), init_device_mesh("cpu", (2, 2))
    for before, after in ((line, square), (square, line)):
        a, b = (
            [Parameter(distribute_tensor(randn(6, 4), mesh, [Shard(0), Replicate()][: mesh.ndim]))]
            for mesh in (before, after)
        )
        optimizers = RAdam(a), RAdam(b)
        a[0].grad = a[0].detach().clone()
        optimizers[0].step()
        optimizers[1].load_state_dict(optimizers[0].state_dict())
        for key in MOMENTS:
            moment = optimizers[1].state[b[0]][key]
            assert (moment.device_mesh, moment.placements) == (after, b[0].placements)
            assert torch.equal(full(moment), full(optimizers[0].state[a[0]][key]))


@pytest.mark.distributed(4)
def test_a_state_dict_from_fewer_ranks_is_refused_on_every_rank(world):
    half = DeviceMesh("cpu", [0, 1])
    moment = DTensor.from_local(torch.ones(2), half, [Replicate()], run_check=False)
    p = Parameter(place(torch.ones(2), Replicate(), mesh_of(4)))
    optimizer = RAdam([p])
    state = {0: {"step": torch.tensor(3.0), "exp_avg": moment, "exp_avg_sq": moment}}
    with pytest.raises(ValueError, match=r"exp_avg of param 0: it is placed on .*, which lacks"):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    assert not optimizer.state


@pytest.mark.distributed(2)
@pytest.mark.parametrize("size", [1, 2])
def test_a_local_part_of_the_wrong_size_is_refused_and_nothing_is_changed(world, size):
    """One of 1 element would be broadcast."""
    mesh = mesh_of(2)
    twins = Twins([(4,), (8,)], Shard(0), mesh)
    twins.step()
    optimizer, second = twins.optimizers[0], twins.placed[1]
    saved, state = optimizer.state_dict(), optimizer.state[second]
    wrong = DTensor.from_local(
        torch.ones(size, dtype=torch.float64),
        mesh,
        [Shard(0)],
        run_check=False,
        shape=second.shape,
        stride=(1,),
    )
    loaded = {**saved["state"], 1: {**saved["state"][1], "exp_avg_sq": wrong}}
    words = rf"param 1.*: its local part has shape \({size},\), its parameter's \(4,\)"
    with pytest.raises(ValueError, match="exp_avg_sq of " + words):
        optimizer.load_state_dict({**saved, "state": loaded})
    right = state["exp_avg_sq"]
    state["exp_avg_sq"] = wrong
    with pytest.raises(ValueError, match="exp_avg_sq of " + words):
        optimizer.step()
    state["exp_avg_sq"] = right
    right, second.grad = second.grad, wrong
    with pytest.raises(ValueError, match="grad of " + words):
        optimizer.step()
    second.grad = right
    twins.assert_equal()
    twins.step()
    twins.assert_equal()


@pytest.mark.distributed(2)
def test_a_loaded_shard_does_not_keep_the_full_tensor_alive(world):
    p = Parameter(place(torch.ones(1000), Shard(0), mesh_of(2)))
    optimizer = RAdam([p])
    state = {0: {"step": 3.0, "exp_avg": torch.ones(1000), "exp_avg_sq": torch.ones(1000)}}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    for key in MOMENTS:
        assert optimizer.state[p][key].to_local().untyped_storage().nbytes() == 2000


def partial(values: Tensor, mesh: DeviceMesh, op: str = "sum", ndim: int = 1) -> DTensor:
    """A gradient whose sum over the ranks of the last mesh dimension is pending."""
    placements = [*[Replicate()] * (ndim - 1), Partial(op)]
    return DTensor.from_local(values, mesh, placements, run_check=False)


@pytest.mark.distributed(2, 4)
@pytest.mark.parametrize("op", ["sum", "avg"])
@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_pending_sums_are_computed_in_one_collective(world, op, placement):
    mesh = mesh_of(world)
    twins = Twins(SHAPES, placement, mesh)
    twins.step()
    for i, (p, q) in enumerate(zip(twins.placed, twins.plain, strict=True)):
        parts = [randn(*q.shape, dtype=q.dtype, seed=10 * i + rank) for rank in range(world)]
        parts = [(8 * part).round() for part in parts]  # sums are exact
        q.grad = sum(parts) / (world if op == "avg" else 1)
        p.grad = partial(parts[dist.get_rank()], mesh, op)
    given = [p.grad.to_local().clone() for p in twins.placed]
    with CommDebugMode() as communication:
        twins.optimizers[0].step()
    assert communication.get_total_counts() == 1
    twins.optimizers[1].step()
    twins.assert_equal()
    for p, values in zip(twins.placed, given, strict=True):
        assert p.grad.placements == (Partial(op),)
        assert torch.equal(p.grad.to_local(), values)
        assert_same_everywhere(full(p.detach()))


@pytest.mark.distributed(4)
def test_pending_sums_of_several_meshes_dimensions_and_dtypes(world):
    line, square = mesh_of(4), init_device_mesh("cpu", (2, 2))
    rank = dist.get_rank()
    grads = [
        (partial(torch.full((3,), float(rank)), line), 6.0),
        (partial(torch.full((5,), float(rank)), line), 6.0),
        (partial(torch.full((5,), rank, dtype=torch.float64), line), 6.0),
        # The second dimension has ranks 0 and 1, and ranks 2 and 3.
        (partial(torch.full((4,), float(rank % 2)), square, ndim=2), 1.0),
        (DTensor.from_local(torch.full((4,), float(rank)), square, [Partial(), Partial()]), 6.0),
        (partial(torch.full((2,), float(rank)), line, "max"), 3.0),
    ]
    params = []
    for grad, _ in grads:
        everywhere = [Replicate()] * grad.device_mesh.ndim
        values = torch.zeros(grad.shape, dtype=grad.dtype)
        params.append(Parameter(DTensor.from_local(values, grad.device_mesh, everywhere)))
        params[-1].grad = grad
    optimizer = RAdam(params, betas=(0.0, 0.9), lr=1.0)
    with CommDebugMode() as communication:
        optimizer.step()
    # One for each mesh, set of dimensions and dtype; two for two dimensions; "max" on its own.
    assert communication.get_total_counts() == 6
    for p, (_, total) in zip(params, grads, strict=True):
        assert torch.equal(full(p.detach()), torch.full(p.shape, -total, dtype=p.dtype))


@pytest.mark.distributed(4)
def test_pending_sums_on_a_part_of_the_ranks(world):
    mesh = DeviceMesh("cpu", [0, 1])
    p = Parameter(DTensor.from_local(torch.zeros(3), mesh, [Replicate()], run_check=False))
    p.grad = partial(torch.ones(3), mesh)
    RAdam([p], betas=(0.0, 0.9), lr=1.0).step()
    if dist.get_rank() < 2:
        assert torch.equal(p.to_local(), torch.full((3,), -2.0))


@pytest.mark.distributed(2)
@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_a_step_communicates_nothing_else(world, placement):
    """So the ranks may step one after the other."""
    mesh = mesh_of(2)
    params = [Parameter(place(randn(*shape), placement, mesh)) for shape in SHAPES]
    optimizer = RAdam([{"params": params[:3]}, {"params": params[3:], "lr": 0.1}])
    for _ in range(3):  # makes the state, then finds it, then finds it loaded
        for p in params:
            p.grad = p.detach().clone()
        for rank in range(2):
            if rank == dist.get_rank():
                optimizer.step()
                optimizer.load_state_dict(optimizer.state_dict())
            dist.barrier()


@pytest.mark.distributed(2)
def test_a_dtensor_gradient_of_a_plain_parameter_is_refused(world):
    p = Parameter(torch.ones(4))
    optimizer = RAdam([p])
    p.grad = partial(torch.ones(4), mesh_of(2))
    with pytest.raises(ValueError, match="it is a DTensor and its parameter is a plain tensor"):
        optimizer.step()
    assert not optimizer.state
