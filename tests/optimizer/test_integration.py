"""What training loops put around an optimizer: AMP, autograd, modules, threads."""

import copy
import math
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from radam_kernels import RAdam
from tests.helpers import (
    STEPS,
    TorchRAdam,
    assert_same_parameters,
    batch,
    network,
    randn,
    take_steps,
    train,
)

# Mixed precision.


def test_grad_scaler_skips_steps_with_infinite_gradients():
    model, plain = network(), network()
    ours, torchs = RAdam(model.parameters(), lr=0.01), TorchRAdam(plain.parameters(), lr=0.01)
    runs = [(m, o, torch.amp.GradScaler("cpu", 64.0)) for m, o in ((model, ours), (plain, torchs))]
    for step in range(12):
        for net, optimizer, scaler in runs:
            optimizer.zero_grad()
            scaler.scale(net(batch(step)).square().mean()).backward()
            if step in (0, 4, 5, 9):
                net[0].weight.grad[0, 0] = (math.inf, math.nan)[step % 2]
            before = [p.detach().clone() for p in net.parameters()]
            scaler.step(optimizer)
            scaler.update()
            unmoved = [torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True)]
            assert unmoved == [step in (0, 4, 5, 9)] * 4
    assert ours.state[model[0].weight]["step"] == 8
    assert runs[0][2].get_scale() == runs[1][2].get_scale() == 4.0
    assert_same_parameters(model, plain, rtol=1e-5, atol=1e-6)


def test_autocast_with_unscaling_and_clipping():
    def run(cls):
        model = network()
        optimizer, scaler = cls(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu", 8.0)
        for step in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(batch(step)).float().square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        return model

    # bfloat16 activations: a difference in the last bit of a weight may be one in theirs.
    assert_same_parameters(run(RAdam), run(TorchRAdam), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_gradient_clipping(clip):
    def run(cls):
        model = network(dtype=torch.float64)
        optimizer = cls(model.parameters(), lr=0.1)
        for step in range(STEPS):
            optimizer.zero_grad()
            model(batch(step, torch.float64)).square().sum().backward()
            if clip == "norm":
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            else:
                nn.utils.clip_grad_value_(model.parameters(), 0.5)
            optimizer.step()
        return model

    assert_same_parameters(run(RAdam), run(TorchRAdam), rtol=1e-9, atol=1e-11)


# Autograd.


def test_a_stale_graph_raises_instead_of_giving_wrong_gradients():
    p = Parameter(torch.ones(3))
    optimizer = RAdam([p])
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    version = p._version
    optimizer.step()
    assert p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3, dtype=torch.complex64),
        lambda: torch.ones(3, 4)[:, ::2],
        lambda: torch.ones(3, dtype=torch.bfloat16),
    ],
    ids=["complex", "strided", "bfloat16"],
)
def test_autograd_notices_every_kind_of_write(make):
    p, untouched = Parameter(make()), Parameter(torch.ones(2))
    optimizer = RAdam([p, untouched])
    p.grad = torch.ones_like(p)
    for _ in range(7):
        versions = p._version, untouched._version
        optimizer.step()
        assert p._version > versions[0]
        assert untouched._version == versions[1]


def test_a_refused_step_bumps_no_version():
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = RAdam([p])
    optimizer.param_groups[0]["eps"] = -1.0
    version = p._version
    with pytest.raises(ValueError, match="eps"):
        optimizer.step()
    assert p._version == version


def test_steps_leave_no_graph_behind():
    model = network()
    optimizer = RAdam(model.parameters())
    train(model, optimizer)
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())
    assert not any(t.requires_grad for s in optimizer.state.values() for t in s.values())


def test_a_gradient_with_a_graph_of_its_own():
    """As backward(create_graph=True) leaves it."""
    p = Parameter(torch.ones(3))
    optimizer = RAdam([p], lr=0.1)
    with pytest.warns(UserWarning, match="create_graph"):
        (p**2).sum().backward(create_graph=True)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.8))
    assert not optimizer.state[p]["exp_avg"].requires_grad


# Models.


@pytest.mark.parametrize("flatten", [False, True], ids=["", "flatten"])
def test_tied_weights_are_stepped_once(flatten):
    def run(cls, **options):
        torch.manual_seed(0)
        embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        head.weight = embedding.weight
        model = nn.Sequential(embedding, head).double()
        optimizer = cls(model.parameters(), lr=0.1, **options)
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(torch.arange(7)).square().mean().backward()
            optimizer.step()
        assert model[0].weight is model[1].weight
        assert len(optimizer.state) == 1
        return model

    ours = run(RAdam, flatten=flatten)
    assert_same_parameters(ours, run(TorchRAdam), rtol=1e-10, atol=1e-12)


def test_modules_that_move_between_dtypes():
    model = network()
    optimizer = RAdam(model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    optimizer.zero_grad()
    model.double()
    train(model, optimizer, 3, first=3)
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.float64
    optimizer.zero_grad()
    model.bfloat16()
    train(model, optimizer, 3, first=6)
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.float32
    assert optimizer.state[model[0].weight]["step"] == 9


def test_averaged_models_and_swa():
    def run(cls):
        model = network(dtype=torch.float64)
        optimizer = cls(model.parameters(), lr=0.1)
        averaged = torch.optim.swa_utils.AveragedModel(model)
        ema = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        scheduler = torch.optim.swa_utils.SWALR(optimizer, 0.05, anneal_epochs=4)
        for step in range(STEPS):
            train(model, optimizer, 1, first=step)
            averaged.update_parameters(model)
            ema.update_parameters(model)
            scheduler.step()
        return nn.ModuleList([model, averaged.module, ema.module])

    assert_same_parameters(run(RAdam), run(TorchRAdam), rtol=1e-9, atol=1e-11)


def test_functional_calls_and_views_of_parameters_see_the_step():
    model = network()
    optimizer = RAdam(model.parameters(), lr=0.1)
    flat = torch.nn.utils.parameters_to_vector(model.parameters())
    weight = model[0].weight.detach()
    train(model, optimizer, 1)
    assert torch.equal(weight, model[0].weight)
    assert not torch.equal(flat, torch.nn.utils.parameters_to_vector(model.parameters()))
    torch.nn.utils.vector_to_parameters(flat.detach(), model.parameters())  # re-points p.data
    train(model, optimizer, 1)
    assert optimizer.state[model[0].weight]["step"] == 2


def test_parametrized_modules():
    def run(cls):
        torch.manual_seed(0)
        model = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)).double()
        train(model, cls(model.parameters(), lr=0.1))
        return model

    assert_same_parameters(run(RAdam), run(TorchRAdam), rtol=1e-9, atol=1e-11)


def test_stepping_within_backward():
    """One optimizer a parameter, stepped as soon as its gradient is there, which is then freed."""
    model, expected = network(dtype=torch.float64), network(dtype=torch.float64)
    optimizers = {p: RAdam([p], lr=0.1) for p in model.parameters()}

    def hook(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    for step in range(STEPS):
        model(batch(step, torch.float64)).square().mean().backward()
        assert all(p.grad is None for p in model.parameters())
    train(expected, RAdam(expected.parameters(), lr=0.1))
    assert_same_parameters(model, expected, rtol=0, atol=0)


def test_gradient_accumulation():
    model = network(dtype=torch.float64)
    expected = copy.deepcopy(model)
    for net, optimizer in (
        (model, RAdam(model.parameters(), lr=0.1)),
        (expected, TorchRAdam(expected.parameters(), lr=0.1)),
    ):
        for step in range(4 * STEPS):
            net(batch(step, torch.float64)).square().mean().backward()
            if step % 4 == 3:
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
    assert_same_parameters(model, expected, rtol=1e-9, atol=1e-11)


# The class itself.


def test_named_parameters():
    model = network()
    optimizer = RAdam(model.named_parameters(), lr=0.01)
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    train(model, optimizer)
    assert len(optimizer.state) == 4


def test_a_subclass_may_override_step_and_add_options():
    class Warm(RAdam):
        def __init__(self, params, warmup=4, **options):
            super().__init__(params, **options)
            self.warmup = warmup

        def step(self, closure=None):
            for group in self.param_groups:
                group["lr"] = min(1.0, (self.calls() + 1) / self.warmup)
            return super().step(closure)

        def calls(self):
            return max((s["step"].item() for s in self.state.values()), default=0)

    p = Parameter(torch.zeros(2))
    optimizer = Warm([p], warmup=2)
    p.grad = torch.ones(2)
    optimizer.step()
    assert (p == -0.5).all()
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((2,), -1.5))
    assert isinstance(copy.deepcopy(optimizer), Warm)


def test_the_profiler_shows_the_step_under_its_name():
    model = network()
    optimizer = RAdam(model.parameters())
    train(model, optimizer, 1)
    with torch.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#RAdam.step", "Optimizer.zero_grad#RAdam.zero_grad"} <= names


def test_float64_as_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        model, expected = network(dtype=torch.float64), network(dtype=torch.float64)
        optimizer = RAdam(model.parameters(), lr=0.1)
        train(model, optimizer)
        train(expected, TorchRAdam(expected.parameters(), lr=0.1))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_parameters(model, expected, rtol=1e-10, atol=1e-12)
    count = optimizer.state[model[0].weight]["step"]
    assert (count.dtype, count.item()) == (torch.float64, STEPS)


def test_optimizers_step_in_several_threads_at_once():
    def problem(seed):
        params = [
            Parameter(torch.randn(n, generator=torch.Generator().manual_seed(seed + n)))
            for n in (3, 1000, 40_000)
        ]
        return params, RAdam(params, lr=0.1)

    def run(params, optimizer):
        for step in range(30):
            for p in params:
                p.grad = torch.full_like(p, 1.0 / (step + 1))
            optimizer.step()

    alone = [problem(seed) for seed in range(4)]
    together = [problem(seed) for seed in range(4)]
    for pair in alone:
        run(*pair)
    threads = [threading.Thread(target=run, args=pair) for pair in together]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (params, _), (expected, _) in zip(together, alone, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(params, expected, strict=True))


def test_the_number_of_threads_does_not_change_a_bit():
    def run(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        optimizer = RAdam([p := Parameter(randn(100_003))], lr=0.1)
        take_steps(optimizer, 7)
        return p.detach()

    usual = torch.get_num_threads()
    try:
        one, *more = (run(threads) for threads in (1, 2, 3, 7))
    finally:
        torch.set_num_threads(usual)
    assert all(torch.equal(other, one) for other in more)
