"""State is torch's: it travels in checkpoints both ways, and whatever people edit is picked up."""

import copy
import gc
import io
import os
import pickle
import sys
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from radam_kernels import RAdam, radam_

TorchRAdam = torch.optim.RAdam
MOMENTS = ("exp_avg", "exp_avg_sq")
CHANGE_AT = (3, 5, 8)  # before, at and after the threshold of the default betas
OURS = dict(rho_threshold=4.0, rectification="exact", degenerated_to_sgd=False)


def randn(*shape, dtype=torch.float32, seed=0) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def parameters(dtype=torch.float32) -> list[Parameter]:
    shapes = [(257,), (4, 5), (), (0,), (3, 8)]
    params = [Parameter(randn(*shape, dtype=dtype, seed=i)) for i, shape in enumerate(shapes)]
    params[-1].data = params[-1].data.t()
    return params


def step(optimizer, count=1, first=1):
    """Steps with gradients that depend on the number of the step, `first` and those after it."""
    for number in range(first, first + count):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, p in enumerate(params):
            p.grad = randn(*p.shape, dtype=p.dtype, seed=1000 * number + i)
        optimizer.step()


def save(state_dict, weights_only=True):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def twin(optimizer, cls=RAdam, **options):
    """A new optimizer on copies of the parameters, with no state."""
    groups = [
        {**group, "params": [Parameter(p.detach().clone()) for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    if cls is TorchRAdam:
        for group in groups:
            for key in set(group) - set(TorchRAdam([Parameter(torch.ones(1))]).param_groups[0]):
                del group[key]
    return cls(groups, **options)


def params_of(optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_same(a, b, **tolerance):
    """Parameters and states of two optimizers are equal: to the bit if no tolerances are given."""
    exact = not tolerance
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for i, (p, q) in enumerate(zip(params_of(a), params_of(b), strict=True)):
        torch.testing.assert_close(p, q, **tolerance, msg=lambda m, i=i: f"param {i}: {m}")
        assert list(a.state.get(p, ())) == list(b.state.get(q, ()))
        for key in a.state.get(p, ()):
            torch.testing.assert_close(
                a.state[p][key],
                b.state[q][key],
                **tolerance,
                check_stride=exact and key != "step",
                msg=lambda m, i=i, key=key: f"{key} of param {i}: {m}",
            )


# What the state is.


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.complex64, None, torch.complex64),
        (torch.complex128, None, torch.complex128),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.bfloat16, torch.float64),
    ],
    ids=str,
)
def test_keys_and_dtypes_are_torchs_but_for_sixteen_bits(dtype, state_dtype, expected):
    p = Parameter(torch.ones(3, 4, dtype=dtype).t())
    p.grad = torch.ones_like(p)
    optimizer = RAdam([p], state_dtype=state_dtype)
    optimizer.step()
    state = optimizer.state[p]
    assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
    assert (state["step"].dtype, state["step"].shape) == (torch.float32, ())
    for key in MOMENTS:
        assert state[key].dtype == expected
        assert (state[key].shape, state[key].stride()) == (p.shape, p.stride())


def test_there_is_no_state_before_the_first_step():
    assert len(RAdam(parameters()).state) == 0


def test_moments_are_ordinary_tensors_that_can_be_freed_one_by_one():
    optimizer = RAdam(parameters())
    step(optimizer)
    moments = [s[key] for s in optimizer.state.values() for key in MOMENTS]
    for moment in moments:
        storage = moment.untyped_storage()
        assert storage.nbytes() == moment.nbytes
        assert storage.resizable()
        assert moment._base is None
    moments[0].untyped_storage().resize_(0)


@pytest.mark.parametrize("key", MOMENTS)
def test_flatten_puts_moments_into_one_buffer_too(key):
    params = [Parameter(torch.ones(n)) for n in (5, 64, 65, 3)]
    wide = [Parameter(torch.ones(n, dtype=torch.float64)) for n in (100, 7)]
    optimizer = RAdam([*params, *wide], flatten=True)
    params[1].grad = torch.ones(64)
    optimizer.step()  # the others get no gradient yet
    step(optimizer)
    for kind in (params, wide):
        moments = [optimizer.state[p][key] for p in kind]
        assert len({m.untyped_storage().data_ptr() for m in moments}) == 1
        gaps = [b.data_ptr() - a.data_ptr() for a, b in pairwise(moments)]
        assert gaps == [-(-p.nbytes // 256) * 256 for p in kind[:-1]]
        assert all(m.data_ptr() % 256 == 0 for m in moments)
        assert len({p.untyped_storage().data_ptr() for p in kind}) == 1


def test_a_moment_owns_only_its_own_memory():
    """So that saving one parameter's state does not save them all."""
    optimizer = RAdam([Parameter(torch.ones(1000)) for _ in range(50)])
    step(optimizer)
    state = optimizer.state[params_of(optimizer)[0]]
    assert all(state[key].untyped_storage().nbytes() == 4000 for key in MOMENTS)
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() < 8000 + 4000


@pytest.mark.parametrize("what", ["optimizer", "state_dict", "deepcopy"])
@pytest.mark.parametrize("flatten", [False, True], ids=["", "flatten"])
def test_files_are_no_larger_than_what_they_hold(what, flatten):
    optimizer = RAdam([Parameter(torch.ones(100)) for _ in range(100)], flatten=flatten)
    step(optimizer)
    optimizer.zero_grad()
    value = {
        "optimizer": optimizer,
        "state_dict": optimizer.state_dict(),
        "deepcopy": copy.deepcopy(optimizer),
    }[what]
    limit = 100 * (3 * 512 + 1500)
    file = io.BytesIO()
    torch.save(value, file)
    assert file.tell() < limit
    if not flatten:  # pickle, unlike torch.save, writes a buffer once for each of its parts
        assert len(pickle.dumps(value)) < limit


def test_parameters_that_never_get_a_gradient_cost_nothing():
    frozen, trained = Parameter(torch.ones(10**6)), Parameter(torch.ones(10))
    optimizer = RAdam([frozen, trained])
    for _ in range(3):
        trained.grad = torch.ones(10)
        optimizer.step()
    assert list(optimizer.state) == [trained]


def test_later_arrivals_leave_the_moments_of_others_where_they_are():
    early, late = Parameter(randn(50)), Parameter(randn(50))
    optimizer = RAdam([early, late])
    early.grad = torch.ones(50)
    optimizer.step()
    addresses = [optimizer.state[early][key].data_ptr() for key in MOMENTS]
    step(optimizer)
    assert [optimizer.state[early][key].data_ptr() for key in MOMENTS] == addresses
    assert optimizer.state[early]["step"] == 2
    assert optimizer.state[late]["step"] == 1


def test_moments_stay_where_they_are_from_step_to_step():
    optimizer = RAdam(parameters())
    step(optimizer)
    before = [optimizer.state[p][key].data_ptr() for p in params_of(optimizer) for key in MOMENTS]
    step(optimizer, 8)
    after = [optimizer.state[p][key].data_ptr() for p in params_of(optimizer) for key in MOMENTS]
    assert before == after


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_step_counts_have_torchs_dtype(default):
    torch.set_default_dtype(default)
    try:
        p = Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        ours, torchs = RAdam([p]), TorchRAdam([p])
        for _ in range(7):
            ours.step()
            torchs.step()
        assert ours.state[p]["step"].dtype == torchs.state[p]["step"].dtype
        assert ours.state[p]["step"] == 7
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["new", "a number"])
def test_step_counts_are_on_the_cpu_whatever_the_default_device(kind):
    optimizer = RAdam([Parameter(torch.ones(2))])
    p = params_of(optimizer)[0]
    p.grad = torch.ones(2)
    with torch.device("meta"):
        optimizer.step()
        if kind == "a number":
            optimizer.state[p]["step"] = 1
        optimizer.step()
    assert optimizer.state[p]["step"].device.type == "cpu"
    assert optimizer.state[p]["step"] == 2


def test_a_float32_count_stops_at_2_to_the_24_as_torchs_does():
    optimizer = RAdam([Parameter(torch.ones(1))])
    step(optimizer)
    count = optimizer.state[params_of(optimizer)[0]]["step"]
    count.fill_(2**24 - 1)
    step(optimizer, 3)
    assert count == 2**24


def test_a_float32_count_that_has_stopped_is_what_the_step_computes_with():
    betas = (1 - 1e-9, 0.999)  # so that the bias correction still tells 2**24 from the next
    p = Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = RAdam([p], lr=0.1, betas=betas)
    step(optimizer)
    optimizer.state[p]["step"].fill_(2**24)
    by_hand = [
        [x.detach().clone() for x in (p, p.grad, *(optimizer.state[p][key] for key in MOMENTS))]
        for _ in range(2)
    ]
    optimizer.step()
    for tensors, count in zip(by_hand, (2**24, 2**24 + 1), strict=True):
        radam_(*tensors, step=count, lr=0.1, beta1=betas[0], beta2=betas[1], eps=1e-8)
    assert torch.equal(p, by_hand[0][0])
    assert not torch.equal(p, by_hand[1][0])


# Memory.


def test_gradients_are_not_kept_alive():
    optimizer = RAdam(parameters())
    step(optimizer, 2)
    grads = [weakref.ref(p.grad) for p in params_of(optimizer)]
    optimizer.zero_grad(set_to_none=True)
    assert all(grad() is None for grad in grads)


def test_gradients_are_not_kept_alive_by_a_refused_step():
    p = Parameter(torch.ones(3))
    optimizer = RAdam([p])
    p.grad = torch.ones(3)
    optimizer.param_groups[0]["betas"] = (1.0, 0.9)
    with pytest.raises(ValueError, match="beta1"):
        optimizer.step()
    grad = weakref.ref(p.grad)
    p.grad = None
    assert grad() is None


@pytest.mark.parametrize("how", ["state.clear()", "optimizer dropped", "state replaced"])
def test_moments_are_freed(how):
    optimizer = RAdam([Parameter(torch.ones(10))])
    step(optimizer, 2)
    state = optimizer.state[params_of(optimizer)[0]]
    moments = [weakref.ref(state[key]) for key in MOMENTS]
    del state
    if how == "state.clear()":
        optimizer.state.clear()
    elif how == "state replaced":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        del optimizer
        gc.collect()
    assert all(moment() is None for moment in moments)


def test_a_step_leaves_no_reference_behind():
    optimizer = RAdam([{"params": parameters()}, {"params": parameters(torch.float64)}])
    step(optimizer, 2)
    held = [optimizer.param_groups, optimizer.state]
    for group in optimizer.param_groups:
        held += [group, group["params"], group["betas"]]
        for p in group["params"]:
            held += [p, p.grad, optimizer.state[p], *optimizer.state[p].values()]
    before = [sys.getrefcount(x) for x in held]
    for _ in range(10):
        optimizer.step()
    assert [sys.getrefcount(x) for x in held] == before


def test_steps_that_need_python_leave_no_reference_behind():
    optimizer = RAdam([Parameter(randn(8)[::2]), Parameter(randn(3, dtype=torch.complex64))])
    step(optimizer, 2)
    params = params_of(optimizer)

    def references():
        gc.collect()
        tensors = [x for p in params for x in (p, p.grad, *optimizer.state[p].values())]
        return [sys.getrefcount(x) for x in tensors], len(gc.get_objects())

    references()  # what caches it fills is there from here on
    before, objects = references()
    for _ in range(50):
        optimizer.step()
    after, more = references()
    assert after == before
    assert more - objects < 50


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")
def test_dropping_the_state_of_some_parameters_frees_their_memory():
    size = 2**25  # bytes of each moment: large enough for the allocator to hand it back
    params = [Parameter(torch.ones(size // 4)) for _ in range(4)]
    optimizer = RAdam(params)
    step(optimizer)
    optimizer.zero_grad()
    before = resident()
    for p in params[1:]:
        del optimizer.state[p]
    assert before - resident() > 0.9 * 3 * 2 * size


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")
def test_loading_needs_no_second_copy_of_the_moments():
    size = 2**26
    source = TorchRAdam([Parameter(torch.ones(size // 4))])
    step(source)
    loaded = copy.deepcopy(source.state_dict())
    optimizer = RAdam([Parameter(torch.ones(size // 4))])
    before = resident()
    optimizer.load_state_dict(loaded)
    assert resident() - before < 0.1 * size


def test_a_parameter_can_die():
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = RAdam([p, q])
    step(optimizer, 2)
    optimizer.param_groups[0]["params"].pop()
    del optimizer.state[q]
    gone = weakref.ref(q)
    del q
    gc.collect()
    assert gone() is None
    step(optimizer)
    assert optimizer.state[p]["step"] == 3


# Checkpoints.


@pytest.mark.parametrize("at", CHANGE_AT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("way", ["torch to ours", "ours to torch"])
def test_checkpoints_go_both_ways_in_mid_training(way, dtype, at):
    first, then = (TorchRAdam, RAdam) if way == "torch to ours" else (RAdam, TorchRAdam)
    start = TorchRAdam(parameters(dtype), lr=0.1, weight_decay=0.1)
    uninterrupted = twin(start, TorchRAdam)
    a = twin(start, first)
    step(a, at)
    b = twin(a, then)
    b.load_state_dict(save(a.state_dict()))
    step(b, 12 - at, first=at + 1)
    step(uninterrupted, 12)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    assert_same(b, uninterrupted, rtol=tolerance, atol=tolerance)


def test_torchs_checkpoint_of_sixteen_bit_parameters_continues_in_float32():
    torchs = TorchRAdam(parameters(torch.bfloat16), lr=0.1)
    step(torchs, 3)
    ours = twin(torchs)
    ours.load_state_dict(save(torchs.state_dict()))
    for p, q in zip(params_of(ours), params_of(torchs), strict=True):
        for key in MOMENTS:
            assert ours.state[p][key].dtype == torch.float32
            assert torch.equal(ours.state[p][key], torchs.state[q][key].float())
    back = twin(ours, TorchRAdam)
    back.load_state_dict(save(ours.state_dict()))
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
    step(a, at)
    if by == "pickle":
        b = pickle.loads(pickle.dumps(a))
    elif by == "deepcopy":
        b = copy.deepcopy(a)
    else:
        b = twin(a)
        b.load_state_dict(
            save(a.state_dict()) if by == "torch.save" else copy.deepcopy(a.state_dict())
        )
    assert_same(a, b)
    step(a, 4, first=at + 1)
    step(b, 4, first=at + 1)
    assert_same(a, b)


@pytest.mark.parametrize("by", ["pickle", "deepcopy"])
def test_a_rebuilt_optimizer_keeps_what_lives_outside_the_groups(by):
    a = RAdam([Parameter(torch.ones(5))], backend="reference", flatten=True)
    step(a)
    b = copy.deepcopy(a) if by == "deepcopy" else pickle.loads(pickle.dumps(a))
    assert (b._backend, b._flatten) == ("reference", True)
    late = [Parameter(torch.ones(3)), Parameter(torch.ones(3))]
    b.add_param_group({"params": late})
    assert late[1].data_ptr() - late[0].data_ptr() == 256


def test_a_model_and_its_optimizer_copied_together_stay_together():
    model = torch.nn.Linear(3, 2)
    optimizer = RAdam(model.parameters())
    step(optimizer, 2)
    other, others = copy.deepcopy((model, optimizer))
    before = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    step(others)
    assert params_of(others)[0] is other.weight
    assert optimizer.state[model.weight]["step"] == 2
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], before)
    assert not torch.equal(other.weight, model.weight)


def test_an_optimizer_with_a_scheduler_can_be_copied():
    optimizer = RAdam([Parameter(torch.ones(3))])
    torch.optim.lr_scheduler.StepLR(optimizer, 2)
    step(optimizer)
    other = copy.deepcopy(optimizer)
    step(other)
    assert [o.state[params_of(o)[0]]["step"].item() for o in (optimizer, other)] == [1, 2]


@pytest.mark.parametrize("cls", [RAdam, TorchRAdam], ids=["ours", "torch's"])
def test_loading_uses_moments_that_fit_and_copies_step_counts(cls):
    a = cls([Parameter(torch.ones(5))])
    step(a, 2)
    loaded = a.state_dict()
    b = twin(a)
    b.load_state_dict(loaded)
    own = b.state[params_of(b)[0]]
    assert all(own[key] is loaded["state"][0][key] for key in MOMENTS)
    step(b, 3)
    assert loaded["state"][0]["step"] == 2
    assert own["step"] == 5


def test_the_state_before_a_load_can_be_loaded_again():
    a = RAdam([Parameter(torch.ones(5))])
    step(a, 2)
    before = a.state_dict()
    kept = copy.deepcopy(before)
    b = twin(a)
    step(b, 4)
    a.load_state_dict(b.state_dict())
    step(a, 2)
    a.load_state_dict(before)
    for key in MOMENTS:
        assert torch.equal(a.state[params_of(a)[0]][key], kept["state"][0][key])


def test_loading_puts_moments_into_flat_buffers():
    a = TorchRAdam(parameters())
    step(a, 2)
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
    step(a, 4)
    b = twin(a)
    checkpoint = copy.deepcopy(a.state_dict())
    checkpoint["state"][0]["step"] = old(checkpoint["state"][0]["step"].clone())
    b.load_state_dict(checkpoint)
    step(a, 4, first=5)
    step(b, 4, first=5)
    p, q = params_of(a)[0], params_of(b)[0]
    assert torch.equal(p, q)
    assert b.state[q]["step"].dtype == torch.float32
    assert b.state[q]["step"].item() == 8


def test_an_old_pickle_where_the_step_is_a_number():
    a = RAdam([Parameter(torch.ones(5))], lr=0.1)
    step(a, 4)
    a.state[params_of(a)[0]]["step"] = 4
    b = pickle.loads(pickle.dumps(a))
    step(b, 1, first=5)
    assert b.state[params_of(b)[0]]["step"].item() == 5


def test_a_checkpoint_without_our_keys_gets_this_optimizers_own():
    torchs = TorchRAdam([Parameter(torch.ones(5))], lr=0.3, betas=(0.8, 0.99))
    step(torchs, 2)
    ours = RAdam([Parameter(torch.ones(5))], state_dtype=torch.bfloat16, **OURS)
    ours.load_state_dict(torchs.state_dict())
    group = ours.param_groups[0]
    assert (group["lr"], group["betas"]) == (0.3, (0.8, 0.99))  # the checkpoint's
    assert {key: group[key] for key in OURS} == OURS
    assert group["state_dtype"] == torch.bfloat16
    assert ours.state[params_of(ours)[0]]["exp_avg"].dtype == torch.bfloat16


def test_a_checkpoint_with_our_keys_brings_them():
    a = RAdam([Parameter(torch.ones(5))], state_dtype=torch.bfloat16, **OURS)
    step(a, 2)
    b = RAdam([Parameter(torch.ones(5))])
    b.load_state_dict(save(a.state_dict()))
    assert {key: b.param_groups[0][key] for key in OURS} == OURS
    assert b.state[params_of(b)[0]]["exp_avg"].dtype == torch.bfloat16


def test_a_very_old_checkpoint_lacks_most_group_keys():
    a = TorchRAdam([Parameter(torch.ones(5))], lr=0.3)
    step(a, 2)
    checkpoint = a.state_dict()
    for key in ("foreach", "maximize", "capturable", "differentiable", "decoupled_weight_decay"):
        del checkpoint["param_groups"][0][key]
    b = RAdam([Parameter(torch.ones(5))])
    b.load_state_dict(checkpoint)
    step(b)
    assert b.param_groups[0]["decoupled_weight_decay"] is False


def test_a_checkpoint_made_to_be_differentiable_goes_on_without():
    a = RAdam([Parameter(torch.ones(5))])
    step(a, 2)
    checkpoint = a.state_dict()
    checkpoint["param_groups"][0]["differentiable"] = True
    with pytest.warns(UserWarning, match="goes on with differentiable=False"):
        a.load_state_dict(checkpoint)
    assert a.param_groups[0]["differentiable"] is False
    step(a)
    assert a.state[params_of(a)[0]]["step"] == 3


def test_a_state_dict_without_state_begins_anew():
    a = RAdam([Parameter(torch.ones(5))])
    checkpoint = copy.deepcopy(a.state_dict())
    step(a, 3)
    a.load_state_dict(checkpoint)
    assert len(a.state) == 0
    step(a)
    assert a.state[params_of(a)[0]]["step"] == 1


def test_states_of_some_parameters_only():
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(4))]
    a = RAdam(params)
    params[1].grad = torch.ones(4)
    a.step()
    b = twin(a)
    b.load_state_dict(save(a.state_dict()))
    step(b)
    assert [b.state[p]["step"].item() for p in params_of(b)] == [1, 2]


def test_named_parameters_are_saved_by_name():
    model = torch.nn.Linear(3, 2)
    optimizer = RAdam(model.named_parameters())
    step(optimizer)
    checkpoint = save(optimizer.state_dict())
    assert checkpoint["param_groups"][0]["param_names"] == ["weight", "bias"]
    other = RAdam(torch.nn.Linear(3, 2).named_parameters())
    other.load_state_dict(checkpoint)
    assert other.state[params_of(other)[0]]["step"] == 1


# Hooks.


def test_step_hooks_run_before_and_after():
    seen = []
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = RAdam([p], lr=0.5)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", p[0].item())))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", p[0].item())))
    optimizer.step()
    assert seen == [("pre", 1.0), ("post", 0.5)]


def test_global_step_hooks_run():
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append("pre")),
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append("post")),
    ]
    try:
        step(RAdam([Parameter(torch.ones(3))]))
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["pre", "post"]


def test_a_step_hook_may_edit_the_gradient():
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = RAdam([p], lr=0.5)

    def negate(optimizer, args, kwargs):
        p.grad = -p.grad

    optimizer.register_step_pre_hook(negate)
    optimizer.step()
    assert (p == 1.5).all()


def test_state_dict_and_load_hooks_run():
    seen = []
    a = RAdam([Parameter(torch.ones(3))])
    step(a)
    a.register_state_dict_pre_hook(lambda o: seen.append("save"))
    a.register_state_dict_post_hook(lambda o, d: {**d, "mine": 1})
    checkpoint = a.state_dict()
    assert checkpoint.pop("mine") == 1

    def rename(optimizer, state_dict):
        seen.append("load")
        state = {k: {**s, "exp_avg": 2 * s["exp_avg"]} for k, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    b = twin(a)
    b.register_load_state_dict_pre_hook(rename)
    b.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    for _ in range(2):
        b.load_state_dict(checkpoint)
    assert seen == ["save", "load", "loaded", "load", "loaded"]
    p, q = params_of(a)[0], params_of(b)[0]
    assert torch.equal(b.state[q]["exp_avg"], 2 * a.state[p]["exp_avg"])


# Edits between steps: each must have the effect that it has on torch's class.


def assert_edit_is_picked_up(edit, *, dtype=torch.float32, ours=None):
    """`edit(optimizer, params)` in mid-training: ours and torch's then go on alike."""
    a = RAdam(parameters(dtype), lr=0.1, **(ours or {}))
    assert_goes_on_alike(a, edit)
    return a


def assert_goes_on_alike(a, edit):
    b = twin(a, TorchRAdam, foreach=False)
    for optimizer in (a, b):
        step(optimizer, 4)
        edit(optimizer, params_of(optimizer))
        step(optimizer, 6, first=5)
    assert_same(a, b, rtol=1e-5, atol=2e-6)


def set_exp_avg(optimizer, params):
    optimizer.state[params[0]]["exp_avg"] = torch.full_like(params[0], 0.5)


def fill_exp_avg_sq(optimizer, params):
    optimizer.state[params[1]]["exp_avg_sq"].fill_(4.0)


def delete_one(optimizer, params):
    del optimizer.state[params[1]]


def delete_and_copy(optimizer, params):
    optimizer.state[params[1]] = dict(optimizer.state.pop(params[1]))


def clear(optimizer, params):
    optimizer.state.clear()


def empty_one(optimizer, params):
    optimizer.state[params[0]] = {}


def fill_step(optimizer, params):
    optimizer.state[params[0]]["step"].fill_(2)


def zero_step(optimizer, params):
    optimizer.state[params[0]]["step"].zero_()


def replace_step(optimizer, params):
    optimizer.state[params[0]]["step"] = torch.tensor(100.0)


def replace_step_twice(optimizer, params):
    optimizer.state[params[0]]["step"] = torch.tensor(100.0)
    step(optimizer, first=77)
    optimizer.state[params[0]]["step"] = torch.tensor(3.0)


def double_step(optimizer, params):
    state = optimizer.state[params[0]]
    state["step"] = state["step"].double()


def to_other_memory(optimizer, params):
    """The `optimizer_to` snippet that is passed around, as it goes when the device changes."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.data = value.data.clone()


def new_dicts(optimizer, params):
    for p in params:
        optimizer.state[p] = {k: v.clone() for k, v in optimizer.state[p].items()}


def reverse_keys(optimizer, params):
    for p in params:
        optimizer.state[p] = dict(reversed(optimizer.state[p].items()))


def swap_states(optimizer, params):
    a, b = Parameter(torch.ones(20)), Parameter(torch.ones(20))
    optimizer.add_param_group({"params": [a, b], "lr": 0.1})
    step(optimizer, 2, first=50)
    optimizer.state[a], optimizer.state[b] = optimizer.state[b], optimizer.state[a]


def add_a_key(optimizer, params):
    optimizer.state[params[0]]["mine"] = torch.tensor(1.0)


def other_layout(optimizer, params):
    for key in MOMENTS:
        state = optimizer.state[params[1]]
        state[key] = state[key].t().contiguous().t()


def swap_parameter(optimizer, params):
    new = Parameter(randn(11, seed=42))
    del optimizer.state[params[1]]
    optimizer.param_groups[0]["params"][1] = new


def reorder_parameters(optimizer, params):
    optimizer.param_groups[0]["params"].reverse()


def freeze_for_a_while(optimizer, params):
    for p in params:
        p.grad = None
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()


def point_data_elsewhere(optimizer, params):
    params[0].data = params[0].data.clone().mul_(2)


def change_data_in_place(optimizer, params):
    params[0].data.mul_(2)


def share_memory(optimizer, params):
    """As in Hogwild training."""
    for state in optimizer.state.values():
        for value in state.values():
            value.share_memory_()


def share_memory_of_steps(optimizer, params):
    for state in optimizer.state.values():
        state["step"].share_memory_()


def point_steps_elsewhere(optimizer, params):
    for state in optimizer.state.values():
        state["step"].data = state["step"].data.clone()


EDITS = [
    set_exp_avg,
    fill_exp_avg_sq,
    delete_one,
    delete_and_copy,
    clear,
    empty_one,
    fill_step,
    zero_step,
    replace_step,
    replace_step_twice,
    double_step,
    to_other_memory,
    new_dicts,
    swap_states,
    add_a_key,
    other_layout,
    swap_parameter,
    reorder_parameters,
    freeze_for_a_while,
    point_data_elsewhere,
    change_data_in_place,
    share_memory,
    share_memory_of_steps,
    point_steps_elsewhere,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda f: f.__name__)
def test_edits_between_steps_are_picked_up(edit):
    assert_edit_is_picked_up(edit)


def remove_the_first(optimizer, params):
    optimizer.param_groups[0]["params"].pop(0)


def move_to_another_group(optimizer, params):
    groups = optimizer.param_groups
    groups[1]["params"].append(groups[0]["params"].pop(1))


def rotate_states(optimizer, params):
    states = [optimizer.state[p] for p in params]
    for p, state in zip(params, states[1:] + states[:1], strict=True):
        optimizer.state[p] = state


def take_the_first_state(optimizer, params):
    optimizer.mine = optimizer.state.pop(params[0])


def take_the_last_state(optimizer, params):
    optimizer.mine = optimizer.state.pop(params[-1])


def put_another_state(optimizer, params):
    optimizer.mine = optimizer.state[params[1]]
    optimizer.state[params[1]] = {k: 2 * v for k, v in optimizer.mine.items()}


def exchange_the_first(optimizer, params):
    optimizer.mine = params[0]  # and its state stays, as of a parameter that may come back
    optimizer.param_groups[0]["params"][0] = Parameter(randn(20, seed=42))


EDITS_AMONG_ALIKE = [
    reorder_parameters,
    remove_the_first,
    move_to_another_group,
    rotate_states,
    take_the_first_state,
    take_the_last_state,
    put_another_state,
    exchange_the_first,
]


@pytest.mark.parametrize("edit", EDITS_AMONG_ALIKE, ids=lambda f: f.__name__)
def test_edits_among_parameters_of_one_shape_are_picked_up(edit):
    # Where all shapes are the same, nothing but the parameter tells which state is whose.
    same = [Parameter(randn(20, seed=i)) for i in range(5)]
    a = RAdam([{"params": same}, {"params": [Parameter(randn(20))], "lr": 0.01}], lr=0.1)
    assert_goes_on_alike(a, edit)


def test_a_subclass_may_have_a_grad_of_its_own():
    class Doubled(Parameter):
        @property
        def grad(self):
            return 2 * torch.ones(3)

    p = Doubled(torch.zeros(3))
    optimizer = RAdam([p], lr=0.5)
    optimizer.step()
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), -2.0))


def test_a_step_may_be_replaced_by_a_number():
    def by(value):
        optimizer = RAdam(parameters(), lr=0.1)
        step(optimizer, 2)
        for p in params_of(optimizer):
            optimizer.state[p]["step"] = copy.deepcopy(value)
        step(optimizer, 6, first=3)
        return optimizer

    assert_same(by(0), by(torch.tensor(0.0)))
    assert_same(by(40.0), by(torch.tensor(40.0)))


def test_the_order_of_a_states_keys_does_not_matter():
    a = RAdam(parameters(), lr=0.1)
    step(a, 3)
    b = twin(a)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    reverse_keys(b, params_of(b))
    for optimizer in (a, b):
        step(optimizer, 5, first=4)
    reverse_keys(b, params_of(b))
    assert_same(a, b)


def test_a_moment_that_was_set_is_the_one_that_is_updated():
    optimizer = RAdam([Parameter(torch.ones(3))])
    step(optimizer)
    mine = torch.zeros(3)
    p = params_of(optimizer)[0]
    optimizer.state[p]["exp_avg"] = mine
    step(optimizer)
    assert optimizer.state[p]["exp_avg"] is mine
    assert mine.any()


def test_a_moment_of_another_dtype_is_brought_back_to_its_own():
    optimizer = RAdam([Parameter(torch.ones(3))])
    step(optimizer)
    p = params_of(optimizer)[0]
    state = optimizer.state[p]
    state["exp_avg"] = torch.full((3,), 2.0, dtype=torch.float64)
    p.grad = torch.full((3,), 2.0)
    optimizer.step()
    assert state["exp_avg"].dtype == torch.float32
    assert (state["exp_avg"] == 2.0).all()


def test_state_dtype_may_be_edited():
    optimizer = RAdam([Parameter(torch.ones(300))], lr=0.1)
    step(optimizer, 3)
    p = params_of(optimizer)[0]
    before = optimizer.state[p]["exp_avg"].clone()
    optimizer.param_groups[0]["state_dtype"] = torch.bfloat16
    p.grad = torch.zeros(300)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16
    torch.testing.assert_close(
        optimizer.state[p]["exp_avg"].float(), 0.9 * before, rtol=2**-7, atol=1e-30
    )
    assert optimizer.state[p]["step"] == 4


def test_a_frozen_parameter_that_is_unfrozen_begins_at_step_one():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    model[0].requires_grad_(False)
    optimizer = RAdam(model.parameters(), lr=0.1)

    def train(count):
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.ones(3)).sum().backward()
            optimizer.step()

    train(3)
    assert len(optimizer.state) == 2
    model[0].requires_grad_(True)
    train(2)
    counts = [optimizer.state[p]["step"].item() for p in model.parameters()]
    assert counts == [2, 2, 5, 5]


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16, torch.float64),
        (torch.float64, torch.float32, torch.float16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.complex64, torch.complex128, torch.complex64),
    ],
    ids=lambda dtypes: " to ".join(str(d).removeprefix("torch.") for d in dtypes),
)
def test_parameters_may_be_cast_between_steps(dtypes):
    """As by module.to(dtype): moments and counts go along, and follow a run in float64."""
    exact = Parameter(randn(1000).to(torch.complex128 if dtypes[0].is_complex else torch.float64))
    p = Parameter(exact.detach().clone().to(dtypes[0]))
    ours, theirs = RAdam([p], lr=0.1), TorchRAdam([exact], lr=0.1)
    for number in range(9):
        dtype = dtypes[number // 3]
        p.grad = None
        p.data = p.data.to(dtype)
        p.grad = randn(1000, seed=number).to(dtype)
        exact.grad = p.grad.to(exact.dtype)
        ours.step()
        theirs.step()
        state = ours.state[p]
        wide = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == wide.get(dtype, dtype)
    assert state["step"] == 9
    for key in MOMENTS:
        torch.testing.assert_close(
            state[key].to(exact.dtype), theirs.state[exact][key], rtol=1e-5, atol=1e-6
        )
    torch.testing.assert_close(p.detach().to(exact.dtype), exact.detach(), rtol=0.02, atol=0.05)


def test_a_reused_address_is_not_mistaken_for_the_old_tensor():
    """Gradients and parameters come and go, and the allocator hands out the same memory again."""
    a = RAdam([Parameter(torch.ones(64)) for _ in range(3)], lr=0.1)
    b = twin(a, TorchRAdam, foreach=False)
    for optimizer in (a, b):
        for number in range(1, 9):
            for i, p in enumerate(params_of(optimizer)):
                optimizer.zero_grad()
                # The same 256 bytes as other shapes and strides.
                p.data = p.data.reshape(-1).clone()
                state = optimizer.state.get(p)
                shape = ((64,), (8, 8), (4, 16), (16, 4))[(number + i) % 4]
                p.data = p.data.view(shape)
                if shape == (8, 8) and number % 2:
                    p.data = p.data.t()
                if state:
                    for key in MOMENTS:
                        state[key] = state[key].reshape(-1).view(p.shape)
                p.grad = randn(*p.shape, seed=10 * number + i)
                optimizer.step()
    for p, q in zip(params_of(a), params_of(b), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_deleted_and_recreated_optimizer_state_does_not_revive_an_old_count():
    optimizer = RAdam([Parameter(torch.ones(64))])
    for _ in range(20):
        step(optimizer)
        p = params_of(optimizer)[0]
        assert optimizer.state[p]["step"] == 1
        del optimizer.state[p]


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
    step(optimizer, 3)
    loaded = copy.deepcopy(optimizer.state_dict())
    loaded["state"][2].update(BAD_LOADS[bad])
    loaded["param_groups"][0]["lr"] = 0.7
    before, tensors = copy.deepcopy(optimizer.state_dict()), [*optimizer.state.values()]
    with pytest.raises(ValueError, match="param 2"):
        optimizer.load_state_dict(loaded)
    assert str(optimizer.state_dict()) == str(before)
    assert all(a is b for a, b in zip(optimizer.state.values(), tensors, strict=True))
    step(optimizer)
    save(optimizer.state_dict())


def test_a_load_for_which_memory_does_not_suffice_changes_nothing(monkeypatch):
    optimizer = RAdam([Parameter(torch.ones(5)) for _ in range(2)], lr=0.1)
    step(optimizer, 3)
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
    step(optimizer)


@pytest.mark.parametrize("by", ["deepcopy", "pickle"])
def test_copies_keep_a_state_that_does_not_fit_and_the_step_refuses_it(by):
    optimizer = RAdam([Parameter(torch.ones(7))])
    step(optimizer)
    optimizer.state[params_of(optimizer)[0]]["exp_avg"] = torch.full((1,), 3.0)
    other = copy.deepcopy(optimizer) if by == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert torch.equal(other.state[params_of(other)[0]]["exp_avg"], torch.full((1,), 3.0))
    with pytest.raises(ValueError, match=r"exp_avg of param 0 .*\(7,\), got \(1,\)"):
        step(other)


def _step_in_a_process(optimizer) -> None:
    step(optimizer, 2, first=2)


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.parametrize("cls", [RAdam, TorchRAdam], ids=["ours", "torch's"])
def test_a_process_steps_the_state_that_it_shares(cls, method):
    torch.set_num_threads(1)  # for the fork
    optimizer = cls([Parameter(torch.ones(5).share_memory_())], lr=0.1)
    step(optimizer)
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
    twin_ = cls([Parameter(torch.ones(5))], lr=0.1)
    step(twin_, 3)
    assert optimizer.state[param]["step"] == 3
    for key in MOMENTS:
        assert torch.equal(optimizer.state[param][key], twin_.state[params_of(twin_)[0]][key])


# State of others


def test_keys_of_a_wrapper_stay_and_do_not_make_a_state():
    """schedulefree keeps its `z` there before the first step."""
    p, z = Parameter(torch.ones(3)), torch.zeros(3)
    optimizer, plain = RAdam([p], lr=0.1), RAdam([Parameter(torch.ones(3))], lr=0.1)
    optimizer.state[p]["z"] = z
    for o in (optimizer, plain):
        step(o, 3)
    assert optimizer.state[p]["z"] is z
    assert list(optimizer.state[p]) == [*plain.state[params_of(plain)[0]], "z"]
    assert torch.equal(p, params_of(plain)[0])
    again = RAdam([Parameter(torch.ones(3))], lr=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(again.state[params_of(again)[0]]["z"], z)


def test_a_refused_first_step_leaves_the_keys_of_a_wrapper():
    p = Parameter(torch.ones(3))
    optimizer = RAdam([p])
    optimizer.state[p]["z"] = 1
    optimizer.param_groups[0]["betas"] = (0.9, 1.0)
    with pytest.raises(ValueError, match="beta2"):
        step(optimizer)
    assert optimizer.state[p] == {"z": 1}


@pytest.mark.parametrize("bad", [None, 3, [], "state"])
def test_a_state_that_is_no_dict_is_named(bad):
    optimizer = RAdam([Parameter(torch.ones(3))])
    optimizer.state[params_of(optimizer)[0]] = bad
    with pytest.raises(ValueError, match="state of param 0 of group 0: expected a dict, got"):
        step(optimizer)


def test_params_and_groups_may_be_tuples():
    ours, theirs = (cls([Parameter(torch.ones(3))], lr=0.1) for cls in (RAdam, TorchRAdam))
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["params"] = tuple(optimizer.param_groups[0]["params"])
        optimizer.param_groups = tuple(optimizer.param_groups)
        step(optimizer, 8)
    assert_same(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [None, 3, [3], [{}], [{"params": 3}]])
def test_groups_that_are_none_are_named(bad):
    optimizer = RAdam([Parameter(torch.ones(3))])
    optimizer.param_groups = bad
    with pytest.raises((TypeError, ValueError), match=r"param_groups|\"params\""):
        optimizer.step()


def test_state_that_is_no_parameters_is_loaded_again():
    optimizer = RAdam([Parameter(torch.ones(3))])
    optimizer.state["of a wrapper"] = {"epoch": 1}
    optimizer.state[params_of(optimizer)[0]]["ema"] = 2.0
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["of a wrapper"] == {"epoch": 1}
    step(optimizer)
    assert optimizer.state[params_of(optimizer)[0]]["ema"] == 2.0


@pytest.mark.parametrize("kind", [np.int64, np.float32, np.float64])
def test_a_step_may_be_a_number_of_numpys(kind):
    optimizer = RAdam([Parameter(torch.ones(3))])
    step(optimizer)
    loaded = copy.deepcopy(optimizer.state_dict())
    loaded["state"][0]["step"] = kind(7)
    optimizer.load_state_dict(loaded)
    step(optimizer)
    assert optimizer.state[params_of(optimizer)[0]]["step"] == 8


@pytest.mark.parametrize("bad", ["bfloat16", torch.int8, torch.float64, 3])
def test_a_state_dtype_that_is_none_is_refused_at_the_step_too(bad):
    optimizer = RAdam([Parameter(torch.ones(3))])
    optimizer.param_groups[0]["state_dtype"] = bad
    with pytest.raises(ValueError, match="Invalid state_dtype"):
        step(optimizer)
