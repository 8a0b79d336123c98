"""Distributed checkpoints (torch.distributed.checkpoint) of this optimizer and of torch's."""

import copy
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import Optimizer

from radam_kernels import RAdam
from tests.distributed.training import fully_shard
from tests.helpers import TorchRAdam, randn

CLASSES = {"ours": RAdam, "torch's": TorchRAdam}
PAIRS = [("torch's", "ours"), ("ours", "torch's"), ("ours", "ours")]
SAVED_AFTER, TRAINED = 6, 9  # steps; rectification begins at the sixth
by_pair = pytest.mark.parametrize(
    ("saver", "loader"), PAIRS, ids=[" to ".join(pair) for pair in PAIRS]
)
by_form = pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
by_groups = pytest.mark.parametrize("groups", [1, 2])


def make_model(seed: int, layout: str = "FSDP") -> nn.Module:
    """A model whose shards differ in size: of 3 rows, 4 ranks get 1, 1, 1 and 0."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    world = dist.get_world_size()
    if layout == "FSDP":
        mesh = init_device_mesh("cpu", (world,))
    else:
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("outer", "inner"))
    if layout == "FSDP x TP":
        parallelize_module(model, mesh["inner"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        mesh = mesh["outer"]
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh)
    return model


def make_optimizer(model: nn.Module, kind: str, groups: int = 1, **options) -> Optimizer:
    params = list(model.parameters())
    split = [{"params": params[:1], "lr": 0.02}, {"params": params[1:]}]
    return CLASSES[kind](params if groups == 1 else split, lr=0.1, weight_decay=0.1, **options)


def train(model: nn.Module, optimizer: Optimizer, begin: int, end: int) -> None:
    """Every rank has the same samples, so that any layout has the same gradients up to rounding."""
    for step in range(begin, end):
        optimizer.zero_grad()
        model(randn(8, 5, dtype=torch.float64, seed=step)).square().mean().backward()
        optimizer.step()


def full_parameters(model: nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor().detach() for p in model.parameters()]


def assert_close(model: nn.Module, expected: list[torch.Tensor], *, exact: bool = False) -> None:
    for p, value in zip(full_parameters(model), expected, strict=True):
        tolerance = 0.0 if exact else 1e-12
        torch.testing.assert_close(p, value, rtol=tolerance, atol=tolerance)


def get_state(model: nn.Module, optimizer: Optimizer, **options) -> dict:
    options = StateDictOptions(**options)
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def set_state(model: nn.Module, optimizer: Optimizer, state: dict, **options) -> None:
    options = StateDictOptions(**options)
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def save(folder: Path, kind: str, groups: int, flat: bool) -> None:
    """Saves in mid-training, and what the parameters are at its end."""
    model = make_model(seed=0)
    optimizer = make_optimizer(model, kind, groups)
    train(model, optimizer, 0, SAVED_AFTER)
    state = get_state(model, optimizer, flatten_optimizer_state_dict=flat)
    dcp.save(state, checkpoint_id=folder / "checkpoint")
    train(model, optimizer, SAVED_AFTER, TRAINED)
    parameters = full_parameters(model)
    if dist.get_rank() == 0:
        torch.save(parameters, folder / "trained")


def load(folder: Path, kind: str, groups: int, flat: bool, layout: str, exact: bool) -> None:
    """Loads into a new model of that layout, trains it to the end and compares."""
    model = make_model(seed=1, layout=layout)
    optimizer = make_optimizer(model, kind, groups)
    state = get_state(model, optimizer, flatten_optimizer_state_dict=flat)
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    set_state(model, optimizer, state, flatten_optimizer_state_dict=flat)
    train(model, optimizer, SAVED_AFTER, TRAINED)
    assert_close(model, torch.load(folder / "trained"), exact=exact)


@pytest.mark.distributed
@by_groups
@by_form
@by_pair
def test_saved_on_two_ranks_and_loaded_on_one_two_and_four(
    on_ranks, tmp_path, saver, loader, flat, groups
):
    common = dict(folder=tmp_path, groups=groups, flat=flat)
    on_ranks(2, save, kind=saver, **common)
    for world in (1, 2, 4):
        exact = saver == loader and world == 2
        on_ranks(world, load, kind=loader, layout="FSDP", exact=exact, **common)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["HSDP", "FSDP x TP"])
@pytest.mark.parametrize("saver", CLASSES)
def test_saved_under_fsdp_and_loaded_on_a_mesh_of_two_dimensions(on_ranks, tmp_path, saver, layout):
    common = dict(folder=tmp_path, groups=1, flat=False)
    on_ranks(2, save, kind=saver, **common)
    on_ranks(4, load, kind="ours", layout=layout, exact=False, **common)


@pytest.mark.distributed(2)
@pytest.mark.parametrize("broadcast", [False, True], ids=["", "broadcast_from_rank0"])
@by_groups
@by_pair
def test_full_state_dicts(world, saver, loader, groups, broadcast):
    model, other = make_model(0), make_model(1)
    optimizer, loaded = make_optimizer(model, saver, groups), make_optimizer(other, loader, groups)
    train(model, optimizer, 0, SAVED_AFTER)
    state = copy.deepcopy(get_state(model, optimizer, full_state_dict=True))
    if broadcast and dist.get_rank():
        state = {"model": {}, "optimizer": {}}
    set_state(other, loaded, state, full_state_dict=True, broadcast_from_rank0=broadcast)
    train(model, optimizer, SAVED_AFTER, TRAINED)
    train(other, loaded, SAVED_AFTER, TRAINED)
    assert_close(other, full_parameters(model), exact=saver == loader)


@pytest.mark.distributed(2)
def test_an_option_that_only_rank_0_gets_is_warned_of(world):
    model, other = make_model(0), make_model(1)
    optimizer, loaded = (
        make_optimizer(model, "ours", rho_threshold=4.0),
        make_optimizer(other, "ours"),
    )
    state = copy.deepcopy(get_state(model, optimizer, full_state_dict=True)["optimizer"])
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        set_optimizer_state_dict(other, loaded, {} if dist.get_rank() else state, options=options)
    words = "{'rho_threshold': 4.0} came from the checkpoint. Construct the optimizer with it"
    assert sum(words in str(warning.message) for warning in caught) == (dist.get_rank() == 0)


@pytest.mark.distributed(4)
@pytest.mark.parametrize("layout", ["FSDP", "HSDP", "FSDP x TP"])
def test_a_plain_checkpoint_loads_into_sharded_parameters(world, layout):
    """One of a single process, without torch.distributed.checkpoint."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = make_optimizer(plain, "torch's")
    train(plain, optimizer, 0, SAVED_AFTER)
    model = make_model(0, layout)
    loaded = make_optimizer(model, "ours")
    set_model_state_dict(model, plain.state_dict(), options=StateDictOptions(full_state_dict=True))
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(plain, optimizer, SAVED_AFTER, TRAINED)
    train(model, loaded, SAVED_AFTER, TRAINED)
    assert_close(model, [p.detach() for p in plain.parameters()])


@pytest.mark.distributed(2)
def test_training_goes_on_while_a_checkpoint_is_written(world, tmp_path):
    folder = tmp_path / "checkpoint"
    model, other = make_model(0), make_model(1)
    optimizer, loaded = make_optimizer(model, "ours"), make_optimizer(other, "ours")
    train(model, optimizer, 0, SAVED_AFTER)
    saved = dcp.async_save(
        get_state(model, optimizer), checkpoint_id=folder, process_group=dist.new_group()
    )
    train(model, optimizer, SAVED_AFTER, TRAINED)
    saved.result()
    state = get_state(other, loaded)
    dcp.load(state, checkpoint_id=folder)
    set_state(other, loaded, state)
    train(other, loaded, SAVED_AFTER, TRAINED)
    assert_close(other, full_parameters(model), exact=True)


@pytest.mark.distributed(2)
@by_form
def test_an_option_that_a_file_lacks_needs_a_partial_load(world, tmp_path, flat):
    """torch.distributed.checkpoint asks for every key of the optimizer that it loads into."""
    folder, form = tmp_path / "checkpoint", {"flatten_optimizer_state_dict": flat}
    model, other = make_model(0), make_model(1)
    optimizer = make_optimizer(model, "torch's")
    loaded = make_optimizer(other, "ours", rho_threshold=4.0)
    train(model, optimizer, 0, 3)
    dcp.save(get_state(model, optimizer, **form), checkpoint_id=folder)
    state = get_state(other, loaded, **form)
    with pytest.raises(dcp.api.CheckpointException, match="rho_threshold"):
        dcp.load(state, checkpoint_id=folder)
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(state, checkpoint_id=folder, planner=planner)
    set_state(other, loaded, state, **form)
    assert loaded.param_groups[0]["rho_threshold"] == 4.0
    assert all(loaded.state[p]["step"] == 3 for p in other.parameters())


@pytest.mark.distributed(2)
@by_form
def test_an_option_in_a_file_is_read_only_where_the_constructor_names_it(world, tmp_path, flat):
    folder, form = tmp_path / "checkpoint", {"flatten_optimizer_state_dict": flat}
    model = make_model(0)
    optimizer = make_optimizer(model, "ours", rho_threshold=4.0, state_dtype="float32")
    train(model, optimizer, 0, 3)
    dcp.save(get_state(model, optimizer, **form), checkpoint_id=folder)
    for options, expected in (({}, 5.0), ({"rho_threshold": 6.0}, 4.0)):
        other = make_model(1)
        loaded = make_optimizer(other, "ours", **options)
        state = get_state(other, loaded, **form)
        dcp.load(state, checkpoint_id=folder)
        set_state(other, loaded, state, **form)
        assert RAdam.hyperparameters(loaded.param_groups[0])["rho_threshold"] == expected


@pytest.mark.distributed(2)
@pytest.mark.parametrize("loader", CLASSES)
@by_form
def test_a_file_of_ours_with_all_options(world, tmp_path, flat, loader):
    """As this class wrote them before it left out what has its default."""
    folder, form = tmp_path / "checkpoint", {"flatten_optimizer_state_dict": flat}
    model, other = make_model(0), make_model(1)
    optimizer = make_optimizer(model, "ours")
    loaded = make_optimizer(other, loader)
    train(model, optimizer, 0, SAVED_AFTER)
    state = get_state(model, optimizer, **form)
    options = {**RAdam.hyperparameters(optimizer.param_groups[0]), "state_dtype": torch.float32}
    if flat:
        names = [name for name, _ in model.named_parameters()]
        options = {f"param_groups.{n}.{key}": v for n in names for key, v in options.items()}
        state["optimizer"] |= options
    else:
        state["optimizer"]["param_groups"][0] |= options
    dcp.save(state, checkpoint_id=folder)
    state = get_state(other, loaded, **form)
    dcp.load(state, checkpoint_id=folder)
    set_state(other, loaded, state, **form)
    train(model, optimizer, SAVED_AFTER, TRAINED)
    train(other, loaded, SAVED_AFTER, TRAINED)
    assert_close(other, full_parameters(model), exact=loader == "ours")


@pytest.mark.distributed(1)
def test_a_flattened_checkpoint_is_no_larger_than_torchs(world, tmp_path):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(150)))
    sizes = []
    for kind, cls in CLASSES.items():
        optimizer = cls(model.parameters())
        state = get_state(model, optimizer, flatten_optimizer_state_dict=True)
        dcp.save(state, checkpoint_id=tmp_path / kind)
        sizes.append(sum(file.stat().st_size for file in (tmp_path / kind).iterdir()))
    assert sizes[0] <= sizes[1]


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


@pytest.mark.distributed(1)
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize("by", ["set_optimizer_state_dict", "load_state_dict"])
def test_a_resume_needs_no_second_copy_of_the_moments(world, tmp_path, by):
    """Loading allocates the moments, and torch's set_optimizer_state_dict once gradients."""

    def make() -> tuple[nn.Module, Optimizer]:
        model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8)))
        for module in (*model, model):
            fully_shard(module)
        return model, RAdam(model.parameters())

    model, optimizer = make()
    parameters = 4 * sum(p.numel() for p in model.parameters())
    saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    if by == "load_state_dict":
        torch.save(optimizer.state_dict(), tmp_path / "checkpoint")
    else:
        dcp.save(saved, checkpoint_id=tmp_path / "checkpoint")
    del model, optimizer, saved
    model, optimizer = make()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = peak_bytes()
    if by == "load_state_dict":
        optimizer.load_state_dict(torch.load(tmp_path / "checkpoint"))
        gradients = 0
    else:
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=tmp_path / "checkpoint")
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        gradients = parameters
    optimizer.step()
    assert peak_bytes() - before < 2.4 * parameters + gradients
