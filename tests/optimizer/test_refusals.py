"""What can't be done is refused: the error says why and what to do, and nothing has changed."""

import copy
import math
import re

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from radam_kernels import RAdam
from tests.helpers import MOMENTS, give_gradients, params_of, randn


def snapshot(optimizer):
    """Every bit that a step may change, and where it is."""

    def of(tensor):
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return tensor
        at = tensor.data_ptr() if tensor.device.type == "cpu" else None
        return (tensor.detach().clone(), tensor.dtype, tensor.stride(), at)

    groups = [
        ({k: v for k, v in g.items() if k != "params"}, list(map(id, g["params"])))
        for g in optimizer.param_groups
    ]
    params = [of(p) for g in optimizer.param_groups for p in g["params"]]
    state = [(id(p), {k: of(v) for k, v in s.items()}) for p, s in optimizer.state.items()]
    return groups, params, state


def same(a, b) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or a == b or (a != a and b != b)


def assert_refused(call, optimizer, error, *words):
    """`call` raises `error`, whose message has all the words, and changes nothing."""
    before = snapshot(optimizer)
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value), f"{word!r} is not in {str(raised.value)!r}"
    assert same(snapshot(optimizer), before)


def assert_step_refused(optimizer, error, *words):
    assert_refused(optimizer.step, optimizer, error, *words)


@pytest.fixture(params=["new", "trained"])
def optimizer(request):
    """Two good parameters around one to be spoilt; with state or without."""
    optimizer = RAdam([Parameter(randn(5, 4, seed=i)) for i in range(3)], lr=0.1)
    if request.param == "trained":
        for seed in range(3):
            give_gradients(optimizer, seed)
            optimizer.step()
    give_gradients(optimizer, 7)
    return optimizer


# Hyperparameters.

INVALID = [
    ("lr", -1.0, "Invalid learning rate: -1.0"),
    ("lr", math.nan, "Invalid learning rate: nan"),
    ("lr", torch.tensor(-1.0), "Invalid learning rate: -1.0"),
    ("lr", torch.tensor(math.nan), "Invalid learning rate: nan"),
    ("lr", torch.ones(2), "Tensor lr must be 1-element, got shape (2,)"),
    ("eps", -1e-8, "Invalid epsilon value: -1e-08"),
    ("eps", math.nan, "Invalid epsilon value: nan"),
    ("betas", (1.0, 0.9), "Invalid beta parameter at index 0: 1.0; expected 0 <= beta < 1"),
    ("betas", (-0.1, 0.9), "Invalid beta parameter at index 0: -0.1"),
    ("betas", (0.9, 1.0), "Invalid beta parameter at index 1: 1.0; expected 0 <= beta < 1"),
    ("betas", (0.9, math.nan), "Invalid beta parameter at index 1: nan"),
    ("betas", (0.9, 0.9, 0.9), "Invalid betas: (0.9, 0.9, 0.9); expected two numbers"),
    ("weight_decay", -0.1, "Invalid weight_decay value: -0.1"),
    ("weight_decay", math.nan, "Invalid weight_decay value: nan"),
    ("rho_threshold", 3.9, "expected at least 4.0 for rectification='first_order', got 3.9"),
    ("rho_threshold", math.nan, "expected at least 4.0 for rectification='first_order', got nan"),
    ("rectification", "second", "expected one of ('first_order', 'exact'), got 'second'"),
    ("state_dtype", torch.float64, "Invalid state_dtype: torch.float64; expected None, one of"),
    ("state_dtype", torch.int32, "Invalid state_dtype: torch.int32"),
    ("state_dtype", "float64", "Invalid state_dtype: float64"),
    ("state_dtype", "bf16", "Invalid state_dtype: bf16"),
]
by_invalid = pytest.mark.parametrize(
    ("name", "value", "message"), INVALID, ids=[f"{n}={v}" for n, v, _ in INVALID]
)


@by_invalid
@pytest.mark.parametrize("params", [[torch.ones(1)], None], ids=["params", "params=None"])
def test_invalid_hyperparameters(name, value, message, params):
    with pytest.raises(ValueError, match=re.escape(message)):
        RAdam(params, **{name: value})


@by_invalid
def test_invalid_hyperparameters_of_a_group(name, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RAdam([{"params": [torch.ones(1)], name: value}])
    optimizer = RAdam([Parameter(torch.ones(1))])
    group = {"params": [Parameter(torch.ones(2))], name: value}
    assert_refused(lambda: optimizer.add_param_group(group), optimizer, ValueError, message)


def test_the_least_threshold_depends_on_the_form():
    p = [Parameter(torch.ones(1))]
    RAdam(p, rho_threshold=4.0)
    RAdam(p, rho_threshold=2.0, rectification="exact")
    with pytest.raises(
        ValueError, match=r"expected at least 2\.0 for rectification='exact', got 1"
    ):
        RAdam(p, rho_threshold=1.9, rectification="exact")


def test_differentiable_is_refused_by_name():
    remedy = "does not support differentiable=True; use differentiable=False, or torch.optim.RAdam"
    with pytest.raises(NotImplementedError, match=re.escape(remedy)):
        RAdam([Parameter(torch.ones(1))], differentiable=True)


@pytest.mark.parametrize(
    ("params", "error"),
    [([], ValueError), (torch.ones(1), TypeError), ([1.0], TypeError), (None, TypeError)],
    ids=["no parameters", "a bare tensor", "a number", "None"],
)
def test_params_that_torch_refuses_are_refused(params, error):
    with pytest.raises(error):
        torch.optim.RAdam(params)
    with pytest.raises(error):
        RAdam(params)


def test_a_parameter_of_two_groups_is_refused():
    optimizer = RAdam([Parameter(torch.ones(1))])
    group = {"params": params_of(optimizer)[:]}
    words = "some parameters appear in more than one parameter group"
    assert_refused(lambda: optimizer.add_param_group(group), optimizer, ValueError, words)


EDITS = [
    ("betas", (1.0, 0.999), "beta1"),
    ("betas", (0.9, 1.0), "beta2"),
    ("betas", (0.9, math.nan), "beta2"),
    ("betas", (0.9,), ""),
    ("eps", -1.0, "eps"),
    ("rho_threshold", 3.0, "expected at least 4.0"),
    ("rectification", "second", "'second'"),
]


@pytest.mark.parametrize(("name", "value", "message"), EDITS, ids=[f"{n}={v}" for n, v, _ in EDITS])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_bad_edit_between_steps_is_refused(optimizer, name, value, message, backend):
    optimizer._backend = backend
    good = optimizer.hyperparameters(optimizer.param_groups[0])[name]
    optimizer.param_groups[0][name] = value
    assert_step_refused(optimizer, ValueError, message)
    optimizer.param_groups[0][name] = good
    optimizer.step()


def test_a_bad_edit_of_one_group_leaves_the_others_alone():
    groups = [{"params": [Parameter(randn(3))]}, {"params": [Parameter(randn(3))]}]
    optimizer = RAdam(groups)
    give_gradients(optimizer)
    optimizer.step()
    optimizer.param_groups[1]["betas"] = (0.9, 1.0)
    assert_step_refused(optimizer, ValueError, "beta2", "1.0")


@pytest.mark.parametrize("name", ["backend", "lr"])
def test_a_refused_constructor_leaves_parameters_alone(name):
    p = Parameter(torch.ones(3))
    address = p.data_ptr()
    with pytest.raises((ValueError, RuntimeError)):
        RAdam([p], flatten=True, **{name: {"backend": "gpu", "lr": -1.0}[name]})
    assert p.data_ptr() == address


# Tensors. One bad parameter among good ones leaves the good ones untouched.


def test_sparse_gradients(optimizer):
    bad = params_of(optimizer)[1]
    bad.grad = bad.grad.to_sparse()
    assert_step_refused(
        optimizer,
        RuntimeError,
        "RAdam does not support sparse gradients",
        "torch.sparse_coo",
        "param 1 of group 0",
        "to_dense()",
    )
    bad.grad = bad.grad.to_dense()
    optimizer.step()


def test_sparse_embeddings():
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = RAdam(embedding.named_parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    assert_step_refused(optimizer, RuntimeError, "sparse", 'param 0 of group 0 ("weight")')


def spoil_shape(p):
    p.grad = None
    p.data = torch.cat([p.data, p.data])


def spoil_shape_and_gradient(p):
    spoil_shape(p)
    p.grad = torch.ones_like(p)


def spoil_by_complex(p):
    p.grad = None
    p.data = p.data.to(torch.complex64)
    p.grad = torch.ones_like(p)


def spoil_by_integers(p):
    p.requires_grad_(False)
    p.grad = None
    p.data = p.data.long()
    p.grad = torch.ones_like(p)


def spoil_by_expanding(p):
    p.data = p.data[:1].expand(p.shape)


def spoil_by_overlapping_strides(p):
    p.data = torch.zeros(20).as_strided(p.shape, (2, 1))


BAD_PARAMS = {
    spoil_shape_and_gradient: (ValueError, "(10, 4)", "got (5, 4)", "delete the state"),
    spoil_by_complex: (ValueError, "torch.complex64", "torch.float32", "delete the state"),
    spoil_by_integers: (ValueError, "torch.int64", "param 1 of group 0", "cast it"),
    spoil_by_expanding: (ValueError, "shares memory with itself", "make it contiguous"),
    spoil_by_overlapping_strides: (ValueError, "shares memory with itself", "make it contiguous"),
}


@pytest.mark.parametrize("spoil", BAD_PARAMS, ids=lambda f: f.__name__.removeprefix("spoil_"))
def test_a_parameter_spoilt_in_mid_training(spoil):
    optimizer = RAdam([Parameter(randn(5, 4, seed=i)) for i in range(3)], lr=0.1)
    give_gradients(optimizer)
    optimizer.step()
    spoil(params_of(optimizer)[1])
    error, *words = BAD_PARAMS[spoil]
    assert_step_refused(optimizer, error, "param 1 of group 0", *words)
    params_of(optimizer)[1].grad = None
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params_of(optimizer)] == [2, 1, 2]


def test_a_parameter_that_changed_its_shape_can_start_from_zero():
    p = Parameter(randn(5))
    optimizer = RAdam([p])
    give_gradients(optimizer)
    optimizer.step()
    spoil_shape_and_gradient(p)
    assert_step_refused(optimizer, ValueError, "delete the state to start from zero")
    del optimizer.state[p]
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].shape == (10,)


def test_a_gradient_of_another_shape(optimizer):
    bad = params_of(optimizer)[1]
    bad.grad = None
    data, bad.data = bad.data, torch.zeros(3)
    bad.grad = torch.ones(3)
    bad.data = data
    words = ("grad of param 1 of group 0", "expected shape (5, 4)", "got (3,)")
    assert_step_refused(optimizer, ValueError, *words)


def test_meta_parameters_among_real_ones():
    optimizer = RAdam([Parameter(torch.ones(2)), Parameter(torch.ones(2, device="meta"))])
    for p in params_of(optimizer):
        p.grad = torch.ones_like(p)
    before = params_of(optimizer)[0].detach().clone()
    with pytest.raises(ValueError, match=r"param 1 of group 0: a meta tensor has no memory"):
        optimizer.step()
    assert torch.equal(params_of(optimizer)[0], before)
    assert not optimizer.state


# Overlaps.

BASE = 48
OVERLAPS = {
    "the same memory": lambda b: (b[:20], b[:20]),
    "one element": lambda b: (b[:20], b[19:30]),
    "one within the other": lambda b: (b, b[20:21]),
    "two shapes": lambda b: (b[:20].view(4, 5), b[:20].view(5, 4)),
    "two dtypes": lambda b: (b[:20], b[:20].view(torch.bfloat16)),
    "complex and real": lambda b: (torch.view_as_complex(b.view(-1, 2)), b[:4]),
    "the same columns": lambda b: (b.view(6, 8)[:, ::2], b.view(6, 8)[:, ::2]),
    "columns and all": lambda b: (b.view(6, 8)[:, ::2], b),
    "all and columns": lambda b: (b, b.view(6, 8)[:, ::2]),
    "rows and a column": lambda b: (b.view(6, 8)[1], b.view(6, 8)[:, 3]),
    "crossing strides": lambda b: (b[::3], b[::5]),
}


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_overlapping_parameters(overlap, backend):
    first, second = (Parameter(t) for t in OVERLAPS[overlap](randn(BASE)))
    optimizer = RAdam([first, Parameter(randn(5)), second], backend=backend)
    give_gradients(optimizer)
    words = ("param 0 of group 0", "param 2 of group 0", "shares memory", "clone")
    assert_step_refused(optimizer, ValueError, *words)
    assert not optimizer.state
    second.grad = None
    optimizer.step()


DISJOINT = {
    "neighbours": lambda b: (b[:20], b[20:]),
    "interleaved": lambda b: (b[::2], b[1::2]),
    "columns": lambda b: (b.view(6, 8)[:, :3], b.view(6, 8)[:, 3:]),
    "in the gaps": lambda b: (b.view(6, 8)[::2], b.view(6, 8)[1]),
    "rows of several": lambda b: tuple(b.view(6, 8)[i, ::2] for i in range(6)),
    "empty in the middle": lambda b: (b, b[7:7]),
}


@pytest.mark.parametrize("disjoint", DISJOINT)
def test_parameters_on_one_storage_that_do_not_overlap_are_stepped(disjoint):
    ours = RAdam([Parameter(t) for t in DISJOINT[disjoint](randn(BASE))], lr=0.1)
    torchs = torch.optim.RAdam([Parameter(t) for t in DISJOINT[disjoint](randn(BASE))], lr=0.1)
    for seed in range(8):
        for optimizer in (ours, torchs):
            give_gradients(optimizer, seed)
            optimizer.step()
    for p, q in zip(params_of(ours), params_of(torchs), strict=True):
        torch.testing.assert_close(p, q)


def test_parameters_that_come_to_overlap_in_mid_training():
    optimizer = RAdam([Parameter(randn(5, seed=i)) for i in range(3)])
    give_gradients(optimizer)
    optimizer.step()
    first, _, last = params_of(optimizer)
    last.data = first.data
    assert_step_refused(optimizer, ValueError, "param 0", "param 2", "clone")


def test_parameters_that_come_to_overlap_are_refused_every_time():
    optimizer = RAdam([Parameter(randn(5, seed=i)) for i in range(3)])
    give_gradients(optimizer)
    optimizer.step()
    first, _, last = params_of(optimizer)
    last.data, own = first.data, last.data
    for _ in range(3):
        assert_step_refused(optimizer, ValueError, "param 0", "param 2", "clone")
    last.data = own
    optimizer.step()
    first.grad = own  # the memory that is written now, not that of the refused steps
    assert_step_refused(optimizer, ValueError, "grad of param 0 of group 0", "param 2 of group 0")


def test_a_parameter_that_is_cast_into_its_neighbours_memory():
    base = torch.zeros(40)
    optimizer = RAdam([Parameter(base.bfloat16()[:20]), Parameter(base[10:30])])
    first, _ = params_of(optimizer)
    first.data = base.view(torch.bfloat16)[:20]
    give_gradients(optimizer)
    optimizer.step()
    optimizer.step()
    first.grad = None
    first.data = base[:20]  # it begins where it did and has as many elements, each twice as large
    give_gradients(optimizer)
    assert_step_refused(optimizer, ValueError, "param 0", "param 1", "clone")


def test_a_parameter_that_grows_into_its_neighbours_memory():
    base = torch.zeros(40)
    optimizer = RAdam([Parameter(base[:10]), Parameter(base[20:])])
    first, _ = params_of(optimizer)
    memory = {key: torch.zeros(30) for key in MOMENTS}
    give_gradients(optimizer)
    optimizer.step()
    for length in (20, 30):
        first.grad = None
        first.data = base[:length]
        optimizer.state[first].update({key: memory[key][:length] for key in MOMENTS})
        give_gradients(optimizer)
        if length == 20:
            optimizer.step()
    assert_step_refused(optimizer, ValueError, "param 0", "param 1", "clone")


@pytest.mark.parametrize("offset", [-4, 0, 7, 19])
def test_a_gradient_that_touches_what_is_written_is_refused(offset):
    optimizer = RAdam([Parameter(randn(5)), Parameter(randn(20))])
    first, second = params_of(optimizer)
    base = torch.zeros(60)
    second.data = base[20:40]
    give_gradients(optimizer)
    optimizer.step()
    for start in (15, 40):  # right before and right after it
        first.grad = base[start : start + 5]
        optimizer.step()
    first.grad = base[20 + offset : 25 + offset]
    assert_step_refused(optimizer, ValueError, "grad of param 0 of group 0", "param 1 of group 0")


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_given_twice():
    p = Parameter(randn(5))
    optimizer = RAdam([p, p])
    p.grad = randn(5)
    words = ("param 0 of group 0", "given twice", "leave one out")
    assert_step_refused(optimizer, ValueError, *words)


@pytest.mark.parametrize("key", ["the parameter", *MOMENTS])
def test_a_gradient_in_the_memory_of_something_that_is_written(optimizer, key):
    give_gradients(optimizer)
    optimizer.step()
    first, _, last = params_of(optimizer)
    memory = first.detach() if key == "the parameter" else optimizer.state[first][key]
    last.grad = memory
    assert_step_refused(optimizer, ValueError, "grad of param 2 of group 0", "param 0 of group 0")


def test_a_moment_in_the_memory_of_another(optimizer):
    give_gradients(optimizer)
    optimizer.step()
    first, _, last = params_of(optimizer)
    optimizer.state[last]["exp_avg"] = optimizer.state[first]["exp_avg"]
    assert_step_refused(optimizer, ValueError, "exp_avg of param", "clone")


# State.


def spoilt_state(edit):
    optimizer = RAdam([Parameter(randn(5, 4, seed=i)) for i in range(3)], lr=0.1)
    give_gradients(optimizer)
    optimizer.step()
    edit(optimizer.state[params_of(optimizer)[1]])
    return optimizer


BAD_STATE = {
    "no exp_avg": (lambda s: s.pop("exp_avg"), "lacks ['exp_avg']"),
    "no exp_avg_sq": (lambda s: s.pop("exp_avg_sq"), "lacks ['exp_avg_sq']"),
    "no step": (lambda s: s.pop("step"), "lacks ['step']"),
    "only a step": (lambda s: [s.pop(k) for k in MOMENTS], "lacks ['exp_avg', 'exp_avg_sq']"),
    "another shape": (lambda s: s.update(exp_avg=torch.zeros(4, 5)), "got (4, 5)"),
    "no tensor": (lambda s: s.update(exp_avg_sq=0.0), "got float"),
    "complex": (lambda s: s.update(exp_avg=torch.zeros(5, 4) * 1j), "complex64"),
    "integers": (lambda s: s.update(exp_avg=torch.zeros(5, 4).long()), "int64"),
    "a step of two": (lambda s: s.update(step=torch.ones(2)), "step of"),
    "a step of text": (lambda s: s.update(step="3"), "got '3'"),
    "a step of None": (lambda s: s.update(step=None), "got None"),
}


@pytest.mark.parametrize("bad", BAD_STATE)
def test_a_state_that_cannot_be_the_parameters(bad):
    edit, words = BAD_STATE[bad]
    optimizer = spoilt_state(edit)
    assert_step_refused(optimizer, ValueError, "param 1 of group 0", words)
    del optimizer.state[params_of(optimizer)[1]]
    optimizer.step()


@pytest.mark.parametrize("count", [-1.0, -2.5, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("kind", ["filled", "replaced", "a number"])
def test_an_invalid_step_count(count, kind):
    def edit(state):
        if kind == "filled":
            state["step"].fill_(count)
        else:
            state["step"] = count if kind == "a number" else torch.tensor(count)

    optimizer = spoilt_state(edit)
    first, bad, last = params_of(optimizer)
    before = [p.detach().clone() for p in (first, bad, last)]
    with pytest.raises(ValueError, match=r"step: expected a whole number >= 1"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip((first, bad, last), before, strict=True))
    assert [optimizer.state[p]["step"].item() for p in (first, last)] == [1, 1]
    optimizer.state[bad]["step"] = torch.tensor(1.0)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (first, bad, last)] == [2, 2, 2]


# Loading.


def checkpoint(optimizer):
    other = copy.deepcopy(optimizer)
    give_gradients(other, 9)
    other.step()
    return copy.deepcopy(other.state_dict())


BAD_CHECKPOINTS = {
    "a moment of another shape": (
        lambda c: c["state"][1].update(exp_avg=torch.zeros(3)),
        ("exp_avg of param 1", "expected shape (5, 4)", "got (3,)"),
    ),
    "a moment of another kind": (
        lambda c: c["state"][1].update(exp_avg_sq=torch.zeros(5, 4) * 1j),
        ("exp_avg_sq of param 1", "complex64"),
    ),
    "no exp_avg_sq": (
        lambda c: c["state"][2].pop("exp_avg_sq"),
        ("param 2", "lacks ['exp_avg_sq']"),
    ),
    "a step of two": (lambda c: c["state"][0].update(step=torch.ones(2)), ("step of param 0",)),
    "more groups": (
        lambda c: c["param_groups"].append(c["param_groups"][0]),
        ("different number of parameter groups",),
    ),
    "fewer parameters": (
        lambda c: c["param_groups"][0].update(params=[0, 1]),
        ("doesn't match the size",),
    ),
}


@pytest.mark.parametrize("bad", BAD_CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit(optimizer, bad):
    spoil, words = BAD_CHECKPOINTS[bad]
    loaded = checkpoint(optimizer)
    spoil(loaded)
    assert_refused(lambda: optimizer.load_state_dict(loaded), optimizer, ValueError, *words)
    optimizer.load_state_dict(checkpoint(optimizer))
    optimizer.step()


def test_a_checkpoint_of_another_optimizer_is_refused(optimizer):
    params = [Parameter(p.detach().clone()) for p in params_of(optimizer)]
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    give_gradients(sgd)
    sgd.step()
    loaded = sgd.state_dict()
    words = ("param 0", "lacks ['step', 'exp_avg', 'exp_avg_sq']")
    assert_refused(lambda: optimizer.load_state_dict(loaded), optimizer, ValueError, *words)


def test_loading_does_not_change_the_checkpoint(optimizer):
    loaded = checkpoint(optimizer)
    kept = copy.deepcopy(loaded)
    optimizer.load_state_dict(loaded)
    assert same(loaded, kept)


def test_errors_name_parameters_that_have_names():
    model = torch.nn.Linear(3, 2)
    optimizer = RAdam(model.named_parameters())
    give_gradients(optimizer)
    optimizer.step()
    model.bias.data = model.weight.data[0, :2]
    assert_step_refused(optimizer, ValueError, '"weight"', '"bias"')


def test_a_refused_first_step_leaves_no_state():
    optimizer = RAdam([Parameter(randn(5, seed=i)) for i in range(3)])
    give_gradients(optimizer)
    optimizer.param_groups[0]["betas"] = (0.9, 1.0)
    assert_step_refused(optimizer, ValueError, "beta2")
    assert not optimizer.state


def test_an_error_in_the_closure_changes_nothing(optimizer):
    def closure():
        raise ZeroDivisionError("in the closure")

    assert_refused(lambda: optimizer.step(closure), optimizer, ZeroDivisionError, "in the closure")
