"""Checkpoints go both ways between torch's RAdam and ours; copies, and loads that are refused."""

import copy
import pickle

import pytest
import torch
from torch.nn import Parameter

from radam_kernels import RAdam
from tests.helpers import (
    MOMENTS,
    TorchRAdam,
    assert_same,
    parameters,
    params_of,
    saved,
    take_steps,
    twin,
)

CHANGE_AT = (3, 5, 8)  # before, at and after the threshold of the default betas
OURS = dict(rho_threshold=4.0, rectification="exact", degenerated_to_sgd=False)


@pytest.mark.parametrize("at", CHANGE_AT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("way", ["torch to ours", "ours to torch"])
def test_checkpoints_go_both_ways_in_mid_training(way, dtype, at):
    first, then = (TorchRAdam, RAdam) if way == "torch to ours" else (RAdam, TorchRAdam)
    start = TorchRAdam(parameters(dtype), lr=0.1, weight_decay=0.1)
    uninterrupted = twin(start, TorchRAdam)
    a = twin(start, first)
    take_steps(a, at)
    b = twin(a, then)
    b.load_state_dict(saved(a.state_dict()))
    take_steps(b, 12 - at, first=at + 1)
    take_steps(uninterrupted, 12)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    assert_same(b, uninterrupted, rtol=tolerance, atol=tolerance)


def test_torchs_checkpoint_of_sixteen_bit_parameters_continues_in_float32():
    torchs = TorchRAdam(parameters(torch.bfloat16), lr=0.1)
    take_steps(torchs, 3)
    ours = twin(torchs)
    ours.load_state_dict(saved(torchs.state_dict()))
    for p, q in zip(params_of(ours), params_of(torchs), strict=True):
        for key in MOMENTS:
            assert ours.state[p][key].dtype == torch.float32
            assert torch.equal(ours.state[p][key], torchs.state[q][key].float())
    back = twin(ours, TorchRAdam)
    back.load_state_dict(saved(ours.state_dict()))
    assert_same(back, torchs)


@pytest.mark.parametrize("at", CHANGE_AT)
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.float32, None),
        (torch.float64, None),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.bfloat16, torch.bfloat16),
        (torch.complex64, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("by", ["state_dict", "torch.save", "pickle", "deepcopy"])
def test_our_own_round_trip_is_exact_to_the_bit(by, dtype, state_dtype, at):
    a = RAdam(parameters(dtype), lr=0.1, weight_decay=0.1, state_dtype=state_dtype, **OURS)
    take_steps(a, at)
    if by == "pickle":
        b = pickle.loads(pickle.dumps(a))
    elif by == "deepcopy":
        b = copy.deepcopy(a)
    else:
        b = twin(a)
        b.load_state_dict(
            saved(a.state_dict()) if by == "torch.save" else copy.deepcopy(a.state_dict())
        )
    assert_same(a, b)
    take_steps(a, 4, first=at + 1)
    take_steps(b, 4, first=at + 1)
    assert_same(a, b)


@pytest.mark.parametrize("by", ["pickle", "deepcopy"])
def test_a_rebuilt_optimizer_keeps_what_lives_outside_the_groups(by):
    options = {"backend": "reference", "flatten": True, "amp_scaling": False}
    a = RAdam([Parameter(torch.ones(5))], **options)
    take_steps(a)
    b = copy.deepcopy(a) if by == "deepcopy" else pickle.loads(pickle.dumps(a))
    assert {name: getattr(b, f"_{name}") for name in options} == options
    late = [Parameter(torch.ones(3)), Parameter(torch.ones(3))]
    b.add_param_group({"params": late})
    assert late[1].data_ptr() - late[0].data_ptr() == 256


def test_a_model_and_its_optimizer_copied_together_stay_together():
    model = torch.nn.Linear(3, 2)
    optimizer = RAdam(model.parameters())
    take_steps(optimizer, 2)
    other, others = copy.deepcopy((model, optimizer))
    before = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    take_steps(others)
    assert params_of(others)[0] is other.weight
    assert optimizer.state[model.weight]["step"] == 2
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], before)
    assert not torch.equal(other.weight, model.weight)


def test_an_optimizer_with_a_scheduler_can_be_copied():
    optimizer = RAdam([Parameter(torch.ones(3))])
    torch.optim.lr_scheduler.StepLR(optimizer, 2)
    take_steps(optimizer)
    other = copy.deepcopy(optimizer)
    take_steps(other)
    assert [o.state[params_of(o)[0]]["step"].item() for o in (optimizer, other)] == [1, 2]


@pytest.mark.parametrize("cls", [RAdam, TorchRAdam], ids=["ours", "torch's"])
def test_loading_uses_moments_that_fit_and_copies_step_counts(cls):
    a = cls([Parameter(torch.ones(5))])
    take_steps(a, 2)
    loaded = a.state_dict()
    b = twin(a)
    b.load_state_dict(loaded)
    own = b.state[params_of(b)[0]]
    assert all(own[key] is loaded["state"][0][key] for key in MOMENTS)
    take_steps(b, 3)
    assert loaded["state"][0]["step"] == 2
    assert own["step"] == 5


def test_the_state_before_a_load_can_be_loaded_again():
    a = RAdam([Parameter(torch.ones(5))])
    take_steps(a, 2)
    before = a.state_dict()
    kept = copy.deepcopy(before)
    b = twin(a)
    take_steps(b, 4)
    a.load_state_dict(b.state_dict())
    take_steps(a, 2)
    a.load_state_dict(before)
    for key in MOMENTS:
        assert torch.equal(a.state[params_of(a)[0]][key], kept["state"][0][key])


def test_loading_puts_moments_into_flat_buffers():
    a = TorchRAdam(parameters())
    take_steps(a, 2)
    b = RAdam(parameters(), flatten=True)
    b.load_state_dict(a.state_dict())
    for key in MOMENTS:
        moments = [b.state[p][key] for p in params_of(b) if p.numel()]
        assert moments[1].data_ptr() - moments[0].data_ptr() == -(-257 * 4 // 256) * 256
        for p, q in zip(params_of(b), params_of(a), strict=True):
            assert torch.equal(b.state[p][key], a.state[q][key])


@pytest.mark.parametrize(
    "old",
    [int, float, lambda t: t.reshape(1), lambda t: t.long()],
    ids=["int", "float", "(1,)", "int64"],
)
def test_old_checkpoints_where_the_step_is_something_else(old):
    a = RAdam([Parameter(torch.ones(5))], lr=0.1)
    take_steps(a, 4)
    b = twin(a)
    checkpoint = copy.deepcopy(a.state_dict())
    checkpoint["state"][0]["step"] = old(checkpoint["state"][0]["step"].clone())
    b.load_state_dict(checkpoint)
    take_steps(a, 4, first=5)
    take_steps(b, 4, first=5)
    p, q = params_of(a)[0], params_of(b)[0]
    assert torch.equal(p, q)
    assert b.state[q]["step"].dtype == torch.float32
    assert b.state[q]["step"].item() == 8


def test_an_old_pickle_where_the_step_is_a_number():
    a = RAdam([Parameter(torch.ones(5))], lr=0.1)
    take_steps(a, 4)
    a.state[params_of(a)[0]]["step"] = 4
    b = pickle.loads(pickle.dumps(a))
    take_steps(b, 1, first=5)
    assert b.state[params_of(b)[0]]["step"].item() == 5


def test_an_option_that_a_checkpoint_lacks_has_its_default_again():
    """Absent means the default, whoever wrote the file: ours lack what has its default, too."""
    torchs = TorchRAdam([Parameter(torch.ones(5))], lr=0.3, betas=(0.8, 0.99))
    take_steps(torchs, 2)
    ours = RAdam([Parameter(torch.ones(5))], **OURS)
    ours.load_state_dict(torchs.state_dict())
    group = ours.param_groups[0]
    assert (group["lr"], group["betas"]) == (0.3, (0.8, 0.99))  # the checkpoint's
    usual = RAdam.hyperparameters({})
    found = RAdam.hyperparameters(group)
    assert {key: found[key] for key in usual} == usual
    assert ours.state[params_of(ours)[0]]["exp_avg"].dtype == torch.float32
    take_steps(ours)


def test_an_old_checkpoint_of_ours_has_all_options():
    a = RAdam([Parameter(torch.ones(5))])
    take_steps(a, 2)
    checkpoint = a.state_dict()
    checkpoint["param_groups"][0] |= RAdam.hyperparameters(checkpoint["param_groups"][0])
    b = RAdam([Parameter(torch.ones(5))], **OURS)
    b.load_state_dict(saved(checkpoint))
    usual = RAdam.hyperparameters({})
    assert {key: b.param_groups[0][key] for key in OURS} == {key: usual[key] for key in OURS}


def test_a_checkpoint_with_our_keys_brings_them():
    a = RAdam([Parameter(torch.ones(5))], **OURS)
    take_steps(a, 2)
    b = RAdam([Parameter(torch.ones(5))])
    b.load_state_dict(saved(a.state_dict()))
    assert {key: b.param_groups[0][key] for key in OURS} == OURS


def test_an_optimizer_keeps_its_own_formats():
    """Whatever the checkpoint was made with, its moments are converted."""
    a = RAdam([Parameter(torch.ones(5))], state_dtype=torch.bfloat16)
    take_steps(a, 2)
    b = RAdam([Parameter(torch.ones(5))])
    b.load_state_dict(saved(a.state_dict()))
    assert "state_dtype" not in b.param_groups[0]
    of_b = b.state[params_of(b)[0]]["exp_avg"]
    assert torch.equal(of_b, a.state[params_of(a)[0]]["exp_avg"].float())
    a.load_state_dict(saved(b.state_dict()))
    assert a.param_groups[0]["state_dtype"] == "bfloat16"
    of_a = a.state[params_of(a)[0]]["exp_avg"]
    assert torch.equal(of_a, of_b.bfloat16())


def test_a_very_old_checkpoint_lacks_most_group_keys():
    a = TorchRAdam([Parameter(torch.ones(5))], lr=0.3)
    take_steps(a, 2)
    checkpoint = a.state_dict()
    for key in ("foreach", "maximize", "capturable", "differentiable", "decoupled_weight_decay"):
        del checkpoint["param_groups"][0][key]
    b = RAdam([Parameter(torch.ones(5))])
    b.load_state_dict(checkpoint)
    take_steps(b)
    assert b.param_groups[0]["decoupled_weight_decay"] is False


def test_a_checkpoint_made_to_be_differentiable_goes_on_without():
    a = RAdam([Parameter(torch.ones(5))])
    take_steps(a, 2)
    checkpoint = a.state_dict()
    checkpoint["param_groups"][0]["differentiable"] = True
    with pytest.warns(UserWarning, match="goes on with differentiable=False"):
        a.load_state_dict(checkpoint)
    assert a.param_groups[0]["differentiable"] is False
    take_steps(a)
    assert a.state[params_of(a)[0]]["step"] == 3


def test_a_state_dict_without_state_starts_from_zero():
    a = RAdam([Parameter(torch.ones(5))])
    checkpoint = copy.deepcopy(a.state_dict())
    take_steps(a, 3)
    a.load_state_dict(checkpoint)
    assert len(a.state) == 0
    take_steps(a)
    assert a.state[params_of(a)[0]]["step"] == 1


def test_states_of_some_parameters_only():
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(4))]
    a = RAdam(params)
    params[1].grad = torch.ones(4)
    a.step()
    b = twin(a)
    b.load_state_dict(saved(a.state_dict()))
    take_steps(b)
    assert [b.state[p]["step"].item() for p in params_of(b)] == [1, 2]


def test_named_parameters_are_saved_by_name():
    model = torch.nn.Linear(3, 2)
    optimizer = RAdam(model.named_parameters())
    take_steps(optimizer)
    checkpoint = saved(optimizer.state_dict())
    assert checkpoint["param_groups"][0]["param_names"] == ["weight", "bias"]
    other = RAdam(torch.nn.Linear(3, 2).named_parameters())
    other.load_state_dict(checkpoint)
    assert other.state[params_of(other)[0]]["step"] == 1


# Loads that fail, and copies


BAD_LOADS = {
    "a moment on meta": {"exp_avg": torch.zeros(5, device="meta")},
    "a sparse moment": {"exp_avg_sq": torch.zeros(5).to_sparse()},
    "a moment of another shape": {"exp_avg": torch.zeros(6)},
    "a moment of one element": {"exp_avg": torch.zeros(1)},
    "an integer moment": {"exp_avg": torch.zeros(5, dtype=torch.int64)},
    "no moment": {"exp_avg": None},
    "a step that no float holds": {"step": 10**400},
    "a step on meta": {"step": torch.tensor(1.0, device="meta")},
    "a step of two": {"step": torch.ones(2)},
    "a step of text": {"step": "3"},
}


@pytest.mark.parametrize("bad", BAD_LOADS)
@pytest.mark.parametrize("flatten", [False, True], ids=["", "flatten"])
def test_a_load_that_fails_changes_nothing(bad, flatten):
    optimizer = RAdam([Parameter(torch.ones(5)) for _ in range(3)], lr=0.1, flatten=flatten)
    take_steps(optimizer, 3)
    loaded = copy.deepcopy(optimizer.state_dict())
    loaded["state"][2].update(BAD_LOADS[bad])
    loaded["param_groups"][0]["lr"] = 0.7
    before, tensors = copy.deepcopy(optimizer.state_dict()), [*optimizer.state.values()]
    with pytest.raises(ValueError, match="param 2"):
        optimizer.load_state_dict(loaded)
    assert str(optimizer.state_dict()) == str(before)
    assert all(a is b for a, b in zip(optimizer.state.values(), tensors, strict=True))
    take_steps(optimizer)
    saved(optimizer.state_dict())


def test_a_load_for_which_memory_does_not_suffice_changes_nothing(monkeypatch):
    optimizer = RAdam([Parameter(torch.ones(5)) for _ in range(2)], lr=0.1)
    take_steps(optimizer, 3)
    loaded = copy.deepcopy(optimizer.state_dict())
    for state in loaded["state"].values():
        state["exp_avg"] = state["exp_avg"].double()  # needs another tensor
    before = copy.deepcopy(optimizer.state_dict())

    def fails(*args, **options):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros_like", fails)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.load_state_dict(loaded)
    assert str(optimizer.state_dict()) == str(before)
    take_steps(optimizer)


@pytest.mark.parametrize("by", ["deepcopy", "pickle"])
def test_copies_keep_a_state_that_does_not_fit_and_the_step_refuses_it(by):
    optimizer = RAdam([Parameter(torch.ones(7))])
    take_steps(optimizer)
    optimizer.state[params_of(optimizer)[0]]["exp_avg"] = torch.full((1,), 3.0)
    other = copy.deepcopy(optimizer) if by == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert torch.equal(other.state[params_of(other)[0]]["exp_avg"], torch.full((1,), 3.0))
    with pytest.raises(ValueError, match=r"exp_avg of param 0 .*\(7,\), got \(1,\)"):
        take_steps(other)


def _step_in_a_process(optimizer) -> None:
    take_steps(optimizer, 2, first=2)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_process_steps_the_state_that_it_shares(method, one_thread):
    optimizer = RAdam([Parameter(torch.ones(5).share_memory_())], lr=0.1)
    take_steps(optimizer)
    [param] = params_of(optimizer)
    param.grad = None
    for value in optimizer.state[param].values():
        value.share_memory_()
    process = torch.multiprocessing.get_context(method).Process(
        target=_step_in_a_process, args=(optimizer,)
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0
    alone = RAdam([Parameter(torch.ones(5))], lr=0.1)
    take_steps(alone, 3)
    assert_same(optimizer, alone)
