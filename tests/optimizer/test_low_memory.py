"""Master weights, stochastic rounding and 8-bit moments, as a user of the optimizer meets them."""

import copy
import io
import itertools
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.optim import RAdam as TorchRAdam

import radam_kernels
from radam_kernels import RAdam, formats, layout
from tests.helpers import give_gradients, params_of, randn, same_bits, saved, take_steps

BF16 = torch.bfloat16
OPTIONS = [
    dict(master_weights=32),
    dict(master_weights=24),
    dict(stochastic_rounding=True),
    dict(master_weights=32, state_dtype=BF16),
    dict(master_weights=32, state_dtype=BF16, stochastic_rounding=True),
    dict(stochastic_rounding=True, state_dtype=BF16),
    dict(master_weights=24, state_dtype="block8"),
    dict(stochastic_rounding=True, state_dtype="block8"),
    dict(state_dtype="block8"),
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
BLOCK8 = dict(master_weights=24, state_dtype="block8")
SR16 = dict(master_weights=32, state_dtype=BF16, stochastic_rounding=True)


def narrow_parameters() -> list[Parameter]:
    """bfloat16 parameters of several shapes and layouts, one of them not dense."""
    shapes = [(257,), (4, 5), (), (0,), (3, 80), (1000, 7)]
    params = [Parameter(randn(*shape, seed=i).to(BF16)) for i, shape in enumerate(shapes)]
    params[4].data = params[4].data.t()
    params.append(Parameter(randn(20, 20, seed=9).to(BF16)[:, ::2]))
    return params


def state_of(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    return optimizer.state[param]


def assert_same_training(a: RAdam, b: RAdam) -> None:
    """Every bit of the parameters and of their states is the same."""
    for p, q in zip(params_of(a), params_of(b), strict=True):
        assert same_bits(p.detach(), q.detach())
        assert state_of(a, p).keys() == state_of(b, q).keys()
        for key, value in state_of(a, p).items():
            assert value.dtype == state_of(b, q)[key].dtype, key
            assert torch.equal(value.contiguous(), state_of(b, q)[key].contiguous()), key


# Master weights


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_training_with_masters_of_32_bits_is_that_of_float32_parameters(backend):
    narrow = narrow_parameters()
    wide = [Parameter(p.detach().float()) for p in narrow]
    kind = dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True, backend=backend)
    ours, full = RAdam(narrow, master_weights=32, **kind), RAdam(wide, **kind)
    for number in range(200 if backend == "cpu" else 20):
        give_gradients(ours, number)
        for p, q in zip(narrow, wide, strict=True):
            q.grad = p.grad.float()
        ours.step()
        full.step()
    for p, q, master in zip(narrow, wide, ours.master_params(), strict=True):
        assert master.dtype == torch.float32
        assert same_bits(master, q.detach())
        assert ((p - q).abs() <= q.abs() * 2**-8).all()
        for key in ("exp_avg", "exp_avg_sq"):
            assert same_bits(
                state_of(ours, p)[key].contiguous(), state_of(full, q)[key].contiguous()
            )


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("value", [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.5])
def test_a_weight_set_by_hand_has_no_wild_master(bits, value):
    """A stale remainder is worth half a last place at most, and never makes NaN of zero or inf."""
    p = Parameter(randn(300).to(BF16))
    optimizer = RAdam([p], lr=0.1, master_weights=bits)
    take_steps(optimizer, 10)
    before = p.detach().clone()
    with torch.no_grad():
        p[::2] = value
    [master] = optimizer.master_params()
    assert torch.allclose(master[1::2], before[1::2].float(), rtol=2**-8)
    if value != value:
        assert master[::2].isnan().all()
    elif value in (0.0, -0.0):
        assert (master[::2].abs() < 2.0**-126).all()
        assert torch.equal(master[::2].signbit(), p.detach()[::2].signbit())
    elif abs(value) == float("inf"):  # or what rounds to it
        assert (master[::2] / (1 if value > 0 else -1) > 3.38e38).all()
    else:
        assert torch.allclose(master[::2], torch.full((150,), value), rtol=2**-8)
    p.grad = torch.zeros(300, dtype=BF16)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(p.isnan(), torch.arange(300) % 2 == 0 if value != value else p != p)
    if value == value and abs(value) != float("inf"):
        assert torch.equal(p[::2].float(), torch.full((150,), value))


def test_a_pruned_weight_stays_pruned_by_its_mask():
    p = Parameter(randn(256).to(BF16))
    optimizer = RAdam([p], lr=0.1, master_weights=32)
    mask = torch.arange(256) % 3 == 0
    for number in range(5):
        take_steps(optimizer, 1, first=number)
        with torch.no_grad():
            p.mul_(mask)
    assert not p.isnan().any()
    assert (p[~mask] == 0).all()
    assert not next(optimizer.master_params()).isnan().any()


def test_a_stale_remainder_of_a_loaded_model_is_within_half_a_last_place():
    p = Parameter(randn(500).to(BF16))
    optimizer = RAdam([p], lr=0.1, master_weights=32)
    take_steps(optimizer, 5)
    loaded = randn(500, seed=3).to(BF16)
    p.data.copy_(loaded)
    [master] = optimizer.master_params()
    assert (master.bfloat16() - loaded).abs().max() <= (2**-8 * loaded.abs()).max()
    assert ((master - loaded.float()).abs() <= loaded.float().abs() * 2**-8 + 1e-38).all()


def test_masters_change_their_width():
    p = Parameter(randn(500).to(BF16))
    optimizer = RAdam([p], lr=0.01, master_weights=32)
    take_steps(optimizer, 5)
    [wide] = optimizer.master_params()
    group = optimizer.param_groups[0]
    group.update(master_weights=24, lr=0.0)
    take_steps(optimizer, 1)
    assert state_of(optimizer, p)["param_remainder"].dtype == torch.int8
    [narrow] = optimizer.master_params()
    assert ((narrow - wide).abs() <= 2**-15 * wide.abs()).all()
    group.update(master_weights=32)
    take_steps(optimizer, 1)
    assert state_of(optimizer, p)["param_remainder"].dtype == torch.int16
    assert same_bits(next(optimizer.master_params()), narrow)
    group.update(master_weights=None)
    take_steps(optimizer, 1)
    assert "param_remainder" not in state_of(optimizer, p)


@pytest.mark.parametrize("bits", [24, 32])
def test_a_model_that_becomes_float32_keeps_its_masters(bits):
    model = nn.Linear(40, 30).bfloat16()
    optimizer = RAdam(model.parameters(), lr=0.01, master_weights=bits)
    take_steps(optimizer, 5)
    masters = list(optimizer.master_params())
    model.float()
    with torch.no_grad():
        model.weight[0, 0] = torch.pi  # changed since: keeps its value
    before_the_step = list(optimizer.master_params())
    exported = optimizer.master_state_dict(model)
    optimizer.param_groups[0]["lr"] = 0.0
    take_steps(optimizer, 1)
    assert model.weight[0, 0] == torch.tensor(torch.pi)
    masters[0][0, 0] = torch.pi
    for p, master, before in zip(model.parameters(), masters, before_the_step, strict=True):
        assert same_bits(p.detach(), master)
        assert same_bits(p.detach(), before)
        assert "param_remainder" not in state_of(optimizer, p)
    assert same_bits(exported["weight"], masters[0])


def test_masters_loaded_into_a_model_that_became_float32_are_exact():
    model = nn.Linear(40, 30).bfloat16()
    optimizer = RAdam(model.parameters(), lr=0.01, master_weights=32)
    take_steps(optimizer, 5)
    model.float()
    ones = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    optimizer.load_master_state_dict(model, ones)
    optimizer.param_groups[0]["lr"] = 0.0
    take_steps(optimizer, 1)
    assert all((p == 1).all() for p in model.parameters())


def test_a_remainder_that_was_loaded_to_the_cpu_completes_a_weight_on_a_gpu():
    with FakeTensorMode():
        p = Parameter(torch.zeros(30, dtype=BF16, device="cuda"))
        optimizer = RAdam([p], master_weights=32)
        optimizer.state[p]["param_remainder"] = torch.zeros(30, dtype=torch.int16)
        [master] = optimizer.master_params()
        assert master.dtype == torch.float32
        assert master.device == p.device


def test_masters_of_a_remainder_that_does_not_fit_are_refused():
    model = nn.Linear(30, 1, bias=False).bfloat16()
    optimizer = RAdam(model.parameters(), master_weights=32)
    take_steps(optimizer, 2)
    freed = state_of(optimizer, model.weight)["param_remainder"].clone()
    freed.untyped_storage().resize_(0)
    kinds = {"expected shape": torch.ones(1, dtype=torch.int16), "its storage has 0 bytes": freed}
    for message, remainder in kinds.items():
        state_of(optimizer, model.weight)["param_remainder"] = remainder
        with pytest.raises(ValueError, match=f"param_remainder of param 0 .*{message}"):
            list(optimizer.master_params())
        with pytest.raises(ValueError, match=f"param_remainder of weight: .*{message}"):
            optimizer.master_state_dict(model)


def test_bits_may_be_any_number():
    p = Parameter(randn(30).to(BF16))
    optimizer = RAdam([p], master_weights=24.0)
    take_steps(optimizer, 2)
    assert state_of(optimizer, p)["param_remainder"].dtype == torch.int8


def test_float32_parameters_have_no_remainder_and_float16_ones_are_refused():
    p = Parameter(randn(8))
    optimizer = RAdam([p], master_weights=32)
    take_steps(optimizer, 2)
    assert state_of(optimizer, p).keys() == {"step", "exp_avg", "exp_avg_sq"}
    for option in (dict(master_weights=24), dict(stochastic_rounding=True)):
        with pytest.raises(ValueError, match=r"param 0 of group 0.*is for bfloat16.*got float16"):
            RAdam([Parameter(torch.ones(2, dtype=torch.float16))], **option)
        optimizer = RAdam([Parameter(torch.ones(2))], **option)
        with pytest.raises(ValueError, match=r"param 0 of group 1.*got float16"):
            optimizer.add_param_group({"params": [Parameter(torch.ones(2).half())]})
        assert len(optimizer.param_groups) == 1
        [q] = params_of(optimizer)
        q.data = q.data.half()
        give_gradients(optimizer)
        with pytest.raises(ValueError, match=r"param 0 of group 0.*got float16"):
            optimizer.step()
        assert torch.equal(q, torch.ones(2).half())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(master_weights=16), "Invalid master_weights: 16"),
        (dict(seed=-1), r"seed: expected a whole number in \[0, 2\*\*32\), got -1"),
        (dict(seed=2**32), "seed: expected"),
        (dict(seed=1.5), "seed: expected"),
        (dict(seed=float("nan")), "seed: expected"),
        (dict(state_dtype="block4"), "Invalid state_dtype: block4"),
        (dict(state_dtype="float16", stochastic_rounding=True), "can't be combined"),
        (dict(state_dtype=torch.float16, master_weights=32), "can't be combined"),
    ],
    ids=str,
)
def test_bad_options_are_refused_at_construction_and_at_a_step(options, message):
    p = Parameter(torch.ones(2, dtype=BF16))
    with pytest.raises(ValueError, match=message):
        RAdam([p], **options)
    optimizer = RAdam([p])
    optimizer.param_groups[0].update(options)
    give_gradients(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(p, torch.ones(2, dtype=BF16))
    assert not optimizer.state


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("stepped", [False, True], ids=["before a step", "after steps"])
def test_masters_go_to_a_float32_model_and_back(bits, stepped):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(9, 9), nn.Linear(9, 9)
            self.second.weight = self.first.weight
            self.register_buffer("count", torch.ones(3))

    model, other = Tied().bfloat16(), Tied()
    optimizer = RAdam(model.parameters(), lr=0.1, master_weights=bits)
    if stepped:
        take_steps(optimizer, 3)
    exported = optimizer.master_state_dict(model)
    assert exported["first.weight"].dtype == torch.float32
    assert exported["count"].dtype == BF16
    other.load_state_dict(exported)
    for master, p in zip(optimizer.master_params(), other.parameters(), strict=True):
        assert same_bits(master, p.detach())
    with torch.no_grad():
        for p in other.parameters():
            p.add_(randn(*p.shape, seed=5) / 7)
    optimizer.load_master_state_dict(model, other.state_dict())
    for master, p in zip(optimizer.master_params(), other.parameters(), strict=True):
        if bits == 32:
            assert same_bits(master, p.detach())
        else:
            assert ((master - p).abs() <= 2**-16 * p.abs()).all()
    take_steps(optimizer, 1)


def test_masters_of_another_model_are_refused():
    model, other = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4).bfloat16()
    optimizer = RAdam(model.parameters(), master_weights=32)
    with pytest.raises(ValueError, match="no parameter of this optimizer"):
        optimizer.master_state_dict(other)
    with pytest.raises(ValueError, match="no parameter of this optimizer"):
        optimizer.load_master_state_dict(other, model.state_dict())


def test_a_float32_state_dict_that_does_not_fit_changes_nothing():
    model = nn.Linear(4, 4).bfloat16()
    optimizer = RAdam(model.parameters(), master_weights=32)
    take_steps(optimizer, 2)
    before = [m.clone() for m in optimizer.master_params()]
    good = {k: v + 1 for k, v in optimizer.master_state_dict(model).items()}
    with pytest.raises(ValueError, match=r"bias: expected shape \(4,\), got \(5,\)"):
        optimizer.load_master_state_dict(model, good | {"bias": torch.ones(5)})
    for a, b in zip(before, optimizer.master_params(), strict=True):
        assert same_bits(a, b)


# Random bits


@every_option
def test_the_reference_gives_the_same_bits(options):
    a, b = (
        RAdam(narrow_parameters(), lr=0.01, backend=name, **options)
        for name in ("cpu", "reference")
    )
    take_steps(a, 12)
    take_steps(b, 12)
    assert_same_training(a, b)


@every_option
def test_training_does_not_depend_on_flat_buffers_or_threads(options):
    def train(threads: int, **more) -> RAdam:
        optimizer = RAdam(
            [p for p in narrow_parameters() if p.is_contiguous()], lr=0.01, **options, **more
        )
        torch.set_num_threads(threads)
        take_steps(optimizer, 6)
        return optimizer

    before = torch.get_num_threads()
    try:
        alone, flat, threaded = train(1), train(1, flatten=True), train(3)
    finally:
        torch.set_num_threads(before)
    assert_same_training(alone, flat)
    assert_same_training(alone, threaded)


@every_option
@pytest.mark.parametrize("at", [1, 5, 6, 9])
def test_a_resumed_training_goes_on_bit_for_bit(options, at):
    whole = RAdam(narrow_parameters(), lr=0.01, seed=3, **options)
    take_steps(whole, 10)
    first = RAdam(narrow_parameters(), lr=0.01, seed=3, **options)
    take_steps(first, at)
    params = [Parameter(p.detach().clone()) for p in params_of(first)]
    for p, q in zip(params, params_of(first), strict=True):
        p.data = q.detach().clone()  # with its strides
    then = RAdam(params, lr=0.5, **options)  # the checkpoint brings lr and the seed
    then.load_state_dict(saved(first.state_dict()))
    take_steps(then, 10 - at, first=at + 1)
    assert_same_training(whole, then)


@every_option
def test_steps_in_backward_draw_the_same_bits(options):
    def train(in_backward: bool) -> RAdam:
        groups = [{"params": [p]} for p in narrow_parameters()[:3]]
        groups.append({"params": [p for p in narrow_parameters()[3:]]})
        optimizer = RAdam(groups, lr=0.01, **options)
        if in_backward:
            optimizer.step_in_backward()
        for number in range(4):
            loss = sum(
                (p * randn(*p.shape, seed=number).to(BF16)).sum() for p in params_of(optimizer)
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    assert_same_training(train(False), train(True))


def test_a_group_added_between_a_backward_and_its_step_draws_too():
    """As it would have if it had been there from the beginning."""

    def train(late: bool) -> RAdam:
        first, second = (Parameter(randn(300, seed=i).to(BF16)) for i in range(2))
        optimizer = RAdam([first], stochastic_rounding=True)
        optimizer.step_in_backward()
        if late:
            first.sum().backward()
        optimizer.add_param_group({"params": [second]})
        if not late:
            first.sum().backward()
        second.sum().backward()
        optimizer.step()
        return optimizer

    assert_same_training(train(False), train(True))


def test_a_seed_gives_other_bits():
    def train(seed: int) -> Tensor:
        p = Parameter(torch.ones(4096, dtype=BF16))
        optimizer = RAdam(
            [p, Parameter(torch.ones(4096, dtype=BF16))], stochastic_rounding=True, seed=seed
        )
        for q in params_of(optimizer):
            q.grad = torch.ones_like(q)
        optimizer.step()
        first, second = params_of(optimizer)
        assert not torch.equal(first, second)  # each parameter has its own
        return p.detach()

    assert torch.equal(train(0), train(0))
    assert not torch.equal(train(0), train(1))
    down = (train(0) < 1).float().mean().item()
    assert 0 < down < 1


def test_small_updates_are_right_on_average():
    """Each is a quarter of what a bfloat16 can show; rounded to nearest, nothing would happen."""
    p = Parameter(torch.ones(1 << 14, dtype=BF16))
    q = Parameter(torch.ones(1 << 14, dtype=BF16))
    small = dict(lr=2**-10, betas=(0.0, 0.0), eps=1e-12)
    stochastic, nearest = RAdam([p], stochastic_rounding=True, **small), RAdam([q], **small)
    for _ in range(64):
        p.grad = q.grad = torch.ones_like(p)
        stochastic.step()
        nearest.step()
    assert torch.equal(q, torch.ones_like(q))
    assert p.float().mean().item() == pytest.approx(1 - 64 * 2**-10, abs=5e-4)


@every_option
def test_capturable_steps_draw_the_same_bits(options):
    def train(capturable: bool) -> RAdam:
        optimizer = RAdam(narrow_parameters(), lr=0.01, capturable=capturable, seed=7, **options)
        take_steps(optimizer, 8)
        return optimizer

    assert_same_training(train(False), train(True))


def test_a_step_that_a_scaler_skips_repeats_its_bits():
    def train(skips: set[int]) -> RAdam:
        optimizer = RAdam(narrow_parameters(), lr=0.01, capturable=True, **SR16)
        for number in range(6):
            give_gradients(optimizer, number)
            if number in skips:
                optimizer.grad_scale = torch.ones(())
                optimizer.found_inf = torch.ones(())
                optimizer.step()
                del optimizer.grad_scale, optimizer.found_inf
            optimizer.step()
        return optimizer

    assert_same_training(train(set()), train({1, 4}))


# Moments of 8 bits


def test_the_state_has_the_bytes_that_are_promised():
    def size(**options) -> float:
        p = Parameter(randn(128 * 100).to(BF16))
        optimizer = RAdam([p], **options)
        take_steps(optimizer, 1)
        tensors = [p.detach(), *(v for k, v in state_of(optimizer, p).items() if k != "step")]
        return sum(t.nbytes for t in tensors) / p.numel()

    exponents = 2 / 128
    assert size(state_dtype="block8", master_weights=32) == 6 + exponents
    assert size(state_dtype="block8", master_weights=24) == 5 + exponents
    assert size(state_dtype="block8") == 4 + exponents
    assert size(master_weights=32) == 12
    assert size(**SR16) == 8
    assert size(stochastic_rounding=True, state_dtype=BF16) == 6


def test_one_infinite_gradient_costs_the_128_weights_of_its_block():
    p = Parameter(randn(1000).to(BF16))
    optimizer = RAdam([p], lr=0.01, **BLOCK8)
    take_steps(optimizer, 3)
    give_gradients(optimizer, 4)
    p.grad[300] = float("inf")
    optimizer.step()
    assert p.isnan().sum() <= 1
    take_steps(optimizer, 1)
    expected = torch.zeros(1000, dtype=torch.bool)
    expected[256:384] = True
    assert torch.equal(p.isnan(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128])
def test_wide_and_complex_parameters_ignore_the_formats(dtype):
    def train(**options) -> RAdam:
        optimizer = RAdam([Parameter(randn(30, dtype=dtype))], lr=0.01, **options)
        take_steps(optimizer, 8)
        return optimizer

    for options in (BLOCK8, dict(stochastic_rounding=True)):
        assert_same_training(train(), train(**options))


def test_groups_have_formats_of_their_own():
    embedding, weight, norm = (Parameter(randn(64, seed=i).to(BF16)) for i in range(3))
    groups = [
        {"params": [embedding], "state_dtype": None},
        {"params": [weight]},
        {"params": [norm], "master_weights": 32, "state_dtype": torch.float32},
    ]
    optimizer = RAdam(groups, lr=0.01, **BLOCK8)
    take_steps(optimizer, 3)
    kinds = [
        {k: v.dtype for k, v in state_of(optimizer, p).items() if k != "step"}
        for p in (embedding, weight, norm)
    ]
    assert [kind["exp_avg"] for kind in kinds] == [torch.float32, torch.uint8, torch.float32]
    assert [kind["param_remainder"] for kind in kinds] == [torch.int8, torch.int8, torch.int16]
    assert "exp_avg_exponent" not in kinds[0]
    assert "exp_avg_exponent" in kinds[1]


def test_formats_changed_in_the_middle_of_a_training_are_converted():
    p = Parameter(randn(700).to(BF16))
    optimizer = RAdam([p], lr=1e-3)
    take_steps(optimizer, 5)
    reference = {key: state_of(optimizer, p)[key].clone() for key in ("exp_avg", "exp_avg_sq")}
    group = optimizer.param_groups[0]
    chain = [
        dict(state_dtype="block8"),
        dict(state_dtype=None),
        dict(state_dtype="bfloat16", stochastic_rounding=True),
        dict(state_dtype="block8", stochastic_rounding=False),
        dict(state_dtype="float16"),
    ]
    for options in chain:
        group.update(options, betas=(1 - 1e-12, 1 - 1e-12), lr=0.0)
        take_steps(optimizer, 1)
        for key, value in reference.items():
            got = layout.decoded(state_of(optimizer, p), key).float()
            assert (got - value).abs().max() <= 0.15 * value.abs().max(), (options, key)
    assert state_of(optimizer, p).keys() == {"step", "exp_avg", "exp_avg_sq"}


# Checkpoints


@every_option
def test_a_checkpoint_has_plain_tensors_and_changes_nothing(options):
    optimizer = RAdam(narrow_parameters(), lr=0.01, **options)
    take_steps(optimizer, 7)
    live = copy.deepcopy(optimizer.state)
    checkpoint = optimizer.state_dict()
    for p, own in zip(params_of(optimizer), checkpoint["state"].values(), strict=True):
        assert own.keys() <= {"step", "exp_avg", "exp_avg_sq", "param_remainder"}
        for key in ("exp_avg", "exp_avg_sq"):
            assert own[key].is_floating_point()
            assert own[key].shape == p.shape
    for before, now in zip(live.values(), optimizer.state.values(), strict=True):
        assert before.keys() == now.keys()
        for key, value in before.items():
            assert torch.equal(value, now[key])


def test_threads_save_at_once():
    optimizer = RAdam([Parameter(randn(300, seed=i).to(BF16)) for i in range(20)], **BLOCK8)
    take_steps(optimizer, 1)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            saved_at_once = [threads.submit(optimizer.state_dict) for _ in range(200)]
    finally:
        sys.setswitchinterval(interval)
    for checkpoint in saved_at_once:
        for own in checkpoint.result()["state"].values():
            assert own["exp_avg"].dtype == BF16


@every_option
def test_torch_loads_our_checkpoints_and_we_load_torchs(options):
    ours = RAdam([Parameter(randn(300).to(BF16))], lr=0.01, **options)
    take_steps(ours, 7)
    [p] = params_of(ours)
    expected = {k: layout.decoded(state_of(ours, p), k) for k in ("exp_avg", "exp_avg_sq")}
    q = Parameter(p.detach().clone())
    torchs = TorchRAdam([q], lr=0.01)
    torchs.load_state_dict(saved(ours.state_dict()))
    for key, value in expected.items():
        assert same_bits(state_of(torchs, q)[key], value.to(BF16))
    take_steps(torchs, 3)  # keeps a remainder, which it has cast to bfloat16
    r = Parameter(q.detach().clone())
    again = RAdam([r], lr=0.01, **options)
    again.load_state_dict(saved(torchs.state_dict()))
    assert all(torch.equal(m, q.detach().float()) for m in again.master_params())
    take_steps(again, 1)
    assert state_of(again, r).keys() == state_of(ours, p).keys()


def test_a_float32_checkpoint_goes_into_8_bits_and_back():
    wide = RAdam([Parameter(randn(1000).to(BF16))], lr=0.01)
    take_steps(wide, 8)
    [p] = params_of(wide)
    narrow = RAdam([Parameter(p.detach().clone())], lr=0.01, **BLOCK8)
    narrow.load_state_dict(saved(wide.state_dict()))
    [q] = params_of(narrow)
    narrow.param_groups[0].update(betas=(0.0, 0.0))
    take_steps(narrow, 1)
    assert state_of(narrow, q)["exp_avg"].dtype == torch.uint8
    back = RAdam([Parameter(p.detach().clone())], lr=0.01)
    back.load_state_dict(saved(narrow.state_dict()))
    [r] = params_of(back)
    assert state_of(back, r)["exp_avg"].dtype == torch.float32
    assert torch.equal(
        state_of(back, r)["exp_avg"], layout.decoded(state_of(narrow, q), "exp_avg").float()
    )


def test_8_bits_that_were_saved_come_back_the_same():
    optimizer = RAdam(narrow_parameters(), lr=0.01, **BLOCK8)
    take_steps(optimizer, 9)
    live = copy.deepcopy(list(optimizer.state.values()))
    optimizer.load_state_dict(saved(optimizer.state_dict()))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    # A step with gradients of zero and betas of almost one encodes what was loaded.
    for p in params_of(optimizer):
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["betas"] = (1 - 1e-16, 1 - 1e-16)
    optimizer.step()
    for before, now in zip(live, optimizer.state.values(), strict=True):
        assert torch.equal(before["param_remainder"], now["param_remainder"])
        for key in ("exp_avg", "exp_avg_sq"):
            assert same_bits(layout.decoded(before, key), layout.decoded(now, key)), key


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
@every_option
def test_a_copied_optimizer_goes_on(options, way):
    model = nn.Linear(40, 30).bfloat16()
    optimizer = RAdam(model.parameters(), lr=0.01, **options)
    take_steps(optimizer, 3)
    if way == "pickle":
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        _, other = torch.load(file, weights_only=False)
    else:
        _, other = copy.deepcopy((model, optimizer))
    take_steps(optimizer, 3, first=4)
    take_steps(other, 3, first=4)
    assert_same_training(optimizer, other)


@pytest.mark.parametrize("exponents", [{}, None, torch.zeros(3), "missing"], ids=str)
def test_float_moments_found_under_8_bits_are_encoded_whoever_put_them_there(exponents):
    """As ZeRO does, which assigns a checkpoint's state without load_state_dict()."""
    optimizer = RAdam([Parameter(randn(300).to(BF16))], lr=0.01, **BLOCK8)
    take_steps(optimizer, 3)
    other = RAdam([Parameter(params_of(optimizer)[0].detach().clone())], lr=0.01, **BLOCK8)
    [p] = params_of(other)
    own = saved(optimizer.state_dict())["state"][0]
    if exponents != "missing":
        own |= {"exp_avg_exponent": exponents, "exp_avg_sq_exponent": exponents}
    other.state[p] = own
    take_steps(optimizer, 1, first=4)
    take_steps(other, 1, first=4)
    assert_same_training(optimizer, other)


def test_codes_without_exponents_are_refused():
    p = Parameter(randn(300).to(BF16))
    optimizer = RAdam([p], lr=0.01, **BLOCK8)
    take_steps(optimizer, 2)
    exponents = state_of(optimizer, p).pop("exp_avg_exponent")
    give_gradients(optimizer)
    before = p.detach().clone()
    with pytest.raises(ValueError, match="codes of block8 without exponents"):
        optimizer.step()
    assert torch.equal(p, before)
    state_of(optimizer, p)["exp_avg_exponent"] = exponents
    optimizer.step()


def test_exponents_whose_memory_was_freed_are_refused_when_the_format_changes():
    p = Parameter(randn(300).to(BF16))
    optimizer = RAdam([p], **BLOCK8)
    take_steps(optimizer, 2)
    state_of(optimizer, p)["exp_avg_exponent"].untyped_storage().resize_(0)
    optimizer.param_groups[0]["state_dtype"] = None
    with pytest.raises(ValueError, match=r"exp_avg_exponent of param 0 .*its storage has 0 bytes"):
        optimizer.step()


@pytest.mark.parametrize("key", ["param_remainder", "exp_avg_exponent"])
def test_shared_memory_is_refused(key):
    params = [Parameter(randn(300, seed=i).to(BF16)) for i in range(2)]
    optimizer = RAdam(params, lr=0.01, **BLOCK8)
    take_steps(optimizer, 2)
    state_of(optimizer, params[0])[key] = state_of(optimizer, params[1])[key]
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match=f"{key} of param 0 .*shares memory with {key} of"):
        optimizer.step()
    assert torch.equal(params[0], before)


@every_option
def test_a_gradient_may_be_its_own_parameter(options):
    """As for plain dtypes: every element is read before it is written."""

    def train(copied: bool) -> RAdam:
        params = [p for p in narrow_parameters() if p.is_contiguous()]
        optimizer = RAdam(params, lr=0.01, **options)
        for _ in range(3):
            for p in params:
                p.grad = p.detach().clone() if copied else p.detach()
            optimizer.step()
        return optimizer

    assert_same_training(train(True), train(False))


def test_a_remainder_of_another_shape_is_refused():
    p = Parameter(randn(30).to(BF16))
    optimizer = RAdam([p], master_weights=32)
    take_steps(optimizer, 2)
    state_of(optimizer, p)["param_remainder"] = torch.zeros(29, dtype=torch.int16)
    with pytest.raises(ValueError, match=r"param_remainder of param 0.*expected shape \(30,\)"):
        optimizer.step()


def test_a_step_that_fails_leaves_the_state_as_it_was():
    good, bad = Parameter(randn(300).to(BF16)), Parameter(randn(5).to(BF16))
    optimizer = RAdam([good, bad], lr=0.01, **BLOCK8)
    give_gradients(optimizer)
    bad.grad = None
    bad.grad = torch.ones(5, dtype=BF16).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert not optimizer.state


def test_the_functional_step_takes_plain_dtypes_only():
    p, g = torch.ones(4, dtype=BF16), torch.ones(4, dtype=BF16)
    codes = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="must be float32, bfloat16, float16 or float64"):
        radam_kernels.radam_(
            p, g, codes, codes.clone(), step=1, lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, BF16])
@pytest.mark.parametrize("grad", [torch.float16, torch.float32, BF16])
def test_gradients_of_any_dtype_train_8_bits(dtype, grad):
    """Those that no kernel takes are copied to float32."""
    if not hasattr(Tensor, "grad_dtype"):
        pytest.skip("this torch has no gradients of another dtype than their parameter")

    def train(kind: torch.dtype) -> RAdam:
        p = Parameter(randn(300).to(dtype))
        p.grad_dtype = kind
        optimizer = RAdam([p], lr=0.01, state_dtype="block8")
        for number in range(3):
            p.grad = randn(300, seed=number).to(grad).to(kind)
            optimizer.step()
        return optimizer

    assert_same_training(train(grad), train(torch.float32))


def test_every_format_of_a_parameter_is_one_that_the_kernels_take():
    for dtype, options in itertools.product((torch.float32, BF16, torch.float16), OPTIONS):
        if dtype == torch.float16 and ({"master_weights", "stochastic_rounding"} & options.keys()):
            continue
        optimizer = RAdam([Parameter(randn(200).to(dtype))], lr=0.01, backend="cpu", **options)
        take_steps(optimizer, 2)


def test_blocks_belong_to_the_parameter_and_not_to_its_shape():
    """128 elements in the order of memory."""
    flat = Parameter(randn(900).to(BF16))
    square = Parameter(flat.detach().clone().view(30, 30).t())
    a, b = RAdam([flat], lr=0.01, **BLOCK8), RAdam([square], lr=0.01, **BLOCK8)
    for number in range(4):
        flat.grad = randn(900, seed=number).to(BF16)
        square.grad = flat.grad.view(30, 30).t()
        a.step()
        b.step()
    assert torch.equal(flat, square.t().reshape(-1))
    for key in ("exp_avg_exponent", "exp_avg_sq_exponent"):
        assert torch.equal(state_of(a, flat)[key], state_of(b, square)[key])
        assert len(state_of(a, flat)[key]) == formats.blocks(900)
