"""The state is torch's: its keys, dtypes and layouts, its memory, and entries of other owners."""

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
from torch.nn import Parameter

from radam_kernels import RAdam, radam_
from tests.helpers import (
    MOMENTS,
    TorchRAdam,
    assert_same,
    parameters,
    params_of,
    randn,
    take_steps,
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
    take_steps(optimizer)
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
    take_steps(optimizer)
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
    take_steps(optimizer)
    state = optimizer.state[params_of(optimizer)[0]]
    assert all(state[key].untyped_storage().nbytes() == 4000 for key in MOMENTS)
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() < 8000 + 4000


@pytest.mark.parametrize("what", ["optimizer", "state_dict", "deepcopy"])
@pytest.mark.parametrize("flatten", [False, True], ids=["", "flatten"])
def test_files_are_no_larger_than_what_they_hold(what, flatten):
    optimizer = RAdam([Parameter(torch.ones(100)) for _ in range(100)], flatten=flatten)
    take_steps(optimizer)
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
    take_steps(optimizer)
    assert [optimizer.state[early][key].data_ptr() for key in MOMENTS] == addresses
    assert optimizer.state[early]["step"] == 2
    assert optimizer.state[late]["step"] == 1


def test_moments_stay_where_they_are_from_step_to_step():
    optimizer = RAdam(parameters())
    take_steps(optimizer)
    before = [optimizer.state[p][key].data_ptr() for p in params_of(optimizer) for key in MOMENTS]
    take_steps(optimizer, 8)
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
    take_steps(optimizer)
    count = optimizer.state[params_of(optimizer)[0]]["step"]
    count.fill_(2**24 - 1)
    take_steps(optimizer, 3)
    assert count == 2**24


def test_a_float32_count_that_has_stopped_is_what_the_step_computes_with():
    betas = (1 - 1e-9, 0.999)  # so that the bias correction still tells 2**24 from the next
    p = Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = RAdam([p], lr=0.1, betas=betas)
    take_steps(optimizer)
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
    take_steps(optimizer, 2)
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
    take_steps(optimizer, 2)
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
    take_steps(optimizer, 2)
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
    take_steps(optimizer, 2)
    params = params_of(optimizer)

    def references():
        gc.collect()
        tensors = [x for p in params for x in (p, p.grad, *optimizer.state[p].values())]
        return [sys.getrefcount(x) for x in tensors], len(gc.get_objects())

    references()  # fills caches
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
    take_steps(optimizer)
    optimizer.zero_grad()
    before = resident()
    for p in params[1:]:
        del optimizer.state[p]
    assert before - resident() > 0.9 * 3 * 2 * size


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")
def test_loading_needs_no_second_copy_of_the_moments():
    size = 2**26
    source = TorchRAdam([Parameter(torch.ones(size // 4))])
    take_steps(source)
    loaded = copy.deepcopy(source.state_dict())
    optimizer = RAdam([Parameter(torch.ones(size // 4))])
    before = resident()
    optimizer.load_state_dict(loaded)
    assert resident() - before < 0.1 * size


def test_a_parameter_can_die():
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = RAdam([p, q])
    take_steps(optimizer, 2)
    optimizer.param_groups[0]["params"].pop()
    del optimizer.state[q]
    gone = weakref.ref(q)
    del q
    gc.collect()
    assert gone() is None
    take_steps(optimizer)
    assert optimizer.state[p]["step"] == 3


# Entries of other owners.


def test_keys_of_a_wrapper_stay_and_do_not_make_a_state():
    """schedulefree keeps its `z` there before the first step."""
    p, z = Parameter(torch.ones(3)), torch.zeros(3)
    optimizer, plain = RAdam([p], lr=0.1), RAdam([Parameter(torch.ones(3))], lr=0.1)
    optimizer.state[p]["z"] = z
    for o in (optimizer, plain):
        take_steps(o, 3)
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
        take_steps(optimizer)
    assert optimizer.state[p] == {"z": 1}


@pytest.mark.parametrize("bad", [None, 3, [], "state"])
def test_a_state_that_is_not_a_dict_is_named(bad):
    optimizer = RAdam([Parameter(torch.ones(3))])
    optimizer.state[params_of(optimizer)[0]] = bad
    with pytest.raises(ValueError, match="state of param 0 of group 0: expected a dict, got"):
        take_steps(optimizer)


def test_params_and_groups_may_be_tuples():
    ours, theirs = (cls([Parameter(torch.ones(3))], lr=0.1) for cls in (RAdam, TorchRAdam))
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["params"] = tuple(optimizer.param_groups[0]["params"])
        optimizer.param_groups = tuple(optimizer.param_groups)
        take_steps(optimizer, 8)
    assert_same(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [None, 3, [3], [{}], [{"params": 3}]])
def test_invalid_groups_are_named(bad):
    optimizer = RAdam([Parameter(torch.ones(3))])
    optimizer.param_groups = bad
    with pytest.raises((TypeError, ValueError), match=r"param_groups|\"params\""):
        optimizer.step()


def test_state_of_other_keys_is_loaded_again():
    optimizer = RAdam([Parameter(torch.ones(3))])
    optimizer.state["of a wrapper"] = {"epoch": 1}
    optimizer.state[params_of(optimizer)[0]]["ema"] = 2.0
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["of a wrapper"] == {"epoch": 1}
    take_steps(optimizer)
    assert optimizer.state[params_of(optimizer)[0]]["ema"] == 2.0


@pytest.mark.parametrize("kind", [np.int64, np.float32, np.float64])
def test_a_step_may_be_a_numpy_number(kind):
    optimizer = RAdam([Parameter(torch.ones(3))])
    take_steps(optimizer)
    loaded = copy.deepcopy(optimizer.state_dict())
    loaded["state"][0]["step"] = kind(7)
    optimizer.load_state_dict(loaded)
    take_steps(optimizer)
    assert optimizer.state[params_of(optimizer)[0]]["step"] == 8


@pytest.mark.parametrize("bad", ["bf16", "float64", torch.int8, torch.float64, 3])
def test_an_invalid_state_dtype_is_refused_at_the_step_too(bad):
    optimizer = RAdam([Parameter(torch.ones(3))])
    optimizer.param_groups[0]["state_dtype"] = bad
    with pytest.raises(ValueError, match="Invalid state_dtype"):
        take_steps(optimizer)
