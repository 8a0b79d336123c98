"""What users and tools do between steps to gradients, tensors, states and groups."""

import copy
import math
from collections.abc import Callable
from random import Random

import torch
from torch import Tensor
from torch.nn import Parameter

from radam_kernels import RAdam
from tests.helpers import MOMENTS, params_of, randn

REALS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [(), (0,), (1,), (127,), (128,), (129,), (3, 50), (2, 3, 4, 5), (300,), (9000,)]


class Marked(Tensor):
    """A subclass of tensors, as libraries have."""


# The same values in another tensor, for parameters, gradients and what a state has.


def cast_to(real: torch.dtype) -> Callable[[Tensor], Tensor]:
    def cast(t: Tensor) -> Tensor:
        if t.is_complex():
            return t.to(torch.complex128 if real == torch.float64 else torch.complex64)
        return t.to(real) if t.is_floating_point() else t.clone()

    return cast


def within_a_buffer(t: Tensor) -> Tensor:
    room = torch.empty(t.numel() + 7, dtype=t.dtype)
    return room[3 : 3 + t.numel()].view(t.shape).copy_(t)


def negated(t: Tensor) -> Tensor:
    return torch._neg_view(-t) if t.is_floating_point() else t.clone()


def channels_last(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.channels_last if t.ndim == 4 else torch.contiguous_format)


TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "cloned": torch.clone,
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every other": lambda t: torch.stack([t, t], -1)[..., 0],
    "within a buffer": within_a_buffer,
    "channels last": channels_last,
    "negated": negated,
    "conjugated": lambda t: t.conj_physical().conj() if t.is_complex() else t.clone(),
    **{str(dtype): cast_to(dtype) for dtype in REALS},
}


def some(value: float, t: Tensor) -> Tensor:
    """Writes a value into every third element."""
    every_third = torch.arange(t.numel()).view(t.shape) % 3 == 0
    return t.masked_fill_(every_third, torch.tensor(value, dtype=torch.float64).to(t.dtype))


VALUES = {
    "zero": 0.0, "minus zero": -0.0, "NaN": math.nan, "inf": math.inf, "subnormal": 1e-41,
    "tiny": 1e-20, "two": 2.0, "huge": 1e20,
}  # fmt: skip


def write(value: float) -> Callable[[Tensor], object]:
    def write(t: Tensor) -> None:
        if t.is_floating_point() or t.is_complex() or math.isfinite(value):
            some(value, t.data)

    return write


IN_PLACE: dict[str, Callable[[Tensor], object]] = {
    **{name: write(value) for name, value in VALUES.items()},
    "written": lambda t: t.data.copy_(t.flip(0) if t.ndim else t),
    "set": lambda t: t.detach().set_(t.detach().clone()),
    "storage grown": lambda t: t.untyped_storage().resize_(t.untyped_storage().nbytes() + 64),
}


# Gradients, made from normal values of the shape and dtype of the parameter.


def kept(p: Tensor, g: Tensor) -> Tensor:
    fits = p.grad is not None and p.grad.shape == p.shape
    return p.grad if fits else g


def written(p: Tensor, g: Tensor) -> Tensor:
    old = kept(p, g)
    return old.copy_(g) if old.is_contiguous() else g


GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor | None]] = {
    "new": lambda p, g: g,
    "none": lambda p, g: None,
    "kept": kept,
    "written in place": written,
    "expanded": lambda p, g: g.reshape(-1)[:1].squeeze(0).expand(g.shape) if g.numel() else g,
    "zeros without memory": lambda p, g: torch._efficientzerotensor(g.shape, dtype=g.dtype),
    "of a subclass": lambda p, g: g.as_subclass(Marked),
    "the parameter": lambda p, g: p.detach(),
    **{name: lambda p, g, f=edit: f(g) for name, edit in TENSORS.items()},
    **{name: lambda p, g, x=value: some(x, g) for name, value in VALUES.items()},
    "all huge": lambda p, g: g * 1e20,
    "all tiny": lambda p, g: g * 1e-20,
}


def give_gradient(p: Tensor, name: str, seed: int) -> None:
    grad = GRADIENTS[name](p, randn(*p.shape, dtype=p.dtype, seed=seed))
    p.grad = None
    if grad is not None and grad.dtype != p.dtype:
        p.grad = torch.zeros_like(p)
        p.grad.data = grad
    else:
        p.grad = grad


# The options of a group, and values for each.

ABSENT = "absent"
OPTIONS = {
    "lr": [0.0, 0.1, 1e-3, torch.tensor(0.01), torch.tensor([0.02], dtype=torch.float64)],
    "betas": [(0.0, 0.0), (0.9, 0.999), [0.5, 0.9], (0.99, 0.0)],
    "eps": [0.0, 1e-8, 1e-3],
    "weight_decay": [0, 0.1, 10.0],
    "decoupled_weight_decay": [False, True],
    "maximize": [False, True, 1],
    "foreach": [None, True],
    "capturable": [False, True],
    "rho_threshold": [5.0, 4, 1e9, ABSENT],
    "degenerated_to_sgd": [True, False, ABSENT],
    "rectification": ["first_order", "exact", ABSENT],
    "decouple_lr": [False, True, ABSENT],
    "initial_lr": [0.1, 1e-3],
    "state_dtype": [None, torch.bfloat16, "bfloat16", "block8", "float32", torch.float16, ABSENT],
    "master_weights": [None, 24, 32],
    "stochastic_rounding": [False, True],
    "seed": [0, 5, 2**32 - 1, ABSENT],
    "of a tool": ["x"],
}
# Those that torch.optim.RAdam obeys, too.
THEIRS = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize")
# What torch.optim.RAdam lacks, and the values with which it does the same.
OURS = {
    "rho_threshold": 5.0, "degenerated_to_sgd": True, "rectification": "first_order",
    "decouple_lr": False, "state_dtype": None, "master_weights": None,
    "stochastic_rounding": False,
}  # fmt: skip
FORMATS = ("state_dtype", "master_weights", "stochastic_rounding")


def set_option(group: dict, name: str, value: object) -> None:
    if value is ABSENT:
        group.pop(name, None)
    elif name == "lr" and isinstance(group["lr"], Tensor) and isinstance(value, float):
        group["lr"].fill_(value)
    else:
        group[name] = copy.deepcopy(value)


# The state of one parameter, or of all. Nothing happens to a parameter that has none.


def edit_count(value: object) -> Callable:
    def edit(optimizer: RAdam, p: Tensor, own: dict, random: Random) -> None:
        own["step"] = copy.deepcopy(value)

    return edit


def reorder_keys(optimizer: RAdam, p: Tensor, own: dict, random: Random) -> None:
    items = list(own.items())
    random.shuffle(items)
    own.clear()
    own.update(items)


def copy_state(optimizer: RAdam, p: Tensor, own: dict, random: Random) -> None:
    optimizer.state[p] = {
        key: value.clone() if isinstance(value, Tensor) else value for key, value in own.items()
    }


def swap_states(optimizer: RAdam, p: Tensor, own: dict, random: Random) -> None:
    other = random.choice(params_of(optimizer))
    if other in optimizer.state and other.shape == p.shape and other.dtype == p.dtype:
        optimizer.state[p], optimizer.state[other] = optimizer.state[other], own


def moments_in_one_storage(optimizer: RAdam, p: Tensor, own: dict, random: Random) -> None:
    if all(isinstance(own.get(key), Tensor) for key in MOMENTS):
        together = torch.stack([own[key].contiguous() for key in MOMENTS])
        own["exp_avg"], own["exp_avg_sq"] = together.unbind()


def replace_by_floats(optimizer: RAdam, p: Tensor, own: dict, random: Random) -> None:
    """As of a checkpoint of torch's, or of a tool that knows no other moments."""
    for key in MOMENTS:
        own[key] = randn(*p.shape, dtype=p.dtype, seed=random.randrange(99)).abs()


STATES: dict[str, Callable[[RAdam, Tensor, dict, Random], object]] = {
    "deleted": lambda optimizer, p, own, random: optimizer.state.pop(p),
    "all deleted": lambda optimizer, p, own, random: optimizer.state.clear(),
    "emptied": lambda optimizer, p, own, random: own.clear(),
    "reordered": reorder_keys,
    "copied": copy_state,
    "swapped": swap_states,
    "moments in one storage": moments_in_one_storage,
    "moments of floats": replace_by_floats,
    "key of a tool": lambda optimizer, p, own, random: own.update(mine=torch.ones(2)),
    "no remainder": lambda optimizer, p, own, random: own.pop("param_remainder", None),
    "no exponents": lambda optimizer, p, own, random: own.pop("exp_avg_exponent", None),
    **{
        f"step {value!r}": edit_count(value)
        for value in (0, 7, 4.0, 2**24, torch.tensor(3.0), torch.tensor([5.0]), torch.tensor(6))
    },
    "step in float64": edit_count(torch.tensor(4.0, dtype=torch.float64)),
}


# The lists of parameters.


def make_param(random: Random) -> Parameter:
    dtype = random.choice([*REALS, torch.float32, torch.bfloat16, torch.bfloat16, torch.complex64])
    values = randn(*random.choice(SHAPES), dtype=dtype, seed=random.randrange(1000))
    placed = random.choice(["cloned", "cloned", "transposed", "every other", "within a buffer"])
    return Parameter(TENSORS[placed](values))


def add_group(optimizer: RAdam, p: Tensor, random: Random) -> None:
    if len(optimizer.param_groups) < 4:
        group = {name: random.choice(OPTIONS[name][:4]) for name in (*FORMATS, "weight_decay")}
        optimizer.add_param_group({"params": [make_param(random)], **group})


def home_of(optimizer: RAdam, p: Tensor) -> tuple[list, int]:
    """The list that has a parameter, and where."""
    for group in optimizer.param_groups:
        for i, param in enumerate(group["params"]):
            if param is p:
                return group["params"], i
    raise AssertionError("no such parameter")


def take_out(optimizer: RAdam, p: Tensor, random: Random) -> None:
    params, i = home_of(optimizer, p)
    if len(params_of(optimizer)) > 1:
        del params[i]
        if random.random() < 0.5:
            optimizer.state.pop(p, None)


def exchange(optimizer: RAdam, p: Tensor, random: Random) -> None:
    params, i = home_of(optimizer, p)
    params[i] = new = Parameter(p.detach().clone())
    own = optimizer.state.pop(p, None)
    if own is not None and random.random() < 0.5:
        optimizer.state[new] = own


def move(optimizer: RAdam, p: Tensor, random: Random) -> None:
    params, i = home_of(optimizer, p)
    random.choice(optimizer.param_groups)["params"].append(params.pop(i))


def swap_tensors(optimizer: RAdam, p: Tensor, random: Random) -> None:
    p.grad = None
    torch.utils.swap_tensors(p, Parameter(p.detach() * 2))


def reshape(optimizer: RAdam, p: Tensor, random: Random) -> None:
    """The moments no longer fit, unless they are reshaped, too."""
    p.grad = None
    p.data = p.data.reshape(-1)
    for key, value in list(optimizer.state.get(p, {}).items()):
        if random.random() < 0.9 and key in (*MOMENTS, "param_remainder"):
            optimizer.state[p][key] = value.reshape(-1)


GROUPS: dict[str, Callable[[RAdam, Tensor, Random], object]] = {
    "group added": add_group,
    "parameter taken out": take_out,
    "parameter exchanged": exchange,
    "parameter moved": move,
    "parameters reversed": lambda o, p, random: o.param_groups[0]["params"].reverse(),
    "groups reversed": lambda o, p, random: o.param_groups.reverse(),
    "new dicts": lambda o, p, random: o.param_groups.__setitem__(0, dict(o.param_groups[0])),
    "frozen or unfrozen": lambda o, p, random: p.requires_grad_(not p.requires_grad),
    "tensors swapped": swap_tensors,
    "reshaped": reshape,
}
