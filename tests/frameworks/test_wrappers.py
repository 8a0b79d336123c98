"""What wraps an optimizer or averages its weights: EMA, Lookahead, SAM, schedule-free."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from radam_kernels import RAdam
from tests.frameworks.training import Make, assert_trains_as_with_torch, make_with, own_options
from tests.helpers import TorchRAdam, assert_same, batch, network, saved, train

STEPS = 14
NEEDED = "pip install 'radam_kernels[frameworks]'"


def double_network() -> nn.Module:
    return network(dtype=torch.float64)


# Averages of the weights.


def average_of_torch(model: nn.Module) -> nn.Module:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


def average_of_ema_pytorch(model: nn.Module) -> nn.Module:
    ema_pytorch = pytest.importorskip("ema_pytorch", reason=NEEDED)
    return ema_pytorch.EMA(
        model, beta=0.9, update_after_step=2, update_every=1, include_online_model=False
    )


@own_options
@pytest.mark.parametrize("average_of", [average_of_torch, average_of_ema_pytorch])
def test_an_average_of_the_weights_is_torchs(average_of, options):
    def run(make: Make):
        model = double_network()
        optimizer = make_with(options, make, model.parameters(), lr=0.05)
        average = average_of(model)
        for step in range(STEPS):
            train(model, optimizer, 1, first=step)
            if average_of is average_of_torch:
                average.update_parameters(model)
            else:
                average.update()
        shadow = average.module if average_of is average_of_torch else average.ema_model
        assert not torch.equal(shadow[0].weight, model[0].weight)
        return nn.ModuleList([model, shadow]), optimizer

    assert_trains_as_with_torch(run)


# pytorch_optimizer's wrappers.


@own_options
@pytest.mark.parametrize("pullback", ["none", "reset"])
def test_lookahead_trains_as_with_torch(pullback, options):
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason=NEEDED)

    def run(make: Make):
        model = double_network()
        optimizer = make_with(options, make, model.parameters(), lr=0.05)
        wrapper = pytorch_optimizer.Lookahead(optimizer, k=3, pullback_momentum=pullback)
        train(model, wrapper, STEPS)
        return model, optimizer

    assert_trains_as_with_torch(run)


def test_lookahead_is_resumed_to_the_bit():
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason=NEEDED)
    model = network()
    optimizer = RAdam(model.parameters(), lr=0.05)
    wrapper = pytorch_optimizer.Lookahead(optimizer, k=3)
    train(model, wrapper, 7)
    resumed = copy.deepcopy(model)
    other = RAdam(resumed.parameters(), lr=0.05)
    other_wrapper = pytorch_optimizer.Lookahead(other, k=3)
    other_wrapper.load_state_dict(saved(wrapper.state_dict()))
    train(model, wrapper, 7, first=7)
    train(resumed, other_wrapper, 7, first=7)
    assert_same(other, optimizer)


@own_options
@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_trains_as_with_torch(adaptive, options):
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason=NEEDED)

    def run(make: Make):
        model = double_network()
        own = options if make is RAdam else {}
        wrapper = pytorch_optimizer.SAM(
            model.parameters(), make, lr=0.05, rho=0.1, adaptive=adaptive, **own
        )
        for step in range(STEPS):

            def closure(step=step):
                wrapper.zero_grad()
                loss = model(batch(step, torch.float64)).square().mean()
                loss.backward()
                return loss

            closure()
            wrapper.step(closure)
        return model, wrapper.base_optimizer

    assert_trains_as_with_torch(run)


# schedulefree's wrapper.


@own_options
@pytest.mark.parametrize("flavour", ["ScheduleFreeWrapper", "ScheduleFreeWrapperReference"])
def test_schedule_free_trains_as_with_torch(flavour, options):
    schedulefree = pytest.importorskip("schedulefree", reason=NEEDED)

    def run(make: Make):
        model = double_network()
        optimizer = make_with(options, make, model.parameters(), lr=0.05)
        if make is TorchRAdam:
            # The wrapper puts its own state first, and torch's takes a state with any key as its
            # own: KeyError 'exp_avg' without these.
            for p in model.parameters():
                zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": torch.tensor(0.0), **zeros}
        wrapper = getattr(schedulefree, flavour)(optimizer, weight_decay_at_y=0.1)
        wrapper.train()
        train(model, wrapper, STEPS)
        wrapper.eval()
        return model, optimizer

    assert_trains_as_with_torch(run)


def test_schedule_free_is_resumed_to_the_bit():
    schedulefree = pytest.importorskip("schedulefree", reason=NEEDED)
    model = network()
    optimizer = RAdam(model.parameters(), lr=0.05)
    wrapper = schedulefree.ScheduleFreeWrapper(optimizer)
    wrapper.train()
    train(model, wrapper, 7)
    wrapper.eval()  # the state has no mode, and a new wrapper is not in training mode
    resumed = copy.deepcopy(model)
    other = RAdam(resumed.parameters(), lr=0.05)
    other_wrapper = schedulefree.ScheduleFreeWrapper(other)
    other_wrapper.load_state_dict(saved(wrapper.state_dict()))
    for net, one in ((model, wrapper), (resumed, other_wrapper)):
        one.train()
        train(net, one, 7, first=7)
    assert_same(other, optimizer)
