"""Master weights, stochastic rounding and 8-bit moments on several ranks."""

import copy
import inspect
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from radam_kernels import RAdam, layout
from radam_kernels.sharding import local, shard_of
from tests.distributed.test_checkpoints import by_form, get_state, set_state
from tests.distributed.test_ddp import DDP
from tests.distributed.test_exact import Exact
from tests.distributed.test_fsdp1 import FSDP1
from tests.distributed.test_fsdp2 import FSDP2, HSDP
from tests.distributed.test_tensor_parallel import TensorParallel
from tests.distributed.test_zero import ZeRO
from tests.distributed.training import Training, Wrapper, fully_shard, train
from tests.helpers import params_of, randn, same_bits

BF16 = torch.bfloat16
SR16 = dict(master_weights=32, state_dtype=BF16, stochastic_rounding=True)
BLOCK8 = dict(master_weights=24, state_dtype="block8")
SHARD_PROOF = [
    SR16,
    dict(master_weights=24),
    dict(stochastic_rounding=True),
    dict(stochastic_rounding=True, state_dtype=BF16),
]


@dataclass(frozen=True)
class Aligned(Exact):
    """Shards on 2 and 4 ranks begin at multiples of 128 elements."""

    def net(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(6, 512, bias=False).to(self.dtype)


@pytest.mark.distributed(2, 4)
@pytest.mark.parametrize("options", SHARD_PROOF, ids=str)
@pytest.mark.parametrize("cls", [DDP, FSDP2, HSDP])
def test_one_process_computes_the_same_bits(cls, options):
    how, wrapper = Exact(dtype=BF16, options={**options, "seed": 5}), cls()
    plain, alone = train(Wrapper(), RAdam, how)
    model, optimizer = train(wrapper, RAdam, how)
    for p, q in zip(wrapper.full(model), plain.parameters(), strict=True):
        assert same_bits(p, q)
    for mine, whole in zip(optimizer.master_params(), alone.master_params(), strict=True):
        mine = mine.full_tensor() if hasattr(mine, "full_tensor") else mine
        assert same_bits(mine, whole)


@pytest.mark.distributed(2, 4)
@pytest.mark.parametrize("cls", [DDP, FSDP2, HSDP])
def test_8_bits_are_the_same_where_shards_begin_at_blocks(cls):
    how, wrapper = (
        Aligned(dtype=BF16, options=BLOCK8),
        cls(**({} if cls is DDP else {"nested": False})),
    )
    plain, _ = train(Wrapper(), RAdam, how)
    model, _ = train(wrapper, RAdam, how)
    for p, q in zip(wrapper.full(model), plain.parameters(), strict=True):
        assert same_bits(p, q)


@pytest.mark.distributed(2)
@pytest.mark.parametrize("options", [*SHARD_PROOF, BLOCK8], ids=str)
@pytest.mark.parametrize("cls", [FSDP1, ZeRO, FSDP2])
def test_other_shards_train_as_well(cls, options):
    """Their random bits differ from those of one process, and the training hardly."""
    how, wrapper = Exact(dtype=BF16, options=options), cls()
    plain, _ = train(Wrapper(), RAdam, how)
    model, _ = train(wrapper, RAdam, how)
    for p, q in zip(wrapper.full(model), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=0.05, atol=0.05)


@pytest.mark.distributed(2)
def test_zero_saves_plain_tensors_and_goes_on_with_what_it_loads():
    how = Exact(dtype=BF16, options=BLOCK8)
    model, optimizer = train(ZeRO(), RAdam, how)
    optimizer.consolidate_state_dict(to=0)
    state = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(state)
    for own in state[0]["state"].values():
        assert own["exp_avg"].dtype == own["exp_avg_sq"].dtype == BF16
        assert not {"exp_avg_exponent", "exp_avg_sq_exponent"} & own.keys()
    loaded = ZeRO().optimizer(RAdam, model, how)
    loaded.load_state_dict(state[0])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    loaded.step()
    stepped = [own for own in loaded.optim.state.values() if own]
    assert stepped
    assert all(own["exp_avg"].dtype == torch.uint8 for own in stepped)


@pytest.mark.distributed(2)
def test_fsdp1_loads_masters_of_its_own_ranks_only():
    """Its `optim_state_dict_to_load` refuses integers."""
    model, optimizer = train(FSDP1(), RAdam, Exact(dtype=BF16, options=BLOCK8))
    loaded = RAdam(model.parameters(), **BLOCK8)
    whole = FullyShardedDataParallel.optim_state_dict(model, optimizer)
    with pytest.raises(ValueError, match="integer"):
        FullyShardedDataParallel.optim_state_dict_to_load(model, loaded, whole)
    for own in whole["state"].values():
        del own["param_remainder"]
    parts = FullyShardedDataParallel.optim_state_dict_to_load(model, loaded, whole)
    for state_dict in (parts, optimizer.state_dict()):
        loaded.load_state_dict(state_dict)
        for mine, theirs in zip(optimizer.state.values(), loaded.state.values(), strict=True):
            for key in layout.MOMENTS:
                assert same_bits(layout.decoded(mine, key), layout.decoded(theirs, key))
    for mine, theirs in zip(optimizer.master_params(), loaded.master_params(), strict=True):
        assert same_bits(mine, theirs)


def sharded_model(seed: int, rows: int = 37) -> nn.Module:
    """Its shards begin at any element."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, rows), nn.Linear(rows, 3)).bfloat16()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model, model):
        fully_shard(module, mesh=mesh)
    return model


def step(model: nn.Module, optimizer: RAdam, number: int) -> None:
    """With gradients that don't depend on the ranks."""
    for i, p in enumerate(params_of(optimizer)):
        whole = randn(*p.shape, seed=100 * number + i).to(BF16)
        p.grad = distribute_tensor(whole, p.device_mesh, p.placements)
    optimizer.step()


def whole_state(optimizer: RAdam) -> list[Tensor]:
    """Masters and moments, unsharded."""
    found = [master.full_tensor() for master in optimizer.master_params()]
    for own in optimizer.state_dict()["state"].values():
        found += [own[key].full_tensor() for key in layout.MOMENTS]
    return found


def save(folder: Path, options: dict, flat: bool) -> None:
    model = sharded_model(0)
    optimizer = RAdam(model.parameters(), lr=0.01, seed=9, **options)
    for number in range(7):
        step(model, optimizer, number)
    dcp.save(
        get_state(model, optimizer, flatten_optimizer_state_dict=flat),
        checkpoint_id=folder / "saved",
    )
    state = whole_state(optimizer)
    step(model, optimizer, 7)
    then = whole_state(optimizer)
    if dist.get_rank() == 0:
        torch.save((state, then), folder / "whole")


def load(folder: Path, options: dict, flat: bool, exact: bool) -> None:
    model = sharded_model(1)
    optimizer = RAdam(model.parameters(), lr=0.5, seed=0, **options)
    state = get_state(model, optimizer, flatten_optimizer_state_dict=flat)
    dcp.load(state, checkpoint_id=folder / "saved")
    set_state(model, optimizer, state, flatten_optimizer_state_dict=flat)
    assert optimizer.param_groups[0]["seed"] == 9
    whole, then = torch.load(folder / "whole")
    for got, want in zip(whole_state(optimizer), whole, strict=True):
        assert same_bits(got, want)
    step(model, optimizer, 7)
    for got, want in zip(whole_state(optimizer), then, strict=True):
        if exact:
            assert same_bits(got, want)
        else:
            torch.testing.assert_close(got, want, rtol=0.2, atol=0.02)


@pytest.mark.distributed
@by_form
@pytest.mark.parametrize("options", [SR16, BLOCK8], ids=str)
def test_saved_on_two_ranks_and_loaded_on_one_two_and_three(on_ranks, tmp_path, options, flat):
    """Values are kept at any boundary of shards; so is the next step, but for blocks that move."""
    common = dict(folder=tmp_path, options=options, flat=flat)
    on_ranks(2, save, **common)
    for world in (1, 2, 3):
        on_ranks(world, load, exact=options is SR16 or world == 2, **common)


@pytest.mark.distributed(2)
@pytest.mark.parametrize("broadcast", [False, True], ids=["", "broadcast_from_rank0"])
@pytest.mark.parametrize("options", [SR16, BLOCK8], ids=str)
def test_full_state_dicts(world, options, broadcast):
    """Which are gathered: gloo and NCCL can't send an int16."""
    model, other = sharded_model(0), sharded_model(1)
    optimizer = RAdam(model.parameters(), lr=0.01, **options)
    loaded = RAdam(other.parameters(), lr=0.01, **options)
    for number in range(7):
        step(model, optimizer, number)
    state = copy.deepcopy(get_state(model, optimizer, full_state_dict=True))
    if broadcast and dist.get_rank():
        state = {"model": {}, "optimizer": {}}
    set_state(other, loaded, state, full_state_dict=True, broadcast_from_rank0=broadcast)
    for number in (7, 8):
        step(model, optimizer, number)
        step(other, loaded, number)
    for got, want in zip(whole_state(loaded), whole_state(optimizer), strict=True):
        assert same_bits(got, want)


@pytest.mark.distributed(2)
def test_a_file_without_masters_needs_a_partial_load(world, tmp_path):
    model, other = sharded_model(0), sharded_model(1)
    optimizer = RAdam(model.parameters(), lr=0.01)
    for number in range(3):
        step(model, optimizer, number)
    dcp.save(get_state(model, optimizer), checkpoint_id=tmp_path / "saved")
    loaded = RAdam(other.parameters(), lr=0.01, **BLOCK8)
    state = get_state(other, loaded)
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(state, checkpoint_id=tmp_path / "saved", planner=planner)
    set_state(other, loaded, state)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        want = local(optimizer.state[p]["exp_avg"]).to(BF16)
        assert same_bits(local(loaded.state[q]["exp_avg"]), want)
    step(other, loaded, 3)
    assert all(local(own["exp_avg"]).dtype == torch.uint8 for own in loaded.state.values())


@pytest.mark.filterwarnings("error:radam_kernels.RAdam")
def test_a_load_does_not_warn_of_formats_that_groups_have(mesh_of):
    """They never come from a checkpoint."""
    mesh_of(2, rank=0)
    params = [nn.Parameter(torch.ones(4, dtype=BF16)) for _ in range(2)]
    groups = [{"params": params[:1], **BLOCK8}, {"params": params[1:]}]
    optimizer = RAdam(groups)
    optimizer.load_state_dict(RAdam([{"params": [p]} for p in params]).state_dict())
    assert optimizer.param_groups[0]["state_dtype"] == "block8"


@pytest.mark.distributed(4)
def test_other_placements_draw_alike_on_replicas_only(world):
    """Of a weight that is sharded by columns, the elements are counted in the shard."""
    mesh = init_device_mesh("cpu", (2, 2))
    whole = torch.ones(64, 64, dtype=BF16)
    p = nn.Parameter(distribute_tensor(whole, mesh, [Replicate(), Shard(1)]))
    optimizer = RAdam([p], lr=1e-3, stochastic_rounding=True)
    p.grad = distribute_tensor(torch.ones_like(whole), mesh, [Replicate(), Shard(1)])
    optimizer.step()
    mine = local(p.detach()).float().flatten()
    everyone = [torch.empty_like(mine) for _ in range(4)]
    dist.all_gather(everyone, mine)
    assert torch.equal(everyone[0], everyone[2])
    assert torch.equal(everyone[1], everyone[3])
    assert not torch.equal(everyone[0], everyone[1])


def distributed(whole: Tensor, mesh: DeviceMesh, placements: list) -> Tensor:
    """A DTensor of which this rank takes its part without the others."""
    if "src_data_rank" not in inspect.signature(distribute_tensor).parameters:  # before torch 2.7
        pytest.skip("distribute_tensor of this torch communicates")
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


@pytest.mark.parametrize("rank", range(6))
def test_the_first_index_of_a_shard(mesh_of, rank):
    mesh = mesh_of(2, 3, rank=rank)
    whole = torch.arange(7.0 * 5).view(7, 5)

    def shard(*placements) -> tuple[int, int]:
        return shard_of(distributed(whole, mesh, placements))

    row, column = divmod(rank, 3)
    assert shard(Replicate(), Replicate()) == (0, 0)
    assert shard(Replicate(), Shard(0)) == (5 * min(3 * column, 7), 0)
    assert shard(Shard(0), Replicate()) == (5 * 4 * row, 0)
    assert shard(Replicate(), Shard(1)) == (0, 1 + column)
    assert shard(Shard(1), Shard(0)) == (0, 1 + rank)
    both = distributed(whole, mesh, [Shard(0), Shard(0)])
    first, number = shard_of(both)
    assert number == 0
    if both.to_local().numel():
        assert first == both.to_local().flatten()[0]


@pytest.mark.parametrize("options", [SR16, BLOCK8], ids=str)
def test_a_step_of_fake_shards_makes_the_state_of_a_real_one(mesh_of, options):
    mesh = mesh_of(4, rank=3)

    def sizes() -> dict[str, tuple]:
        whole = torch.zeros(37, 9, dtype=BF16)
        p = nn.Parameter(distributed(whole, mesh, [Shard(0)]))
        p.grad = torch.zeros_like(p)
        optimizer = RAdam([p], **options)
        optimizer.step()
        return {key: (value.dtype, local(value).shape) for key, value in optimizer.state[p].items()}

    with FakeTensorMode():
        fake = sizes()
    assert fake == sizes()


@pytest.mark.distributed(2)
@pytest.mark.parametrize("options", [SR16, BLOCK8], ids=str)
def test_tensor_parallel_weights_train(options):
    how = Training(dtype=BF16, width=8, options=options)
    model, optimizer = train(TensorParallel(2), RAdam, how)
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(own["step"] == TensorParallel.steps for own in optimizer.state.values())


@pytest.mark.distributed(2)
@pytest.mark.parametrize("bits", [24, 32])
def test_masters_of_sharded_models_are_exported_and_imported(bits):
    model, other = sharded_model(0), sharded_model(1)
    optimizer = RAdam(model.parameters(), lr=0.1, master_weights=bits)
    for number in range(3):
        step(model, optimizer, number)
    exported = optimizer.master_state_dict(model)
    assert all(value.dtype == torch.float32 for value in exported.values())
    imported = RAdam(other.parameters(), lr=0.1, master_weights=bits)
    imported.load_master_state_dict(other, exported)
    for a, b in zip(optimizer.master_params(), imported.master_params(), strict=True):
        assert same_bits(a.full_tensor(), b.full_tensor())
