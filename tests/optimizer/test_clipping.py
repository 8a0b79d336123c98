"""clip_grad_norm_: the norm, the factor that the next step takes, and when it is dropped."""

import copy
import gc
import math
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.nn import Parameter
from torch.optim import RAdam as TorchRAdam
from torch.profiler import profile

from radam_kernels import RAdam, radam_
from radam_kernels.modules import DTYPES, cpu
from tests.helpers import (
    SIZES,
    assert_same,
    give_gradients,
    parameters,
    params_of,
    randn,
    same_bits,
    saved,
    twin,
)

BACKENDS = ["cpu", "reference"]
NORMS = [1.0, 2.0, math.inf]
# A chunk of the CPU kernel has 2**16 elements.
LONG = (2**16 - 1, 2**16, 2**16 + 1, 2**18 + 3)


def given(*grads: Tensor, **options) -> RAdam:
    """An optimizer of parameters of zeros with these gradients."""
    params = [Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return RAdam(params, **options)


def exact_norm(grads: list[Tensor], norm_type: float) -> float:
    values = np.concatenate([np.abs(g.double().numpy()).reshape(-1) for g in grads])
    values = values.astype(np.longdouble)
    if norm_type == math.inf:
        return float(values.max())
    return float((values**norm_type).sum() ** (np.longdouble(1) / norm_type))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm_type", [*NORMS, 3.5, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_exact_to_its_dtype(backend, norm_type, dtype):
    grads = [randn(n, dtype=dtype, seed=n) for n in (*SIZES, *LONG)]
    norm = given(*grads, backend=backend).clip_grad_norm_(1.0, norm_type)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol = 1e-13 if dtype == torch.float64 else 1e-7
    np.testing.assert_allclose(norm.item(), exact_norm(grads, norm_type), rtol=rtol)


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_and_number_of_threads_gives_the_same_sum(norm_type, dtype):
    grads = [randn(n + 1, dtype=dtype, seed=n)[1:] for n in (*SIZES, 31, 33, *LONG)]
    gradients = cpu.Gradients()
    assert gradients.refresh(given(*grads).param_groups, {}) == []
    (bucket,) = gradients.buckets
    found = {
        bucket.power_sum(norm_type, threads, isa)
        for threads in (1, 3)
        for isa in range(len(cpu.instruction_sets))
    }
    assert len(found) == 1
    truth = exact_norm(grads, norm_type) ** (norm_type if norm_type < math.inf else 1)
    np.testing.assert_allclose(found.pop(), truth, rtol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("value", [1e-24, 1e-40, 1e25])
def test_tiny_and_huge_float32_gradients_neither_underflow_nor_overflow(backend, norm_type, value):
    grad = torch.full((1000,), value)
    optimizer = given(grad, backend=backend)
    norm = optimizer.clip_grad_norm_(value, norm_type)
    truth = exact_norm([grad], norm_type)
    torch.testing.assert_close(norm, torch.tensor(truth), rtol=1e-6, atol=0)
    factor = optimizer._clipping.factor.item()
    np.testing.assert_allclose(factor, min(1, value / (truth + 1e-6)), rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("where", [0, 31, 70, 2**17 + 1])
@pytest.mark.parametrize(
    ("values", "norm"), [((math.inf,), math.inf), ((math.nan, math.inf), math.nan)]
)
def test_inf_and_nan_are_seen_everywhere(backend, norm_type, where, values, norm):
    grad = torch.ones(2**17 + 3)
    grad[where : where + len(values)] = torch.tensor(values)
    found = given(grad, backend=backend).clip_grad_norm_(1.0, norm_type)
    np.testing.assert_equal(found.item(), norm)


def test_gradients_of_any_layout_count():
    dense = randn(6, 4)
    grads = [dense.t(), randn(12)[::2], randn(1, 5).expand(3, 5), torch._neg_view(randn(7))]
    optimizer = given(*[torch.zeros(g.shape) for g in grads])
    for param, grad in zip(params_of(optimizer), grads, strict=True):
        param.grad = grad
    truth = exact_norm([g.clone() for g in grads], 2)
    np.testing.assert_allclose(optimizer.clip_grad_norm_(1.0).item(), truth, rtol=1e-7)


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_gradients_count_by_their_magnitude(norm_type, dtype):
    grad = randn(300, dtype=dtype)
    norm = given(grad).clip_grad_norm_(1.0, norm_type)
    truth = torch.linalg.vector_norm(grad.to(torch.complex128), norm_type)
    torch.testing.assert_close(norm.double(), truth, rtol=1e-6, atol=0)


def test_all_groups_count_together_and_the_widest_dtype_decides():
    params = [Parameter(torch.zeros(n)) for n in (2, 3)]
    params.append(Parameter(torch.zeros(4, dtype=torch.float64)))
    params.append(Parameter(torch.zeros(5)))  # has no gradient
    for param in params[:3]:
        param.grad = torch.ones_like(param)
    optimizer = RAdam([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}])
    norm = optimizer.clip_grad_norm_(1.0)
    assert (norm.item(), norm.dtype, norm.shape) == (3.0, torch.float64, ())


def test_without_gradients_the_norm_is_0():
    optimizer = RAdam([Parameter(torch.ones(3))])
    assert optimizer.clip_grad_norm_(1.0).item() == 0
    optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
        {"capturable": True, "lr": torch.tensor(0.1)},
        {"backend": "reference"},
        {"backend": "reference", "capturable": True},
        {"flatten": True},
    ],
)
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9])
def test_the_step_is_that_of_gradients_multiplied_by_the_factor(options, max_norm):
    ours = RAdam(parameters(), **options)
    plain = [p.detach().clone() for p in params_of(ours)]
    moments = [[torch.zeros_like(p) for p in plain] for _ in range(2)]
    names = ("lr", "eps", "weight_decay", "decoupled_weight_decay", "maximize")
    for number in range(1, 9):
        give_gradients(ours, number)
        grads = [p.grad.clone() for p in params_of(ours)]
        norm = ours.clip_grad_norm_(max_norm).item()
        np.testing.assert_allclose(norm, exact_norm(grads, 2), rtol=1e-7)
        factor = ours._clipping.factor
        np.testing.assert_allclose(factor.item(), min(1, max_norm / (norm + 1e-6)), rtol=1e-6)
        group = ours.param_groups[0]
        given = {name: group[name] for name in names} | {"beta1": 0.9, "beta2": 0.999}
        laid_out = [torch.empty_like(p).copy_(g) for p, g in zip(plain, grads, strict=True)]
        radam_(plain, laid_out, *moments, step=number, grad_scale=factor, **given)
        ours.step()
        assert all(same_bits(p.grad, g) for p, g in zip(params_of(ours), grads, strict=True))
    assert all(same_bits(p, q) for p, q in zip(params_of(ours), plain, strict=True))


@pytest.mark.parametrize("norm_type", [*NORMS, 3.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_torch_clips_to_the_same_in_float64(norm_type, weight_decay):
    options = {"lr": 0.1, "weight_decay": weight_decay}
    # torch has no largest element of an empty gradient.
    ours = RAdam([p for p in parameters(torch.float64) if p.numel()], **options)
    theirs = twin(ours, TorchRAdam)
    for number in range(1, 9):
        for optimizer in (ours, theirs):
            give_gradients(optimizer, number)
        norm = ours.clip_grad_norm_(0.3, norm_type)
        truth = torch.nn.utils.clip_grad_norm_(params_of(theirs), 0.3, norm_type)
        torch.testing.assert_close(norm, truth, rtol=1e-12, atol=0)
        ours.step()
        theirs.step()
    assert_same(ours, theirs, rtol=1e-11, atol=1e-12)


def clipped_step(optimizer: RAdam, change=lambda: None) -> list[Tensor]:
    """What a step after a clip and a change moves the parameters by."""
    before = [p.detach().clone() for p in params_of(optimizer)]
    optimizer.clip_grad_norm_(1e-3)
    change()
    optimizer.step()
    return [(p - q).detach() for p, q in zip(params_of(optimizer), before, strict=True)]


def unclipped(optimizer: RAdam, **options) -> list[Tensor]:
    other = twin(optimizer, **options)
    give_gradients(other)
    other.step()
    return [p.detach() - q for p, q in zip(params_of(other), params_of(optimizer), strict=True)]


@pytest.fixture
def optimizer() -> RAdam:
    made = RAdam(parameters(), lr=0.1)
    give_gradients(made)
    return made


def test_the_factor_is_for_one_step(optimizer):
    clipped_step(optimizer)
    assert optimizer._clipping.factor is None
    other = twin(optimizer)
    other.load_state_dict(saved(optimizer.state_dict()))
    give_gradients(other)
    for each in (optimizer, other):
        each.step()
    assert_same(optimizer, other)


def test_zero_grad_drops_it(optimizer):
    def change():
        optimizer.zero_grad(set_to_none=False)
        for p in params_of(optimizer):
            p.grad.add_(1)

    expected = twin(optimizer)
    for p in params_of(expected):
        p.grad = torch.ones_like(p)
    expected.step()
    clipped_step(optimizer, change)
    assert_same(optimizer, expected)


def test_a_parameter_that_has_moved_in_the_groups_is_still_clipped(optimizer):
    other = _again(optimizer)
    for each in (optimizer, other):
        each.clip_grad_norm_(1e-3)
    optimizer.param_groups[0]["params"].reverse()
    for each in (optimizer, other):
        each.step()
    optimizer.param_groups[0]["params"].reverse()
    assert_same(optimizer, other)


def test_gradients_that_replace_all_of_them_drop_it(optimizer):
    expected = unclipped(optimizer)
    moved = clipped_step(optimizer, lambda: give_gradients(optimizer))
    assert all(map(torch.equal, moved, expected))


def test_new_gradients_at_the_same_addresses_drop_it():
    # As after model.zero_grad(), where the allocator hands the same memory out again.
    memory = np.full(64, 3.0, np.float32)
    param = Parameter(torch.zeros(64))
    optimizer = RAdam([param], lr=0.1)
    param.grad = torch.from_numpy(memory)
    optimizer.clip_grad_norm_(1e-3)
    param.grad = None
    param.grad = torch.from_numpy(memory)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["exp_avg"], torch.full((64,), 0.3))


def test_a_gradient_that_is_removed_changes_nothing_for_the_others(optimizer):
    expected = clipped_step(_again(optimizer))

    def change():
        params_of(optimizer)[0].grad = None

    moved = clipped_step(optimizer, change)
    assert not moved[0].any()
    assert all(map(torch.equal, moved[1:], expected[1:]))


def _again(optimizer: RAdam) -> RAdam:
    other = twin(optimizer)
    give_gradients(other)
    return other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.grad.mul_(2), r"gradient of param 1 of group 0 was changed in place"),
        (lambda p: setattr(p, "grad", p.grad.clone()), r"1 of 5 gradients are new since"),
    ],
)
@pytest.mark.parametrize("is_first_step", [True, False])
def test_gradients_that_have_changed_are_refused_and_nothing_is_lost(
    optimizer, change, message, is_first_step
):
    if not is_first_step:
        optimizer.step()
        optimizer.state.clear()
        give_gradients(optimizer)
    optimizer.clip_grad_norm_(1e-3)
    before = [p.detach().clone() for p in params_of(optimizer)]
    change(params_of(optimizer)[1])
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"{message}.*call it again"):
            optimizer.step()
    assert all(map(torch.equal, params_of(optimizer), before))
    assert not optimizer.state
    assert optimizer.clip_grad_norm_(1e-3) > 1
    optimizer.step()
    moved = torch.cat([(p - q).ravel() for p, q in zip(params_of(optimizer), before, strict=True)])
    torch.testing.assert_close(moved.norm(), torch.tensor(0.1 * 1e-3), rtol=1e-2, atol=0)


def test_a_refused_step_keeps_the_factor(optimizer):
    expected = clipped_step(_again(optimizer))
    before = [p.detach().clone() for p in params_of(optimizer)]
    optimizer.clip_grad_norm_(1e-3)
    optimizer.param_groups[0]["betas"] = (0.9, 1.5)
    with pytest.raises(ValueError, match=r"1\.5"):
        optimizer.step()
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    optimizer.step()
    moved = [p - q for p, q in zip(params_of(optimizer), before, strict=True)]
    assert all(map(torch.equal, moved, expected))


def test_a_refused_step_in_backward_keeps_the_factor(optimizer):
    expected = clipped_step(_again(optimizer))
    other = RAdam(params_of(optimizer))
    handle = other.step_in_backward()

    def change():
        with pytest.raises(RuntimeError, match="another optimizer"):
            optimizer.step_in_backward()
        handle.remove()

    assert all(map(torch.equal, clipped_step(optimizer, change), expected))


def test_buckets_are_in_the_order_of_parameters_whatever_was_before():
    params = [Parameter(torch.zeros(3, dtype=d)) for d in (torch.float64, torch.float32)]
    gradients = cpu.Gradients()
    for given in ([1], [0, 1], [0]):
        for i, param in enumerate(params):
            param.grad = torch.ones_like(param) if i in given else None
        assert gradients.refresh([{"params": params}], {}) == []
        assert [DTYPES[b.dtype] for b in gradients.buckets] == [params[i].dtype for i in given]


def test_a_closure_may_clip(optimizer):
    expected = clipped_step(_again(optimizer))
    before = [p.detach().clone() for p in params_of(optimizer)]
    optimizer.zero_grad()

    def closure():
        give_gradients(optimizer)
        return optimizer.clip_grad_norm_(1e-3)

    assert optimizer.step(closure) > 1
    moved = [p - q for p, q in zip(params_of(optimizer), before, strict=True)]
    assert all(map(torch.equal, moved, expected))


def test_neither_copies_nor_checkpoints_nor_clipping_hold_gradients(optimizer):
    optimizer.clip_grad_norm_(1e-3)
    copied = copy.deepcopy(optimizer)
    assert "_clipping" not in copied.__dict__
    saved(optimizer.state_dict())
    alive = [weakref.ref(p.grad) for p in params_of(optimizer)]
    for p in params_of(optimizer):
        p.grad = None
    gc.collect()
    assert not any(ref() is not None for ref in alive)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_norm_that_is_not_finite(value):
    optimizer = given(torch.tensor([1.0, value]))
    with pytest.raises(RuntimeError, match=f"norm of order 2.0 of all gradients is {value}"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert optimizer._clipping.factor is None
    np.testing.assert_equal(optimizer.clip_grad_norm_(1.0).item(), value)
    optimizer.step()
    theirs = Parameter(torch.zeros(2))
    theirs.grad = torch.tensor([1.0, value])
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    (ours,) = params_of(optimizer)
    expected = 0.1 * theirs.grad
    torch.testing.assert_close(optimizer.state[ours]["exp_avg"], expected, equal_nan=True)


def test_a_finite_norm_beyond_float32_is_no_error():
    optimizer = given(torch.full((4,), 3e38))
    assert optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True).item() == math.inf
    np.testing.assert_allclose(optimizer._clipping.factor.item(), 1 / 6e38, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0,), "max_norm: expected a number >= 0, got -1.0"),
        ((math.nan,), "max_norm: expected a number >= 0, got nan"),
        ((1.0, 0), "norm_type: expected a number > 0 or inf, got 0.0"),
        ((1.0, -math.inf), "norm_type: expected a number > 0 or inf, got -inf"),
        ((1.0, math.nan), "norm_type: expected a number > 0 or inf, got nan"),
    ],
)
def test_arguments_out_of_range_are_refused(optimizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        optimizer.clip_grad_norm_(*arguments)


def test_sparse_gradients_and_freed_storages_are_refused(optimizer):
    params_of(optimizer)[0].grad = torch.ones(257).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.clip_grad_norm_(1.0)
    grad = torch.ones(257)
    grad.untyped_storage().resize_(0)
    params_of(optimizer)[0].grad = grad
    with pytest.raises(ValueError, match=r"grad of param 0 of group 0.*storage has 0 bytes"):
        optimizer.clip_grad_norm_(1.0)
    large = given(torch.ones(1 << 16))
    params_of(large)[0].grad.untyped_storage().resize_(64)
    with pytest.raises(ValueError, match="storage has 64 bytes"):
        large.clip_grad_norm_(1.0)


def test_a_profiler_sees_the_norm(optimizer):
    with profile() as prof:
        optimizer.clip_grad_norm_(1.0)
    assert "radam_kernels.norm" in {event.key for event in prof.key_averages()}


def test_fake_gradients_have_a_fake_norm():
    with FakeTensorMode():
        optimizer = RAdam([Parameter(torch.ones(3))])
        for p in params_of(optimizer):
            p.grad = torch.ones(3)
        assert is_fake(optimizer.clip_grad_norm_(1.0))
        optimizer.step()
        optimizer.zero_grad()
        assert is_fake(optimizer.clip_grad_norm_(1.0))


# GradScaler


def scaled(capturable: bool, value: float = 3.0) -> tuple[RAdam, Parameter, torch.amp.GradScaler]:
    param = Parameter(torch.zeros(4))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((param * value).sum()).backward()
    return RAdam([param], lr=0.1, capturable=capturable), param, scaler


@pytest.mark.parametrize("capturable", [False, True])
def test_clipping_goes_between_unscale_and_the_scalers_step(capturable):
    optimizer, param, scaler = scaled(capturable)
    scaler.unscale_(optimizer)
    assert optimizer.clip_grad_norm_(1.5).item() == 6
    scaler.step(optimizer)
    scaler.update()
    expected = torch.full((4,), 0.1 * 0.75)
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], expected)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_that_the_scaler_skips_is_skipped(capturable):
    optimizer, param, scaler = scaled(capturable, math.inf)
    scaler.unscale_(optimizer)
    assert optimizer.clip_grad_norm_(1.5).item() == math.inf
    scaler.step(optimizer)
    scaler.update()
    assert not param.any()
    param.grad = None
    (param * 3).sum().backward()  # the scaler's skipped step did not take the factor
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], torch.full((4,), 0.3))
    assert optimizer.state[param]["step"] == 1


def test_gradients_that_the_step_would_unscale_are_refused():
    optimizer, _, scaler = scaled(capturable=True)
    optimizer.clip_grad_norm_(1.5)
    with pytest.raises(RuntimeError, match=r"still scaled: call GradScaler\.unscale_"):
        scaler.step(optimizer)
