"""Swapping torch.optim.RAdam for radam_kernels.RAdam changes nothing but the time of a step."""

import inspect
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter
from torch.optim import lr_scheduler

from radam_kernels import RAdam, schedule
from tests.helpers import TorchRAdam, give_gradients, randn, same_bits, take_steps

STEPS = 12  # with the default betas, torch rectifies from step 6
RTOL = {torch.float32: 1e-5, torch.float64: 1e-12, torch.complex64: 1e-5, torch.complex128: 1e-12}

by_dtype = pytest.mark.parametrize("dtype", RTOL, ids=str)


def like(tensor: Tensor) -> Parameter:
    """A parameter with the values, strides and storage offset of a tensor, on other memory."""
    copy = torch.empty(0, dtype=tensor.dtype).set_(
        tensor.untyped_storage().clone(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )
    return Parameter(copy)


def gradient(param: Tensor, index: int, step: int) -> Tensor:
    return randn(*param.shape, dtype=param.dtype, seed=1000 * step + index)


def assert_same_trajectory(
    tensors,
    *,
    groups=list,
    edit=lambda optimizer, step: None,
    scheduler=None,
    grad=gradient,
    steps=STEPS,
    rtol=None,
    ours=None,
    **options,
):
    """Steps ours and torch's side by side, on equal gradients, and compares after every step.

    `groups` makes what the constructor takes from the parameters; `edit(optimizer, step)` runs
    before each step; `grad` may return None; `ours` are further options of ours. The parameters
    start small, so that a tolerance relative to them is one relative to the updates.
    """
    options = {"lr": 0.1, **options}
    runs = []
    for cls, extra in ((RAdam, ours or {}), (TorchRAdam, {"foreach": False})):
        params = [like(t) for t in tensors]
        optimizer = cls(groups(params), **options, **extra)
        runs.append((params, optimizer, scheduler(optimizer) if scheduler else None))
    for step in range(1, steps + 1):
        for params, optimizer, stepped in runs:
            edit(optimizer, step)
            for i, p in enumerate(params):
                p.grad = grad(p, i, step)
            optimizer.step()
            if isinstance(stepped, lr_scheduler.ReduceLROnPlateau):
                stepped.step(1.0)
            elif stepped:
                stepped.step()
        for i, (p, q) in enumerate(zip(runs[0][0], runs[1][0], strict=True)):
            tolerance = rtol or RTOL[p.dtype]
            scale = float(q.detach().abs().max()) if q.numel() else 0.0
            torch.testing.assert_close(
                p,
                q,
                rtol=0,
                atol=tolerance * scale,
                check_stride=True,
                msg=lambda text, step=step, i=i: f"step {step}, param {i}: {text}",
            )
    return runs[0][0], runs[0][1]


# The plain case, and every option.


@by_dtype
def test_follows_torch_through_the_threshold(dtype):
    assert_same_trajectory([0.01 * randn(257, dtype=dtype), 0.01 * randn(3, 5, dtype=dtype)])


@pytest.mark.parametrize(
    "options",
    [
        dict(betas=(0.0, 0.999)),
        dict(betas=(0.9, 0.0)),
        dict(betas=(0.0, 0.0)),
        dict(betas=(0.5, 0.9)),
        dict(betas=(0.95, 0.99999)),
        dict(eps=0.0),
        dict(eps=0.1),
        dict(weight_decay=0.3),
        dict(weight_decay=0.3, decoupled_weight_decay=True),
        dict(maximize=True),
        dict(maximize=True, weight_decay=0.3),
        dict(maximize=True, weight_decay=0.3, decoupled_weight_decay=True),
        dict(lr=0.0),
        dict(lr=7.0),
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
def test_options_mean_what_they_mean_in_torch(options, dtype):
    # beta2 = .99999 costs torch's textbook rho_t some digits; ours keeps them.
    rtol = 1e-9 if options.get("betas", (0, 0))[1] == 0.99999 and dtype != torch.float32 else None
    assert_same_trajectory([randn(257, dtype=dtype)], rtol=rtol, **options)


@pytest.mark.parametrize("decoupled", [False, True], ids=["L2", "decoupled"])
def test_weight_decay_has_an_effect(decoupled):
    def final(**options):
        p = Parameter(torch.full((5,), 3.0))
        optimizer = RAdam([p], lr=0.1, decoupled_weight_decay=decoupled, **options)
        for _ in range(8):
            p.grad = torch.zeros(5)
            optimizer.step()
        return p.detach()

    assert (final(weight_decay=0.0) == 3.0).all()
    assert (final(weight_decay=0.1) < 2.99).all()


def test_the_two_weight_decays_differ():
    def final(decoupled):
        p = Parameter(torch.ones(5))
        optimizer = RAdam([p], lr=0.1, weight_decay=0.1, decoupled_weight_decay=decoupled)
        p.grad = torch.ones(5)
        optimizer.step()
        return p.detach()

    # Step 1 is lr * g: L2 adds 0.1 p to g, decoupled multiplies p by 1 - 0.01 first.
    torch.testing.assert_close(final(False), torch.full((5,), 1 - 0.1 * 1.1))
    torch.testing.assert_close(final(True), torch.full((5,), 0.99 - 0.1))


def test_a_small_weight_decay_is_not_lost_to_float32():
    # 1 - lr * weight_decay, made in float64, rounds to another float32 than in float32 arithmetic.
    p = Parameter(torch.ones(1))
    optimizer = RAdam([p], lr=1e-4, weight_decay=1e-3, decoupled_weight_decay=True)
    p.grad = torch.zeros(1)
    optimizer.step()
    assert p.item() == torch.tensor(1 - 1e-7, dtype=torch.float64).float().item() < 1.0


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-dim"])
def test_tensor_lr_is_read_at_every_step(shape):
    lrs = []

    def edit(optimizer, step):
        lr = optimizer.param_groups[0]["lr"]
        lr.fill_(0.1 / step)
        lrs.append(lr)

    def groups(params):
        return [{"params": params, "lr": torch.full(shape, 0.1)}]

    params, _ = assert_same_trajectory([0.01 * randn(33)], groups=groups, edit=edit)
    assert lrs[0] is lrs[2]  # changed in place
    constant, _ = assert_same_trajectory([0.01 * randn(33)])
    assert not torch.equal(params[0], constant[0])


# Sixteen bits.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_parameters_are_stepped_to_the_nearest_value(dtype):
    """With float32 moments, a step from the same point is the float64 one, rounded once."""
    p = Parameter(randn(4096, dtype=dtype))
    exact = Parameter(p.detach().double())
    ours, theirs = RAdam([p], lr=0.1), TorchRAdam([exact], lr=0.1, foreach=False)
    for step in range(1, STEPS + 1):
        exact.data.copy_(p.data)
        p.grad = gradient(p, 0, step)
        exact.grad = p.grad.double()
        ours.step()
        theirs.step()
        rounded = exact.detach().to(dtype)
        off = p.detach() != rounded
        assert off.float().mean() < 2e-3, f"step {step}"  # those next to a tie
        spacing = torch.finfo(dtype).eps
        torch.testing.assert_close(p.detach(), rounded, rtol=1.01 * spacing, atol=1e-6)
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                ours.state[p][key].double(), theirs.state[exact][key], rtol=3e-6, atol=1e-7
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_moments_follow_float64_within_their_rounding(dtype):
    p = Parameter(0.01 * randn(4096, dtype=dtype))
    exact = Parameter(p.detach().double())
    betas = (0.9, 0.9)  # at 0.999 the second moment stalls: the reason why this is not the default
    ours = RAdam([p], lr=0.1, betas=betas, state_dtype=dtype)
    theirs = TorchRAdam([exact], lr=0.1, betas=betas, foreach=False)
    for step in range(1, STEPS + 1):
        p.grad = gradient(p, 0, step)
        exact.grad = p.grad.double()
        ours.step()
        theirs.step()
    assert ours.state[p]["exp_avg_sq"].dtype == dtype
    spacing = torch.finfo(dtype).eps
    torch.testing.assert_close(p.detach().double(), exact.detach(), rtol=0, atol=6 * spacing)


def test_float32_moments_do_not_stall_where_bfloat16_ones_do():
    def second_moment(state_dtype):
        p = Parameter(torch.ones(1, dtype=torch.bfloat16))
        optimizer = RAdam([p], lr=0.0, state_dtype=state_dtype)
        for _ in range(2000):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return optimizer.state[p]["exp_avg_sq"].item()

    assert second_moment(None) == pytest.approx(1 - 0.999**2000, rel=1e-4)
    assert second_moment(torch.bfloat16) < 0.6


# Parameters and gradients of every form.

LAYOUTS = {
    "scalar": lambda t: t((), 1),
    "one": lambda t: t((1,), 1),
    "empty": lambda t: t((0, 3), 1),
    "odd": lambda t: t((251,), 1),
    "unaligned": lambda t: t((258,), 1)[1:],
    "columns": lambda t: t((7, 12), 1)[:, ::2],
    "rows": lambda t: t((8, 5), 1)[::3],
    "inner": lambda t: t((6, 6), 1)[1:5, 2:5],
    "transposed": lambda t: t((5, 9), 1).t(),
    "permuted": lambda t: t((3, 4, 5), 1).permute(2, 0, 1),
    "channels_last": lambda t: t((2, 3, 4, 5), 1).to(memory_format=torch.channels_last),
    "size-1 dims": lambda t: t((4, 1, 3), 1).as_strided((4, 1, 3), (3, 77, 1)),
}
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


@by_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_parameters_of_any_layout(layout, dtype):
    tensor = LAYOUTS[layout](lambda shape, seed: 0.01 * randn(*shape, dtype=dtype, seed=seed))
    params, _ = assert_same_trajectory([tensor, 0.01 * randn(17, seed=9)])
    assert params[0].stride() == tensor.stride()


@by_layout
def test_the_gaps_of_a_strided_parameter_are_left_alone(layout):
    tensor = LAYOUTS[layout](lambda shape, seed: torch.full(shape, 7.0))
    p = like(tensor)
    everything = torch.empty(0).set_(p.untyped_storage())
    marks = torch.zeros_like(everything).as_strided(p.shape, p.stride(), p.storage_offset())
    marks.fill_(1)
    outside = torch.empty(0).set_(marks.untyped_storage()) == 0
    optimizer = RAdam([p], lr=0.1)
    for step in range(1, 8):
        p.grad = gradient(p, 0, step)
        optimizer.step()
    assert (everything[outside] == 7.0).all()
    assert (everything[~outside] != 7.0).all()


GRADIENTS = {
    "transposed": lambda g: g.t().contiguous().t(),
    "strided": lambda g: torch.stack([g, g], -1)[..., 0],
    "expanded": lambda g: g[:, :1].expand(g.shape),
    "unaligned": lambda g: torch.cat([g.new_zeros(1), g.flatten()])[1:].view(g.shape),
    "flipped": lambda g: torch.flip(g, (0,)),
}


@pytest.mark.parametrize("form", GRADIENTS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "columns"])
def test_gradients_laid_out_differently_from_their_parameters(form, layout):
    make = {**LAYOUTS, "contiguous": lambda t: t((6, 7), 1)}[layout]
    tensor = make(lambda shape, seed: 0.01 * randn(*shape, seed=seed))
    assert_same_trajectory([tensor], grad=lambda *a: GRADIENTS[form](gradient(*a)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_gradient_may_be_the_parameter_itself(dtype):
    """As in minimizing p**2 / 2 by hand."""
    p, q = Parameter(randn(100, dtype=dtype)), Parameter(randn(100, dtype=dtype))
    ours, theirs = RAdam([p], lr=0.1), TorchRAdam([q], lr=0.1, foreach=False)
    for _ in range(STEPS):
        p.grad, q.grad = p.detach(), q.detach().clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=10 * RTOL[dtype], atol=RTOL[dtype])


def test_the_gradient_is_only_read():
    p = Parameter(randn(257))
    optimizer = RAdam([p], lr=0.1, weight_decay=0.1, maximize=True)
    for step in range(1, 8):
        p.grad = gradient(p, 0, step)
        before, address = p.grad.clone(), p.grad.data_ptr()
        optimizer.step()
        assert torch.equal(p.grad, before)
        assert p.grad.data_ptr() == address


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize(
    ("param_dtype", "grad_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float64),
    ],
    ids=str,
)
def test_gradients_of_another_dtype(param_dtype, grad_dtype):
    p = Parameter(randn(1000, dtype=param_dtype))
    p.grad_dtype = grad_dtype
    exact = Parameter(p.detach().double())
    ours, theirs = RAdam([p], lr=0.1), TorchRAdam([exact], lr=0.1, foreach=False)
    for step in range(1, 8):
        p.grad = gradient(exact, 0, step).to(grad_dtype)
        exact.grad = p.grad.double()
        ours.step()
        theirs.step()
    # The gradient must not have gone through the parameter's 16 bits on its way.
    state = {k: v.double() for k, v in ours.state[p].items()}
    torch.testing.assert_close(state["exp_avg"], theirs.state[exact]["exp_avg"], rtol=0, atol=1e-6)
    tolerance = 8 * torch.finfo(param_dtype).eps
    torch.testing.assert_close(p.detach().double(), exact.detach(), rtol=tolerance, atol=tolerance)


def test_dtypes_mixed_in_one_group():
    tensors = [0.01 * randn(33 + i, dtype=dtype, seed=i) for i, dtype in enumerate(RTOL)]
    assert_same_trajectory([*tensors, *tensors], weight_decay=0.1)


def test_many_small_parameters():
    assert_same_trajectory([0.01 * randn(i % 37, seed=i) for i in range(300)], steps=7)


# What changes from step to step.


def test_parameters_without_a_gradient_keep_their_own_count():
    def sometimes(param, index, step):
        return gradient(param, index, step) if step % (index + 1) == 0 else None

    params, optimizer = assert_same_trajectory(
        [0.01 * randn(40, seed=i) for i in range(4)], grad=sometimes, steps=24, weight_decay=0.1
    )
    assert [optimizer.state[p]["step"].item() for p in params] == [24, 12, 8, 6]


def test_groups_with_options_of_their_own():
    def groups(params):
        return [
            {"params": params[:1], "lr": 0.01},
            {"params": params[1:2], "betas": (0.5, 0.9), "eps": 1e-3},
            {"params": params[2:], "weight_decay": 0.3, "decoupled_weight_decay": True},
        ]

    assert_same_trajectory([0.01 * randn(20, seed=i) for i in range(4)], groups=groups)


def test_groups_added_later():
    later = {}

    def groups(params):
        later[id(params[0])] = params[1]
        return params[:1]

    def edit(optimizer, step):
        if step == 4:
            late = later[id(optimizer.param_groups[0]["params"][0])]
            optimizer.add_param_group({"params": [late], "lr": 0.05, "maximize": True})

    params, optimizer = assert_same_trajectory(
        [0.01 * randn(20, seed=i) for i in range(2)], groups=groups, edit=edit
    )
    assert [optimizer.state[p]["step"].item() for p in params] == [12, 9]


EDITS = {
    "lr": lambda step: 0.1 / step,
    "betas": lambda step: (0.9 - 0.02 * step, 0.999 - 0.01 * step),
    "betas as a list": lambda step: [0.8, 0.99],
    "eps": lambda step: 10.0**-step,
    "weight_decay": lambda step: 0.1 * step,
    "maximize": lambda step: step % 3 == 0,
    "decoupled_weight_decay": lambda step: step % 2 == 0,
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits_between_steps_take_effect(edit):
    def apply(optimizer, step):
        optimizer.param_groups[0][edit.split()[0]] = EDITS[edit](step)

    def edited(**options):
        return assert_same_trajectory([randn(40)], edit=apply, **options)[0][0]

    unedited, _ = assert_same_trajectory([randn(40)], weight_decay=0.1)
    assert not torch.equal(edited(weight_decay=0.1), unedited[0])


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycleLR, which cycles betas": lambda o: lr_scheduler.OneCycleLR(o, 0.3, STEPS + 1),
    "CyclicLR, which cycles betas": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, 5),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.ExponentialLR(o, 0.8)], [4]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("lr", ["float", "tensor"])
@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_schedulers(name, lr):
    def groups(params):
        return [{"params": params, "lr": torch.tensor(0.1) if lr == "tensor" else 0.1}]

    _, optimizer = assert_same_trajectory(
        [0.01 * randn(40)], groups=groups, scheduler=SCHEDULERS[name]
    )
    assert float(optimizer.param_groups[0]["lr"]) != pytest.approx(0.1)
    if "betas" in name:
        assert optimizer.param_groups[0]["betas"][0] != 0.9


# The ways to call it.


def test_the_signature_is_torchs_and_ours():
    torchs = inspect.signature(TorchRAdam.__init__).parameters
    ours = inspect.signature(RAdam.__init__).parameters
    for name, parameter in torchs.items():
        assert ours[name].kind == parameter.kind, name
        assert ours[name].default == parameter.default, name
    assert list(ours)[: len(torchs)] == list(torchs)
    extra = {name: p.default for name, p in ours.items() if name not in torchs}
    assert extra == {
        "backend": "auto",
        "flatten": False,
        "amp_scaling": True,
        "rho_threshold": 5.0,
        "degenerated_to_sgd": True,
        "rectification": "first_order",
        "state_dtype": None,
        "decouple_lr": False,
        "master_weights": None,
        "stochastic_rounding": False,
        "seed": 0,
    }
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in extra)


def test_positional_arguments():
    p = Parameter(torch.ones(1))
    group = RAdam([p], 0.3, (0.8, 0.9), 1e-3, 0.2, True).param_groups[0]
    torchs = TorchRAdam([p], 0.3, (0.8, 0.9), 1e-3, 0.2, True).param_groups[0]
    assert {k: v for k, v in group.items() if k in torchs} == torchs


@pytest.mark.parametrize("made", [RAdam, TorchRAdam], ids=["made by ours", "made by torch"])
def test_groups_defaults_and_checkpoints_have_torchs_keys_and_values(made):
    p = Parameter(torch.ones(1))
    ours, torchs = RAdam([p]), TorchRAdam([p])
    ours.load_state_dict(made([p]).state_dict())
    assert ours.param_groups == torchs.param_groups
    assert list(ours.defaults.items()) == list(torchs.defaults.items())
    assert ours.state_dict() == torchs.state_dict()


OWN = {
    "rho_threshold": 4.0,
    "degenerated_to_sgd": False,
    "rectification": "exact",
    "state_dtype": "bfloat16",
}


def test_a_hyperparameter_of_ours_is_in_a_group_only_if_it_differs_from_its_default():
    optimizer = RAdam([Parameter(torch.ones(1))], **OWN)
    assert {key: optimizer.param_groups[0][key] for key in OWN} == OWN
    assert {key: optimizer.defaults[key] for key in OWN} == OWN
    usual = RAdam([Parameter(torch.ones(1))])
    assert not OWN.keys() & usual.param_groups[0].keys()
    assert not OWN.keys() & usual.defaults.keys()
    assert {key: usual.hyperparameters(usual.param_groups[0])[key] for key in OWN} == {
        "rho_threshold": 5.0,
        "degenerated_to_sgd": True,
        "rectification": "first_order",
        "state_dtype": None,
    }
    assert "params" not in usual.hyperparameters(usual.param_groups[0])


def test_a_group_keeps_its_own_value_in_another_optimizer():
    """Its value is the default of the class, and not that of the constructor."""
    optimizer = RAdam([{"params": [Parameter(torch.ones(1))], "rho_threshold": 5.0}], **OWN)
    optimizer.add_param_group(optimizer.param_groups.pop())
    copied = RAdam(optimizer.param_groups, **optimizer.defaults)
    torchs = TorchRAdam([Parameter(torch.ones(1))])
    copied.load_state_dict(torchs.state_dict())
    copied.add_param_group(copied.param_groups.pop())
    for made in (optimizer, copied):
        assert RAdam.hyperparameters(made.param_groups[0])["rho_threshold"] == 5.0
    assert RAdam.hyperparameters(copied.param_groups[0])["rectification"] == "first_order"


def test_the_default_of_the_class_counts_where_a_group_has_none():
    """From step 5 on rho_t is above 4."""
    params = [Parameter(torch.ones(3)) for _ in range(2)]
    groups = [{"params": params[1:], "rho_threshold": 5.0}, {"params": params[:1]}]
    optimizer = RAdam(groups, lr=0.1, rho_threshold=4.0)
    usual = RAdam([Parameter(torch.ones(3))], lr=0.1)
    for made in (optimizer, usual):
        take_steps(made, 5)
    assert torch.equal(params[1], usual.param_groups[0]["params"][0])
    assert not torch.equal(params[0], params[1])


def test_a_group_is_json_for_loggers():
    optimizer = RAdam([Parameter(torch.ones(1))], state_dtype=torch.bfloat16, rho_threshold=4.0)
    group = optimizer.state_dict()["param_groups"][0]
    assert json.loads(json.dumps(group))["state_dtype"] == "bfloat16"


def test_a_checkpoint_of_an_edited_group_is_compact():
    optimizer = RAdam([Parameter(torch.ones(1))])
    group = optimizer.param_groups[0]
    group |= {"rho_threshold": np.float32(5.0), "state_dtype": torch.float16}
    assert RAdam.hyperparameters(group)["state_dtype"] == "float16"
    saved = optimizer.state_dict()["param_groups"][0]
    assert OWN.keys() & saved.keys() == {"state_dtype"}
    assert saved["state_dtype"] == "float16"
    # torch.distributed.checkpoint asks a flattened file for the keys of the group itself.
    assert {*group} == {*saved}


@pytest.mark.parametrize("edited", [False, True], ids=["constructed", "edited"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"], ids=["a dtype", "its name"])
def test_state_dtype_may_be_a_dtype_or_its_name(dtype, edited):
    p = Parameter(torch.ones(3))
    optimizer = RAdam([p], state_dtype=None if edited else dtype)
    if edited:
        optimizer.param_groups[0]["state_dtype"] = dtype
    give_gradients(optimizer)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16


def test_repr_shows_the_groups():
    text = repr(RAdam([Parameter(torch.ones(1))], lr=0.25))
    assert text.startswith("RAdam (\nParameter Group 0")
    assert "    lr: 0.25\n" in text
    assert "rho_threshold" not in text
    assert "    rho_threshold: 4.0\n" in repr(RAdam([Parameter(torch.ones(1))], rho_threshold=4.0))


@pytest.mark.parametrize("foreach", [None, True, False])
def test_foreach_is_accepted(foreach):
    _, optimizer = assert_same_trajectory([randn(9)], steps=7, ours={"foreach": foreach})
    assert optimizer.param_groups[0]["foreach"] is foreach


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_training_loop_with_autograd(set_to_none):
    def train(cls, **options):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 3)
        ).double()
        model = model.to(memory_format=torch.channels_last)
        optimizer = cls(model.parameters(), lr=0.01, weight_decay=0.1, **options)
        losses = []
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss = model(torch.randn(8, 1, 4, 4, dtype=torch.float64)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    torch.testing.assert_close(
        train(RAdam), train(TorchRAdam, foreach=False), rtol=1e-10, atol=1e-12
    )


def test_zero_grad_to_none_takes_no_step_and_zeros_take_one():
    p = Parameter(torch.ones(3))
    optimizer = RAdam([p], lr=0.1)
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.zero_grad()
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.state[p]["step"].item() == 1
    p.grad = torch.ones(3)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert optimizer.state[p]["step"].item() == 2
    assert not torch.equal(p, before)  # the momentum goes on


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad], ids=["grad", "no_grad"])
def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned(grad_mode):
    p = Parameter(torch.tensor([3.0]))
    optimizer = RAdam([p], lr=0.1)
    seen = []

    def closure():
        seen.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    with grad_mode():
        assert optimizer.step(closure).item() == 9.0
    assert seen == [True]
    assert p.item() == pytest.approx(3.0 - 0.1 * 6.0)
    assert optimizer.step() is None


def test_parameters_stay_where_they_are():
    p = Parameter(randn(100))
    view, address = p.detach().view(-1), p.data_ptr()
    optimizer = RAdam([p], lr=0.1)
    for step in range(1, 8):
        p.grad = gradient(p, 0, step)
        optimizer.step()
    assert p.data_ptr() == address
    assert torch.equal(view, p.detach())


def test_no_parameters_with_a_gradient_is_a_step_that_does_nothing():
    optimizer = RAdam([Parameter(torch.ones(3))])
    assert optimizer.step() is None
    assert not optimizer.state


# What torch's class does not have.


def first_rectified_step(**options):
    """A rectified step does not grow with the gradient; one along the momentum does."""

    def moves(scale):
        p = Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = RAdam([p], lr=1.0, eps=0.0, **options)
        path = [0.0]
        for _ in range(STEPS):
            p.grad = torch.full_like(p, scale)
            optimizer.step()
            path.append(p.item())
        return [b - a for a, b in pairwise(path)]

    pairs = list(zip(moves(1.0), moves(64.0), strict=True))
    return 1 + next(i for i, (a, b) in enumerate(pairs) if b and b == pytest.approx(a, rel=1e-9))


@pytest.mark.parametrize(
    ("options", "step"),
    [
        (dict(), 6),
        (dict(rho_threshold=4.0), 5),
        (dict(rho_threshold=6.5), 7),
        (dict(rectification="exact", rho_threshold=2.0), 3),
    ],
    ids=["torch's threshold", "the paper's threshold", "a later one", "the exact variance"],
)
def test_rectification_begins_at_the_step_that_the_threshold_says(options, step):
    assert first_rectified_step(**options) == step


def test_exact_rectification_differs_from_the_first_order():
    def run(rectification):
        p = Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = RAdam([p], lr=1.0, rectification=rectification)
        for _ in range(8):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.item()

    assert abs(run("exact") / run("first_order") - 1) > 1e-3


@pytest.mark.parametrize(
    "decay",
    [dict(), dict(weight_decay=0.3), dict(weight_decay=0.3, decoupled_weight_decay=True)],
    ids=["no decay", "L2", "decoupled"],
)
def test_without_degeneration_parameters_rest_until_the_threshold(decay):
    p, q = Parameter(randn(40)), Parameter(randn(40))
    resting = RAdam([p], lr=0.1, degenerated_to_sgd=False, **decay)
    moving = TorchRAdam([q], lr=0.1, foreach=False, **decay)
    start = p.detach().clone()
    for step in range(1, 9):
        p.grad = gradient(p, 0, step)
        q.data.copy_(p.data)
        q.grad = p.grad
        resting.step()
        moving.step()
        for key in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(resting.state[p][key], moving.state[q][key])
        if step <= 5:
            assert torch.equal(p, start)
        else:
            torch.testing.assert_close(p, q)


# Backends.

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64]
shapes = st.sampled_from([(), (0,), (1,), (3,), (4, 5), (257,), (2, 3, 4, 5), (1000,)])
layouts = st.sampled_from(["contiguous", "reversed", "gaps", "offset"])
tensors = st.tuples(shapes, st.sampled_from(DTYPES), layouts, st.integers(0, 2**6 - 1))
options = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 1e-3, 0.1, 30.0]),
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.0), (0.99, 0.99999)]),
        "eps": st.sampled_from([0.0, 1e-8, 1.0]),
        "weight_decay": st.sampled_from([0.0, 0.01]),
        "decoupled_weight_decay": st.booleans(),
        "maximize": st.booleans(),
        "rho_threshold": st.sampled_from([4.0, 5.0, math.inf]),
        "degenerated_to_sgd": st.booleans(),
        "rectification": st.sampled_from(schedule.FORMS),
        "state_dtype": st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
    }
)
VALUES = torch.tensor([0.0, -0.0, 1e-45, -1e-38, 1e-8, 3e38, math.inf, -math.inf, math.nan])


def odd_tensor(shape, dtype, layout, seed) -> Tensor:
    """Normal values with special ones among them, in some layout."""
    numel = math.prod(shape)
    flat = randn(numel, dtype=dtype, seed=seed)
    odd = torch.arange(numel) % 7 == seed % 7
    flat[odd] = VALUES.to(dtype)[: 3 + seed % 7].repeat(numel)[: int(odd.sum())]
    tensor = flat.view(shape)
    if layout == "reversed":
        backwards = tuple(reversed(range(tensor.dim())))
        return tensor.permute(backwards).contiguous().permute(backwards)
    if layout == "gaps":
        return torch.stack([tensor, tensor], -1)[..., 1]
    if layout == "offset":
        return torch.cat([flat.new_zeros(1), flat])[1:].view(shape)
    return tensor


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.lists(tensors, min_size=1, max_size=4), options), min_size=1, max_size=3)
)
@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_the_cpu_kernel_gives_the_bits_of_the_reference(groups):
    runs = []
    for backend in ("cpu", "reference"):
        made = [
            [like(odd_tensor(*spec[:3], seed=i)) for i, spec in enumerate(specs)]
            for specs, _ in groups
        ]
        optimizer = RAdam(
            [{"params": p, **o} for p, (_, o) in zip(made, groups, strict=True)], backend=backend
        )
        for step in range(8):
            for params, (specs, _) in zip(made, groups, strict=True):
                for i, (p, (*_, pattern)) in enumerate(zip(params, specs, strict=True)):
                    present = step >= 6 or pattern >> step & 1
                    layout = ("contiguous", "gaps", "offset", "reversed")[(i + step) % 4]
                    g = odd_tensor(tuple(p.shape), p.dtype, layout, 10 * i + step)
                    p.grad = g if present else None
            optimizer.step()
        runs.append((optimizer, [p for params in made for p in params]))
    (ours, params), (reference, expected) = runs
    for i, (p, q) in enumerate(zip(params, expected, strict=True)):
        assert same_bits(p, q), f"param {i}"
        for key, value in ours.state[p].items():
            assert same_bits(value, reference.state[q][key]), f"{key} of param {i}"
