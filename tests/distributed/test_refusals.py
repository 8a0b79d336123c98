"""What one rank refuses, every rank refuses, with and without elements; and nothing is changed."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import Parameter
from torch.optim import Optimizer

from radam_kernels import RAdam
from radam_kernels.sharding import local
from tests.distributed.test_fsdp2 import FSDP2
from tests.distributed.training import Training, assert_same_locally
from tests.helpers import STATE, params_of, same_bits

tensor = pytest.importorskip("torch.distributed.tensor")

Fault = Callable[[Optimizer, Tensor], None]  # damages an optimizer, or the state of a parameter


def option(key: str, value: Any) -> Fault:
    return lambda optimizer, p: optimizer.param_groups[0].update({key: value})


def entry(key: str, make: Callable[[Tensor], Any]) -> Fault:
    return lambda optimizer, p: optimizer.state[p].update({key: make(p)})


def gradient(make: Callable[[Tensor], Tensor]) -> Fault:
    return lambda optimizer, p: setattr(p, "grad", make(p))


def full_ones(p: Tensor) -> Tensor:
    return torch.ones(p.shape, dtype=p.dtype)


def sharded_ones(p: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.distribute_tensor(full_ones(p), p.device_mesh, p.placements).to(dtype)


def on_another_mesh(p: Tensor) -> Tensor:
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()))
    return tensor.distribute_tensor(full_ones(p), mesh, [tensor.Replicate()] * 2)


def with_narrow_shards(p: Tensor) -> Tensor:
    """Local parts that copy_ would broadcast."""
    narrow = torch.ones(len(p.to_local()), 1, dtype=p.dtype)
    whole = {"shape": p.shape, "stride": p.stride()}
    return tensor.DTensor.from_local(narrow, p.device_mesh, p.placements, run_check=False, **whole)


def add_float8(optimizer: Optimizer, p: Tensor) -> None:
    added = Parameter(sharded_ones(p, torch.float8_e4m3fn), requires_grad=False)
    added.grad = sharded_ones(p, torch.float8_e4m3fn)
    optimizer.add_param_group({"params": [added]})


# Name: (fault, what every rank says).
FAULTS: dict[str, tuple[Fault, str]] = {
    "betas": (option("betas", (1.0, 0.999)), "ValueError: beta1: expected 0 <= beta1 < 1"),
    "eps": (option("eps", -1.0), "ValueError: eps: "),
    "state_dtype": (option("state_dtype", torch.int8), "ValueError: Invalid state_dtype"),
    "rectification": (option("rectification", "no"), "ValueError: rectification: expected one of"),
    "two learning rates": (option("lr", torch.ones(2)), "Error: only one element tensors"),
    "no exp_avg_sq": (
        lambda optimizer, p: optimizer.state[p].pop("exp_avg_sq"),
        "ValueError: state of param . of group 0 lacks",
    ),
    "shape of exp_avg": (
        entry("exp_avg", lambda p: torch.ones(3)),
        "ValueError: exp_avg of param . of group 0: expected shape",
    ),
    "dtype of exp_avg": (
        entry("exp_avg", lambda p: sharded_ones(p, torch.int32)),
        "ValueError: exp_avg of param . of group 0: can't keep moments",
    ),
    "shards of exp_avg": (
        entry("exp_avg", with_narrow_shards),
        "ValueError: exp_avg of param . of group 0: its local part has shape",
    ),
    "two steps": (entry("step", lambda p: torch.ones(2)), "ValueError: step of param . of group 0"),
    "negative step": (entry("step", lambda p: torch.tensor(-1.0)), "ValueError: step: expected"),
    "sparse gradient": (
        gradient(lambda p: full_ones(p).to_sparse()),
        "RuntimeError: RAdam does not support sparse gradients",
    ),
    "plain gradient": (gradient(full_ones), "ValueError: .* expected a DTensor .* a plain tensor"),
    "mesh of the gradient": (gradient(on_another_mesh), "ValueError: .* expected a DTensor on"),
    "shards of the gradient": (
        gradient(with_narrow_shards),
        "ValueError: grad of param . of group 0: its local part has shape",
    ),
    "float8": (add_float8, "ValueError: param 0 of group 1: expected float32"),
    "given twice": (
        lambda optimizer, p: optimizer.param_groups[0]["params"].append(p),
        "ValueError: param . of group 0 is given twice",
    ),
}


Contents = tuple[list[dict], dict[Tensor, dict], list[tuple[Tensor, Tensor]]]


def contents(optimizer: Optimizer) -> Contents:
    """Groups, states and gradients: new containers with the same objects."""
    groups = [{**group, "params": [*group["params"]]} for group in optimizer.param_groups]
    states = {p: dict(state) for p, state in optimizer.state.items()}
    return groups, states, [(p, p.grad) for p in params_of(optimizer)]


def restore(optimizer: Optimizer, earlier: Contents) -> None:
    groups, states, grads = earlier
    optimizer.param_groups[:] = groups
    optimizer.state.clear()
    optimizer.state.update(states)
    for p, grad in grads:
        p.grad = grad


def identities(optimizer: Optimizer) -> list[dict[str, int]]:
    """The objects in groups and states."""
    groups, states, _ = contents(optimizer)
    objects = [{k: id(v) for k, v in state.items()} for state in states.values()]
    for group in groups:
        params = [id(p) for p in group.pop("params")]
        objects.append({k: id(v) for k, v in group.items()} | dict(enumerate(params)))
    return objects


def values(optimizer: Optimizer) -> list[Tensor]:
    """Copies of this rank's parts of parameters and states."""
    states = [state[key] for state in optimizer.state.values() for key in STATE]
    return [local(x).detach().clone() for x in params_of(optimizer) + states]


def refusals_of_all(optimizer: Optimizer) -> list[str]:
    """What each rank says to a step."""
    refusal = "no refusal"
    try:
        optimizer.step()
    except Exception as error:
        refusal = f"{type(error).__name__}: {error}"
    refusals = [""] * dist.get_world_size()
    dist.all_gather_object(refusals, refusal)
    return refusals


@pytest.mark.distributed(2, 4)
@pytest.mark.parametrize("index", [0, 8])  # with 5 rows and 1 row
def test_every_rank_refuses(index):
    how, batches = Training(), itertools.count()
    models = [FSDP2(nested=False).wrap(how.net()) for _ in range(2)]
    optimizer, healthy = (how.optimizer(RAdam, model) for model in models)

    def backward() -> None:
        rows = how.batch(next(batches))
        for model in models:
            model.zero_grad()
            how.loss(model(rows)).backward()

    backward()
    optimizer.step()
    healthy.step()
    damaged = params_of(optimizer)[index]
    has_elements = damaged.to_local().numel() > 0
    assert has_elements == (dist.get_rank() < (3 if index == 0 else 1))
    for name, (fault, expected) in FAULTS.items():
        backward()
        for each in (optimizer, healthy):
            del each.state[params_of(each)[3]]  # made in the step, and unmade if that is refused
        before, before_values = contents(optimizer), values(optimizer)
        fault(optimizer, damaged)
        objects = identities(optimizer)
        refusals = refusals_of_all(optimizer)
        assert all(re.search(expected, said) for said in refusals), (name, refusals)
        assert identities(optimizer) == objects, name
        restore(optimizer, before)
        assert all(map(same_bits, values(optimizer), before_values)), name
        optimizer.step()
        healthy.step()
        assert_same_locally(optimizer, healthy, rtol=0, atol=0)


@pytest.mark.distributed(2)
def test_every_rank_refuses_to_flatten_shards():
    for p in FSDP2().wrap(Training().net()).parameters():
        with pytest.raises(ValueError, match="sharded"):
            RAdam([p], flatten=True)
