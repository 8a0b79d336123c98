"""decouple_lr: weight decay that depends on lr / initial_lr and not on lr."""

import copy
import math

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler

from radam_kernels import RAdam
from tests.helpers import TorchRAdam, randn, same_bits

FULLY = dict(decoupled_weight_decay=True, decouple_lr=True)


def decayed(optimizer: RAdam, steps: int = 1, scheduler=None) -> list[float]:
    """What each step multiplies a parameter by, if its gradient is zero."""
    [p] = optimizer.param_groups[0]["params"]
    factors = []
    for _ in range(steps):
        p.data.fill_(1.0)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        factors.append(p.item())
        if scheduler:
            scheduler.step()
    return factors


def one(dtype: torch.dtype = torch.float64) -> list[Parameter]:
    return [Parameter(torch.ones(1, dtype=dtype))]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_decay_follows_the_formula(as_tensor, capturable, backend):
    lr = torch.tensor(0.1, dtype=torch.float64) if as_tensor else 0.1
    optimizer = RAdam(
        one(), lr=lr, weight_decay=0.01, capturable=capturable, backend=backend, **FULLY
    )
    assert optimizer.param_groups[0]["initial_lr"] == 0.1
    for now in (0.1, 0.05, 0.2, 0.0):
        if as_tensor:
            lr.fill_(now)
        else:
            optimizer.param_groups[0]["lr"] = now
        assert decayed(optimizer) == [pytest.approx(1 - 0.01 * now / 0.1, rel=1e-15)]


def test_without_a_schedule_the_decay_does_not_depend_on_lr():
    for lr in (1e-6, 1e-3, 10.0):
        optimizer = RAdam(one(), lr=lr, weight_decay=1e-4, **FULLY)
        assert decayed(optimizer, 3) == [1 - 1e-4] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_equals_the_weight_decay_divided_by_initial_lr(dtype):
    results = []
    for options in (dict(weight_decay=0.02, **FULLY), dict(weight_decay=0.02 / 0.3)):
        param = Parameter(randn(50, dtype=dtype))
        optimizer = RAdam([param], lr=0.3, **{"decoupled_weight_decay": True, **options})
        for step in range(9):
            optimizer.param_groups[0]["lr"] *= 0.9
            param.grad = randn(50, dtype=dtype, seed=step)
            optimizer.step()
        results.append(param.detach())
    assert same_bits(*results)


def test_it_trains_as_optimi():
    optimi = pytest.importorskip("optimi", reason="pip install torch-optimi")
    lr, decay = 0.01, 1e-3
    ours, theirs = (Parameter(randn(40)) for _ in range(2))
    options = dict(lr=lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=decay)
    # optimi rectifies above rho_t = 5 as torch does, and adds eps after the bias correction.
    optimizers = (
        RAdam([ours], **options, **FULLY),
        optimi.RAdam([theirs], **options, decouple_lr=True, triton=False),
    )
    for step in range(30):
        for param, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(step / 10)) / 2
            param.grad = randn(40, seed=step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# Schedulers.


def test_a_warmup_from_zero_decays_by_its_factor():
    optimizer = RAdam(one(), lr=0.1, weight_decay=0.01, **FULLY)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda epoch: min(1.0, epoch / 4))
    expected = [1 - 0.01 * min(1.0, epoch / 4) for epoch in range(6)]
    assert decayed(optimizer, 6, scheduler) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_scheduler_and_the_optimizer_have_one_initial_lr(as_tensor):
    lr = torch.tensor(0.1) if as_tensor else 0.1
    optimizer = RAdam(one(), lr=lr, weight_decay=0.01, **FULLY)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 5)
    assert optimizer.param_groups[0]["initial_lr"] == float(lr) == float(scheduler.base_lrs[0])
    factors = decayed(optimizer, 5, scheduler)
    expected = [1 - 0.01 * (1 + math.cos(math.pi * t / 5)) / 2 for t in range(5)]
    assert factors == pytest.approx(expected, rel=1e-7)


def test_one_cycle_decays_in_units_of_its_own_initial_lr():
    optimizer = RAdam(one(), lr=0.1, weight_decay=0.01, **FULLY)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, div_factor=25)
    factors = decayed(optimizer, 9, scheduler)
    assert factors[0] == pytest.approx(1 - 0.01, rel=1e-12)
    assert min(factors) == pytest.approx(1 - 0.01 * 25, rel=1e-12)


# Groups and checkpoints.


def test_each_group_has_its_own_initial_lr():
    params = one() + one() + one()
    groups = [dict(params=params[:1]), dict(params=params[1:2], lr=0.5)]
    optimizer = RAdam(groups, lr=0.1, weight_decay=0.01, **FULLY)
    optimizer.add_param_group(dict(params=params[2:], lr=torch.tensor(0.25), initial_lr=2.0))
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.1, 0.5, 2.0]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert [param.item() for param in params] == [0.99, 0.99, 1 - 0.01 / 2.0 * 0.25]


def test_one_group_may_have_it_alone():
    params = one() + one()
    groups = [dict(params=params[:1]), dict(params=params[1:], decouple_lr=True)]
    optimizer = RAdam(groups, lr=0.1, weight_decay=0.01, decoupled_weight_decay=True)
    assert "initial_lr" not in optimizer.param_groups[0]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert [param.item() for param in params] == [1 - 0.1 * 0.01, 0.99]
    assert [RAdam.hyperparameters(g)["decouple_lr"] for g in optimizer.param_groups] == [
        False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("route", ["load_state_dict", "deepcopy"])
def test_a_checkpoint_keeps_it(route):
    optimizer = RAdam(one(), lr=0.1, weight_decay=0.01, **FULLY)
    optimizer.param_groups[0]["lr"] = 0.02
    decayed(optimizer)
    if route == "deepcopy":
        resumed = copy.deepcopy(optimizer)
    else:
        resumed = RAdam(one(), lr=7.0, **FULLY)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    group = resumed.param_groups[0]
    assert (group["decouple_lr"], group["initial_lr"], group["lr"]) == (True, 0.1, 0.02)
    assert decayed(resumed) == decayed(optimizer) == [1 - 0.01 / 0.1 * 0.02]


@pytest.mark.parametrize("cls", [TorchRAdam, RAdam])
def test_a_checkpoint_without_it_sets_it_back(cls):
    options = dict(lr=0.1, weight_decay=0.01, decoupled_weight_decay=True)
    saved = cls(one(), **options).state_dict()
    optimizer = RAdam(one(), **options, decouple_lr=True)
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert group["decouple_lr"] is False
    assert decayed(optimizer) == [1 - 0.1 * 0.01]
    group["decouple_lr"] = True
    with pytest.raises(ValueError, match=r"initial_lr: expected a number > 0, got None"):
        decayed(optimizer)
    group["initial_lr"] = 0.1
    assert decayed(optimizer) == [0.99]


def test_torch_loads_such_a_checkpoint():
    ours = RAdam(one(), lr=0.1, weight_decay=0.01, **FULLY)
    decayed(ours)
    torchs = TorchRAdam(one(), lr=0.1)
    torchs.load_state_dict(ours.state_dict())
    assert decayed(torchs) == [1 - 0.1 * 0.01]  # coupled to lr: torch does not know the option


# Refusals.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lr=0.1, decouple_lr=True), "needs decoupled_weight_decay=True"),
        (dict(lr=0.0, **FULLY), "initial_lr: expected a number > 0, got 0.0"),
        (dict(lr=torch.tensor(0.0), **FULLY), "initial_lr: expected a number > 0"),
    ],
    ids=str,
)
def test_what_the_constructor_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        RAdam(one(), **options)
    optimizer = RAdam(one())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(dict(params=one(), **options))
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("bad", [0.0, -0.1, math.nan])
def test_a_step_refuses_a_group_edited_to_nonsense(bad, capturable, backend):
    optimizer = RAdam(one(), capturable=capturable, backend=backend, **FULLY)
    [group] = optimizer.param_groups
    group["initial_lr"] = bad
    with pytest.raises(ValueError, match=r"initial_lr: expected a number > 0, got"):
        decayed(optimizer)
    group["initial_lr"] = 0.1
    group["decoupled_weight_decay"] = False
    with pytest.raises(ValueError, match="needs decoupled_weight_decay=True"):
        decayed(optimizer)
    assert group["params"][0].item() == 1.0
