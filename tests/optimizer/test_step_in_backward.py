"""step_in_backward(): the training of ordinary steps, without all gradients in memory."""

import copy
import gc
import io
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import lr_scheduler, swa_utils
from torch.utils.checkpoint import checkpoint

from radam_kernels import RAdam
from tests.helpers import (
    GPU,
    assert_same,
    batch,
    network,
    parameters,
    params_of,
    randn,
    saved,
    train,
)

OPTIONS = {
    "": {},
    "weight decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "maximize": {"maximize": True},
    "capturable": {"capturable": True},
    "flatten": {"flatten": True},
    "state_dtype": {"state_dtype": torch.bfloat16},
    "reference": {"backend": "reference"},
    "lr in a tensor": {"lr": torch.tensor(0.02)},
}


def pair(**options) -> tuple[nn.Module, RAdam, nn.Module, RAdam]:
    """Two equal networks and their optimizers; the second steps in backward."""
    options = {"lr": 0.02, **options}
    a, b = network(), network()
    ours, in_backward = RAdam(a.parameters(), **options), RAdam(b.parameters(), **options)
    in_backward.step_in_backward()
    return a, ours, b, in_backward


def backward(model: nn.Module, step: int = 0, **options) -> None:
    model(batch(step)).square().mean().backward(**options)


def in_backward(model: nn.Module, **options) -> RAdam:
    optimizer = RAdam(model.parameters(), **{"lr": 0.02, **options})
    optimizer.step_in_backward()
    return optimizer


def hooks_of(param: Tensor) -> int:
    return len(param._post_accumulate_grad_hooks or ())


def snapshot(optimizer: RAdam) -> RAdam:
    """A copy with copies of the parameters, which steps ordinarily."""
    made = copy.deepcopy(optimizer)
    made._in_backward.remove()
    return made


def has_gradients(optimizer: RAdam) -> list[bool]:
    return [p.grad is not None for p in params_of(optimizer)]


# The same training.


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_trains_as_ordinary_steps_do(options):
    a, ours, b, stepped = pair(**options)
    for step in range(9):
        train(a, ours, 1, first=step)
        before = b[0].weight.detach().clone()
        backward(b, step)
        assert not any(has_gradients(stepped))
        assert not torch.equal(b[0].weight, before)
        stepped.step()
    assert_same(ours, stepped)
    x, y = saved(ours.state_dict()), saved(stepped.state_dict())
    assert x["param_groups"] == y["param_groups"]
    assert x["state"].keys() == y["state"].keys()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("strides", ["as the parameter", "others", "not dense"])
def test_steps_every_dtype_and_layout(device, dtype, strides):
    def restride(param: Tensor) -> None:
        if strides == "others" and param.ndim == 2:
            param.grad = param.grad.mT.contiguous().mT
        elif strides == "not dense":
            param.grad = torch.stack([param.grad, param.grad], -1)[..., 0]

    made = []
    for _ in range(2):
        tensors = [p.detach().to(device) for p in parameters(dtype)]
        tensors.append(torch.stack([tensors[0], tensors[0]], -1)[:, 0])  # not dense
        made.append([Parameter(t) for t in tensors])
    a, b = made
    ours, stepped = RAdam(a, lr=0.1), RAdam(b, lr=0.1)
    for p in b:
        p.register_post_accumulate_grad_hook(restride)
    stepped.step_in_backward()
    for _ in range(7):
        for params, optimizer in ((a, ours), (b, stepped)):
            factors = [randn(*p.shape, dtype=dtype, seed=i).to(device) for i, p in enumerate(a)]
            pairs = zip(params, factors, strict=True)
            sum((p * f).sum().abs() for p, f in pairs).backward()
            if params is a:
                for p in a:
                    restride(p)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(ours, stepped)


def test_groups_keep_their_options_and_edits_are_seen():
    made = []
    for _ in range(2):
        model = network()
        groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}]
        made.append((model, RAdam(groups, weight_decay=0.1)))
    ours, stepped = (optimizer for _, optimizer in made)
    stepped.step_in_backward()
    for step in range(9):
        for model, optimizer in made:
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.param_groups[1]["betas"] = (0.5, 0.9 + step / 100)
            if step == 5:
                optimizer.state[model[0].weight]["exp_avg"] = torch.ones_like(model[0].weight)
            train(model, optimizer, 1, first=step)
    assert_same(ours, stepped)


def test_a_parameter_without_a_gradient_is_left_alone():
    unused = Parameter(torch.ones(3))
    model = network()
    optimizer = RAdam([unused, *model.parameters()])
    optimizer.step_in_backward()
    train(model, optimizer)
    assert unused not in optimizer.state
    assert (unused == 1).all()


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 1 / (n + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda n: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.1, anneal_epochs=3),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.filterwarnings("ignore:The epoch parameter")  # which SequentialLR of torch 2.6 uses
@pytest.mark.filterwarnings("error")
def test_schedulers(make):
    a, ours, b, stepped = pair()
    rates = []
    for model, optimizer in ((a, ours), (b, stepped)):
        scheduler = make(optimizer)
        rates.append([])
        for step in range(9):
            train(model, optimizer, 1, first=step)
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*((float(step),) if plateau else ()))
            rates[-1].append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1
    assert_same(ours, stepped)


# Weights that are used several times.


class Tied(nn.Module):
    """Two layers with one weight, each in a checkpoint if asked to."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.layer = network()[0]
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self._part(self._part(x)[:, :6])

    def _part(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.layer(x)
        x = x if x.requires_grad else x.clone().requires_grad_()
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [None, False], ids=["no checkpoint", "non-reentrant"])
def test_tied_weights_are_stepped_once_when_the_gradient_is_complete(reentrant):
    a, b = Tied(), Tied(reentrant)
    ours, stepped = RAdam(a.parameters(), lr=0.1), RAdam(b.parameters(), lr=0.1)
    stepped.step_in_backward()
    train(a, ours)
    train(b, stepped)
    assert_same(ours, stepped)
    assert stepped.state[b.layer.weight]["step"] == 9


def test_tied_weights_in_reentrant_checkpoints_are_refused():
    model = Tied(reentrant=True)
    optimizer = in_backward(model)
    with pytest.raises(RuntimeError, match=r"param \d of group 0: .*use_reentrant=False"):
        backward(model)
    assert {int(own["step"]) for own in optimizer.state.values()} == {1}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers(reentrant):
    a, ours, b, stepped = pair()

    def run(model: nn.Module, x: Tensor) -> Tensor:
        for layer in model:
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return x.square().mean()

    for step in range(7):
        for model, optimizer in ((a, ours), (b, stepped)):
            run(model, batch(step).requires_grad_()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(ours, stepped)


# A second gradient.


def test_a_second_gradient_before_step_is_refused_and_changes_nothing():
    a, ours, b, stepped = pair()
    train(a, ours, 1)
    backward(b)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"param 3 of group 0: .*accumulation.*checkpoint"):
            backward(b, 1)
        assert_same(ours, stepped)
        stepped.zero_grad()  # does not allow it
    stepped.step()
    train(a, ours, 3, first=1)
    train(b, stepped, 3, first=1)
    assert_same(ours, stepped)


def test_the_refusal_names_the_parameter():
    model = network()
    optimizer = RAdam(model.named_parameters())
    optimizer.step_in_backward()
    backward(model)
    with pytest.raises(RuntimeError, match=r'param 3 of group 0 \("2.bias"\)'):
        backward(model)


def test_step_refuses_a_gradient_of_a_stepped_parameter():
    model = network()
    other = Parameter(torch.ones(2))
    optimizer = RAdam([other, *model.parameters()])
    optimizer.step_in_backward()
    backward(model)
    before = snapshot(optimizer)
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    other.grad = torch.ones(2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"param 1 of group 0: .*DistributedDataParallel"):
            optimizer.step()
        assert_same(optimizer, before)
    model[0].weight.grad = None
    optimizer.step()
    assert optimizer.state[other]["step"] == 1


# Refused.


def test_create_graph_is_refused_and_changes_nothing():
    model = network()
    optimizer = in_backward(model)
    before = snapshot(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="create_graph"):
            backward(model, create_graph=True)
    assert_same(optimizer, before)
    assert not optimizer.state


def test_a_closure_is_refused_before_it_runs():
    model = network()
    optimizer = in_backward(model)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(lambda: pytest.fail("was called"))


def test_clipping_is_refused_and_earlier_clipping_is_dropped():
    a, ours, b, stepped = pair()
    handle = stepped._in_backward
    with pytest.raises(RuntimeError, match="clip_grad_norm_"):
        stepped.clip_grad_norm_(1.0)
    handle.remove()
    backward(b)
    stepped.clip_grad_norm_(1e-3)
    stepped.step_in_backward()
    stepped.step()
    stepped.zero_grad()
    train(a, ours, 3)
    train(b, stepped, 2, first=1)
    assert_same(ours, stepped)


def test_switching_on_twice_is_refused():
    model = network()
    optimizer = in_backward(model)
    with pytest.raises(RuntimeError, match="is on already"):
        optimizer.step_in_backward()
    assert hooks_of(model[0].weight) == 1


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize("when", ["backward", "step"])
def test_values_of_a_grad_scaler_are_refused(name, when):
    model = network()
    optimizer = in_backward(model, capturable=True)
    backward(model)
    if when == "backward":
        optimizer.step()
    before = snapshot(optimizer)
    setattr(optimizer, name, torch.ones(1))
    with pytest.raises(RuntimeError, match="GradScaler"):
        backward(model) if when == "backward" else optimizer.step()
    assert_same(optimizer, before)
    if when == "step":
        assert not hasattr(optimizer, name)


def test_parameters_of_another_optimizer_are_refused_while_it_steps_them():
    model = network()
    first = RAdam(model.parameters())
    handle = first.step_in_backward()
    second = RAdam([Parameter(torch.ones(1)), model[2].bias])
    with pytest.raises(RuntimeError, match=r"param 1 of group 0 is stepped .* another optimizer"):
        second.step_in_backward()
    assert second._in_backward is None
    assert hooks_of(params_of(second)[0]) == 0
    handle.remove()
    second.step_in_backward()


def test_parameters_that_share_memory_are_refused():
    memory = torch.ones(6)
    optimizer = RAdam([Parameter(memory[:4]), Parameter(memory[3:])])
    with pytest.raises(ValueError, match="param 0 of group 0 shares memory with param 1"):
        optimizer.step_in_backward()
    assert not any(hooks_of(p) for p in params_of(optimizer))


def test_flat_parameters_of_fsdp1_are_refused():
    model = network()
    model[0].bias._fsdp_flattened = True
    with pytest.raises(RuntimeError, match=r"param 1 of group 0 belongs to .*FSDP1"):
        in_backward(model)


# Copies and checkpoints.


def pickled(made: object) -> object:
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_steps_its_own_parameters(duplicate):
    a, ours, b, stepped = pair()
    train(a, ours, 3)
    train(b, stepped, 3)
    model, optimizer, handle = duplicate((b, stepped, stepped._in_backward))
    assert handle is optimizer._in_backward
    train(model, optimizer, 3, first=3)
    assert not any(has_gradients(optimizer))
    assert_same(stepped, ours)  # untouched
    train(a, ours, 3, first=3)
    assert_same(optimizer, ours)
    train(b, stepped, 3, first=3)
    assert_same(stepped, ours)
    handle.remove()
    train(model, optimizer, 1)
    assert all(has_gradients(optimizer))


def test_a_copy_of_an_ordinary_optimizer_has_no_hooks():
    optimizer = copy.deepcopy(RAdam(network().parameters()))
    assert optimizer._in_backward is None
    assert hooks_of(params_of(optimizer)[0]) == 0


def test_resumes_from_a_checkpoint():
    a, ours, b, stepped = pair()
    train(a, ours, 3)
    train(b, stepped, 3)
    checkpoint = saved(stepped.state_dict())
    model = copy.deepcopy(b)
    resumed = in_backward(model, lr=1.0)
    for _ in range(2):
        resumed.load_state_dict(checkpoint)
    assert [hooks_of(p) for p in model.parameters()] == [1] * 4
    train(a, ours, 5, first=3)
    train(model, resumed, 5, first=3)
    assert_same(ours, resumed)


def test_saving_between_backward_and_step():
    a, ours, b, stepped = pair()
    train(a, ours, 1)
    backward(b)
    x, y = saved(ours.state_dict()), saved(stepped.state_dict())
    torch.testing.assert_close(x["state"], y["state"], rtol=0, atol=0)


# Parameters that come later.


def test_an_added_group_is_stepped_in_backward():
    model = network()
    optimizer = RAdam(model[0].parameters())
    optimizer.step_in_backward()
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.1})
    backward(model)
    assert not any(has_gradients(optimizer))
    assert len(optimizer.state) == 4


def test_an_added_group_that_is_refused_is_not_added():
    model = network()
    optimizer = RAdam(model[0].parameters())
    optimizer.step_in_backward()
    flat = Parameter(model[0].weight.data.view(-1))
    with pytest.raises(ValueError, match="shares memory"):
        optimizer.add_param_group({"params": [flat]})
    assert len(optimizer.param_groups) == 1
    assert hooks_of(flat) == 0


def test_an_unfrozen_parameter_is_stepped_by_step_and_then_in_backward():
    a, ours, b, stepped = pair()
    b[0].weight.requires_grad_(False)
    stepped._in_backward.remove()
    stepped.step_in_backward()
    b[0].weight.requires_grad_(True)
    for step in range(5):
        train(a, ours, 1, first=step)
        backward(b, step)
        assert has_gradients(stepped) == [step == 0, False, False, False]
        stepped.step()
        stepped.zero_grad()
    assert_same(ours, stepped)


def test_a_tensor_that_is_no_leaf_is_stepped_by_step():
    leaf = Parameter(torch.ones(3))
    with torch.enable_grad():
        grown = leaf * 2
    grown.retain_grad()
    optimizer = RAdam([leaf, grown], lr=0.1)
    optimizer.step_in_backward()
    grown.sum().backward()
    assert has_gradients(optimizer) == [False, True]
    optimizer.step()
    assert optimizer.state[grown]["step"] == optimizer.state[leaf]["step"] == 1


def clear_hooks(param: Tensor) -> None:
    param._post_accumulate_grad_hooks.clear()


def swap(param: Tensor) -> None:
    torch.utils.swap_tensors(param, Parameter(param.detach().clone()))


@pytest.mark.parametrize("lose", [clear_hooks, swap])
def test_a_parameter_that_lost_its_hook_is_stepped_by_step_and_then_in_backward(lose):
    a, ours, b, stepped = pair()
    for step in range(7):
        train(a, ours, 1, first=step)
        if step == 3:
            lose(b[0].weight)
        backward(b, step)
        assert has_gradients(stepped) == [step == 3, False, False, False]
        stepped.step()
        stepped.zero_grad()
    assert_same(ours, stepped)


def test_a_parameter_swapped_after_remove_is_hooked_anew():
    param = Parameter(torch.ones(3))
    optimizer = RAdam([param])
    optimizer.step_in_backward().remove()
    swap(param)
    optimizer.step_in_backward()
    param.sum().backward()
    assert param.grad is None
    assert optimizer.state[param]["step"] == 1


def test_a_parameter_taken_out_of_its_group_keeps_its_gradient():
    model = network()
    optimizer = in_backward(model)
    bias = optimizer.param_groups[0]["params"].pop(1)
    before = bias.detach().clone()
    backward(model)
    assert bias.grad is not None
    assert torch.equal(bias, before)
    assert not any(has_gradients(optimizer))
    assert len(optimizer.state) == 3


def test_a_parameter_moved_to_another_group_takes_its_options():
    model = network()
    optimizer = in_backward(model)
    optimizer.add_param_group({"params": [Parameter(torch.ones(1))], "lr": 0.0})
    bias = optimizer.param_groups[0]["params"].pop(1)
    optimizer.param_groups[1]["params"].append(bias)
    before = bias.detach().clone()
    backward(model)
    assert bias.grad is None
    assert torch.equal(bias, before)
    assert optimizer.state[bias]["step"] == 1


# The end.


def test_a_removed_handle_leaves_ordinary_steps():
    a, ours, b, stepped = pair()
    handle = stepped._in_backward
    train(a, ours, 6)
    train(b, stepped, 2)
    for _ in range(2):
        handle.remove()
    assert not any(hooks_of(p) for p in b.parameters())
    train(b, stepped, 2, first=2)
    assert all(has_gradients(stepped))
    stepped.zero_grad()
    stepped.step_in_backward()
    handle.remove()  # of the first
    train(b, stepped, 2, first=4)
    assert not any(has_gradients(stepped))
    assert_same(ours, stepped)


def test_gradients_are_kept_for_others_once_the_optimizer_is_gone():
    model = network()
    optimizer = RAdam(model.parameters())
    handle = optimizer.step_in_backward()
    train(model, optimizer, 1)
    del optimizer
    gc.collect()
    assert not any(hooks_of(p) for p in model.parameters())
    second = RAdam(model.parameters())
    backward(model)
    assert all(has_gradients(second))
    handle.remove()


# Errors in backward.


def fails_once(model: nn.Module, error: BaseException) -> None:
    """Makes the next backward fail after it has stepped the last layer."""

    def fail(grad: Tensor) -> None:
        handle.remove()
        raise error

    handle = model[0].bias.register_hook(fail)


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()], ids=repr)
def test_step_ends_a_backward_that_failed_midway(error):
    a, ours, b, stepped = pair()
    fails_once(b, error)
    with pytest.raises(type(error)):
        backward(b)
    assert stepped.state.keys() == {*b[2].parameters()}
    with pytest.raises(RuntimeError, match=r"zero_grad.. and then step.. end"):
        backward(b)
    stepped.zero_grad()
    stepped.step()
    backward(a)
    for p in a[0].parameters():
        p.grad = None
    ours.step()
    train(a, ours, 5)
    train(b, stepped, 5)
    assert_same(ours, stepped)


def edit(optimizer: RAdam, key: str, value: object) -> None:
    optimizer.param_groups[0][key] = value


def sparse(model: nn.Module) -> None:
    weight = model[0].weight

    def convert(param: Tensor) -> None:
        param.grad = param.grad.to_sparse()

    weight.register_post_accumulate_grad_hook(convert)


BROKEN: dict[str, tuple[Callable, str]] = {
    "option": (lambda m, o: edit(o, "eps", -1.0), "eps"),
    "sparse": (lambda m, o: sparse(m), "sparse gradients .* param 0 of group 0"),
    "state": (
        lambda m, o: o.state.__setitem__(m[0].weight, {"step": torch.ones(1)}),
        "state of param 0 of group 0 lacks",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), BROKEN.values(), ids=BROKEN)
def test_an_error_in_a_step_changes_nothing_of_the_parameter(spoil, words):
    model = network()
    optimizer = RAdam([model[0].weight])
    spoil(model, optimizer)
    optimizer.step_in_backward()
    before, state = model[0].weight.detach().clone(), dict(optimizer.state)
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError), match=words):
            backward(model)
        assert torch.equal(model[0].weight, before)
        assert optimizer.state == state
        assert model[0].weight.grad is not None
        optimizer.zero_grad()


def test_the_next_backward_goes_on_after_an_error_is_mended():
    a, ours, b, stepped = pair()
    edit(stepped, "eps", -1.0)
    with pytest.raises(ValueError, match="eps"):
        backward(b)
    edit(stepped, "eps", 1e-8)
    stepped.zero_grad()
    train(a, ours)
    train(b, stepped)
    assert_same(ours, stepped)


# Around it.


@pytest.mark.filterwarnings("error")
def test_no_warning_of_an_optimizer_that_trains_nothing():
    model = network()
    train(model, in_backward(model), 5)


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        model = nn.Linear(6, 8)
        optimizer = in_backward(model)
        for _ in range(2):
            model(torch.randn(16, 6)).square().mean().backward()
            assert not any(has_gradients(optimizer))
            optimizer.step()
    assert optimizer.state[model.weight]["exp_avg"].shape == (8, 6)


MEMORY = """
import ctypes
from pathlib import Path

import torch
from torch import nn
from radam_kernels import RAdam

torch.set_num_threads(1)
M_MMAP_THRESHOLD = -3
assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)  # so that free() gives memory back


def bytes_of(name):
    line = Path("/proc/self/status").read_text().partition(name + ":")[2]
    return 1024 * int(line.split()[0])


def above_rest(kind):
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(32)))  # 1 MiB each
    optimizer = RAdam(model.parameters())
    if kind == "release":
        optimizer.step_in_backward()
    elif kind == "free":
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    for _ in range(2):  # the first makes the state
        optimizer.zero_grad()
        rest = bytes_of("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        model(torch.ones(1, 512)).sum().backward()
        peak = bytes_of("VmHWM")
        optimizer.step()
    return (peak - rest) / 2**20


above_rest("plain")  # loads code
plain, free, release = map(above_rest, ("plain", "free", "release"))
print(f"{plain=:.1f} {free=:.1f} {release=:.1f} MiB")
assert plain > 30
assert release < free + 1
"""


def test_peak_memory_is_that_of_a_hook_that_only_frees(succeeds):
    succeeds(MEMORY)


def test_gradients_that_step_itself_steps_are_freed_too():
    late, early = Parameter(torch.ones(3), requires_grad=False), Parameter(torch.ones(3))
    optimizer = RAdam([late, early], lr=0.1, betas=(0.0, 0.9))
    optimizer.step_in_backward()
    late.requires_grad_(True)
    for _ in range(3):
        (late.sum() + early.sum()).backward()
        optimizer.step()
        assert late.grad is None
        assert torch.equal(optimizer.state[late]["exp_avg"], torch.ones(3))
    assert torch.equal(late, early)


def test_parameters_that_were_taken_out_are_let_go():
    optimizer = RAdam([Parameter(torch.ones(3))])
    handle = optimizer.step_in_backward()
    gone = optimizer.param_groups.pop()["params"][0]
    optimizer.add_param_group({"params": [Parameter(torch.ones(2))]})
    assert not gone._post_accumulate_grad_hooks
    assert [member.param for member in handle._members.values()] == params_of(optimizer)
