"""Optimizers that train nothing: one warning, at the third step."""

import copy
import pickle
import warnings

import pytest
import torch
from torch.nn import Parameter

from radam_kernels import RAdam
from tests.helpers import take_steps

WORDS = "no parameter has had a gradient in 3 steps: "


def steps_of(optimizer, count: int) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            optimizer.step()
    return caught


def test_parameters_that_the_model_has_no_more():
    optimizer = RAdam([Parameter(torch.ones(2))])
    assert not steps_of(optimizer, 2)
    [warning] = steps_of(optimizer, 1)
    assert WORDS + "they may not be the model's, because fully_shard()" in str(warning.message)
    assert warning.filename == __file__
    assert not steps_of(optimizer, 5)


def test_frozen_parameters():
    [warning] = steps_of(RAdam([torch.ones(2)]), 3)
    assert WORDS + "all are frozen" in str(warning.message)


def test_parameters_on_meta():
    [warning] = steps_of(RAdam([Parameter(torch.ones(2, device="meta"))]), 3)
    assert WORDS + "some are on the meta device" in str(warning.message)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_one_gradient_in_three_steps_is_enough(at):
    optimizer = RAdam([Parameter(torch.ones(2)), Parameter(torch.ones(3))])
    [_, p] = optimizer.param_groups[0]["params"]
    for step in range(1, 6):
        p.grad = torch.ones(3) if step == at else None
        assert not steps_of(optimizer, 1)


def test_a_group_that_lost_its_parameters():
    params = [Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = RAdam([{"params": []}, {"params": params[:1]}, {"params": params[1:]}])
    optimizer.param_groups[1]["params"] = []
    params[1].grad = torch.ones(2)
    [warning] = steps_of(optimizer, 3)
    assert "param_groups[1] had parameters and has none any more" in str(warning.message)


def test_parameters_that_moved_to_another_group():
    params = [Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = RAdam([{"params": params[:1]}, {"params": params[1:]}])
    optimizer.param_groups[1]["params"] += optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = []
    params[0].grad = torch.ones(2)
    assert not steps_of(optimizer, 3)


def test_the_warning_points_at_the_caller_below_a_scheduler():
    optimizer = RAdam([Parameter(torch.ones(2))])
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    [warning] = steps_of(optimizer, 3)
    assert warning.filename == __file__


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_is_watched_from_its_own_first_step(copied):
    optimizer = RAdam([Parameter(torch.ones(2))])
    take_steps(optimizer, 5)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = None
    made = copied(optimizer)
    assert not steps_of(made, 2)
    assert len(steps_of(made, 3)) == 1


def test_a_warning_made_an_error_comes_once_and_changes_nothing():
    params = [Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = RAdam([{"params": params[:1]}, {"params": params[1:]}])
    optimizer.param_groups[0]["params"] = []
    take_steps(optimizer, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="had parameters"):
            optimizer.step()
        assert optimizer.state[params[1]]["step"] == 2
        optimizer.step()
    assert optimizer.state[params[1]]["step"] == 3


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        optimizer = RAdam([p := Parameter(torch.ones(2))])
        p.grad = torch.ones(2)
        assert not steps_of(optimizer, 4)
