"""Whatever is edited between steps, in tensors, the state or the groups, the next step sees."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from radam_kernels import RAdam, radam_
from tests.helpers import (
    MOMENTS,
    TorchRAdam,
    assert_same,
    parameters,
    params_of,
    randn,
    same_bits,
    take_steps,
    twin,
)

# Edits of one tensor: param, grad, a moment or the step count.

SHAPE = (16, 16)


def other(t: Tensor) -> Tensor:
    """Other values, of the kind that a step count or a second moment may have."""
    return torch.full_like(t, 4.0) if t.ndim == 0 else t.detach().flip(0).clone()


def replace(t: Tensor) -> None:
    t.data = other(t)


def set_(t: Tensor) -> None:
    with torch.no_grad():
        t.set_(other(t))


def resize_storage(t: Tensor) -> None:
    if not t.untyped_storage().resizable():
        pytest.skip("the moments' storages can't be resized")
    t.untyped_storage().resize_(1 << 16)
    t.data.copy_(other(t))


def transpose_layout(t: Tensor) -> None:
    if t.ndim == 2:
        t.data = other(t).T.contiguous().T


def swap(t: Tensor) -> None:
    twin = other(t)
    if isinstance(t, Parameter):
        twin = Parameter(twin)
        twin.grad = t.grad
    try:
        torch.utils.swap_tensors(t, twin)
    except RuntimeError as error:
        pytest.skip(f"torch does not swap this one: {error}")


TENSOR_EDITS = {
    "nothing": lambda t: None,
    "replaced": replace,
    "set": set_,
    "shared": lambda t: t.detach().share_memory_(),
    "its storage resized": resize_storage,
    "laid out otherwise": transpose_layout,
    "swapped": swap,
    "written": lambda t: t.data.copy_(other(t)),
}
STREAMS = ("param", "grad", "exp_avg", "exp_avg_sq", "step")


def make(shape=SHAPE) -> RAdam:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator)) for _ in range(3)]
    for p in params:
        p.grad = torch.randn(shape, generator=generator)
    optimizer = RAdam(params, lr=0.1)
    for _ in range(7):
        optimizer.step()
    return optimizer


def stream(optimizer: RAdam, name: str) -> Tensor:
    p = optimizer.param_groups[0]["params"][1]
    return {"param": p, "grad": p.grad}.get(name, optimizer.state[p].get(name))


def check_step(optimizer: RAdam) -> None:
    """A step equals that of radam_, which keeps nothing, on the tensors as they are now."""
    params = optimizer.param_groups[0]["params"]
    for p in params:
        state = optimizer.state[p]
        state["expected"] = [
            t.detach().clone() for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
        ]
        # radam_ takes one layout; only the values matter.
        state["expected"] = [t.contiguous() for t in state["expected"]]
        step = int(state["step"]) + 1
        radam_(
            *state["expected"], step=step, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8,
            backend="reference",
        )  # fmt: skip
        state["expected_step"] = step
    expected = {p: (optimizer.state[p].pop("expected"), optimizer.state[p].pop("expected_step"))
                for p in params}  # fmt: skip
    optimizer.step()
    for p in params:
        (param, _, exp_avg, exp_avg_sq), step = expected[p]
        state = optimizer.state[p]
        assert same_bits(p, param)
        assert same_bits(state["exp_avg"], exp_avg)
        assert same_bits(state["exp_avg_sq"], exp_avg_sq)
        assert state["step"] == step


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("edit", TENSOR_EDITS)
def test_an_edit_between_steps_is_seen(edit, name):
    optimizer = make()
    check_step(optimizer)
    t = stream(optimizer, name)
    TENSOR_EDITS[edit](t)
    del t
    for _ in range(3):
        check_step(optimizer)


@pytest.mark.parametrize("name", ["param", "grad"])  # those that torch can clone so
def test_a_lazy_clone_keeps_its_values(name):
    if not hasattr(torch, "_lazy_clone"):
        pytest.skip("this torch has no lazy clones")
    optimizer = make()
    with torch.no_grad():
        clone = torch._lazy_clone(stream(optimizer, name))
    kept = clone.detach().tolist()  # reading it copies nothing
    for _ in range(2):
        check_step(optimizer)
    assert clone.tolist() == kept


def test_new_gradients_are_seen_wherever_they_are():
    optimizer = make()
    for i in range(10):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = None
            p.grad = torch.full_like(p, float(i))  # mostly where the last one was
        check_step(optimizer)


@pytest.mark.parametrize("shape", [SHAPE, (1, 4, 1, 4, 4, 4, 1)], ids=["2-D", "7-D"])
@pytest.mark.parametrize("edit", ["moved", "transposed", "both"])
@pytest.mark.parametrize("name", STREAMS[:-1])
def test_an_edit_that_keeps_the_storage_is_seen(name, edit, shape):
    optimizer = make(shape)
    t = stream(optimizer, name)
    room = torch.cat([t.detach().flatten(), other(t).flatten()])
    t.data = room[: t.numel()].view(shape)
    check_step(optimizer)
    if edit != "transposed":
        t.data = room[t.numel() :].view(shape)
    if edit in ("transposed", "both"):
        t.data = t.data.transpose(*((0, 1) if len(shape) == 2 else (3, 4)))
    del t
    for _ in range(2):
        check_step(optimizer)


def test_a_first_step_within_a_mode_of_torch_does_no_harm(succeeds):
    code = """
import radam_kernels, torch, torch._dynamo  # which torch 2.6 can not import within the mode
from torch._subclasses import FakeTensorMode
with torch.device("meta"), FakeTensorMode():
    p = torch.nn.Parameter(torch.ones(5)); p.grad = torch.ones(5)
    radam_kernels.RAdam([p]).step()
p = torch.nn.Parameter(torch.ones(5)); p.grad = torch.ones(5)
optimizer = radam_kernels.RAdam([p], lr=0.1)
for _ in range(3):
    optimizer.step()
assert abs(p.detach() - 0.7).max() < 1e-6, p
"""
    succeeds(code)


def test_threads_that_take_the_first_step_at_once_do_not_wait_for_each_other(succeeds):
    code = """
import sys, threading, torch
from radam_kernels import RAdam
sys.setswitchinterval(1e-6)  # another thread runs wherever Python code does
params = [torch.nn.Parameter(torch.zeros(200)) for _ in range(20)]
for p in params:
    p.grad = torch.ones(200)
optimizer = RAdam(params)
threads = [threading.Thread(target=optimizer.step) for _ in range(4)]
for t in threads:
    t.start()
for t in threads:
    t.join()
"""
    succeeds(code)


# Edits of the state and the groups: each has the effect that it has on torch's class.


def assert_edit_is_picked_up(edit, *, dtype=torch.float32, ours=None):
    """`edit(optimizer, params)` in mid-training: ours and torch's then go on alike."""
    a = RAdam(parameters(dtype), lr=0.1, **(ours or {}))
    assert_goes_on_alike(a, edit)
    return a


def assert_goes_on_alike(a, edit):
    b = twin(a, TorchRAdam, foreach=False)
    for optimizer in (a, b):
        take_steps(optimizer, 4)
        edit(optimizer, params_of(optimizer))
        take_steps(optimizer, 6, first=5)
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
    take_steps(optimizer, first=77)
    optimizer.state[params[0]]["step"] = torch.tensor(3.0)


def double_step(optimizer, params):
    state = optimizer.state[params[0]]
    state["step"] = state["step"].double()


def to_other_memory(optimizer, params):
    """As the widespread `optimizer_to` snippet does when the device changes."""
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
    take_steps(optimizer, 2, first=50)
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
        take_steps(optimizer, 2)
        for p in params_of(optimizer):
            optimizer.state[p]["step"] = copy.deepcopy(value)
        take_steps(optimizer, 6, first=3)
        return optimizer

    assert_same(by(0), by(torch.tensor(0.0)))
    assert_same(by(40.0), by(torch.tensor(40.0)))


def test_the_order_of_a_states_keys_does_not_matter():
    a = RAdam(parameters(), lr=0.1)
    take_steps(a, 3)
    b = twin(a)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    reverse_keys(b, params_of(b))
    for optimizer in (a, b):
        take_steps(optimizer, 5, first=4)
    reverse_keys(b, params_of(b))
    assert_same(a, b)


def test_a_moment_that_was_set_is_the_one_that_is_updated():
    optimizer = RAdam([Parameter(torch.ones(3))])
    take_steps(optimizer)
    mine = torch.zeros(3)
    p = params_of(optimizer)[0]
    optimizer.state[p]["exp_avg"] = mine
    take_steps(optimizer)
    assert optimizer.state[p]["exp_avg"] is mine
    assert mine.any()


def test_a_moment_of_another_dtype_is_brought_back_to_its_own():
    optimizer = RAdam([Parameter(torch.ones(3))])
    take_steps(optimizer)
    p = params_of(optimizer)[0]
    state = optimizer.state[p]
    state["exp_avg"] = torch.full((3,), 2.0, dtype=torch.float64)
    p.grad = torch.full((3,), 2.0)
    optimizer.step()
    assert state["exp_avg"].dtype == torch.float32
    assert (state["exp_avg"] == 2.0).all()


def test_state_dtype_may_be_edited():
    optimizer = RAdam([Parameter(torch.ones(300))], lr=0.1)
    take_steps(optimizer, 3)
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
        take_steps(optimizer)
        p = params_of(optimizer)[0]
        assert optimizer.state[p]["step"] == 1
        del optimizer.state[p]
