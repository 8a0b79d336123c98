"""capturable=True: step counts on the device of the parameters give the same steps."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from radam_kernels import RAdam, available_backends, launch, repair
from radam_kernels.backends import reference, triton_
from tests.helpers import GPU, every_device, same_bits

needs_triton = pytest.mark.skipif(
    available_backends()["triton"] is not None, reason="triton does not work here"
)
every_backend = pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("cpu", "cpu"),
        ("reference", "cpu"),
        pytest.param("triton", "cpu", marks=needs_triton),  # interpreted
        *(pytest.param(name, "cuda", marks=GPU) for name in ("cuda", "triton", "reference")),
    ],
)
SHAPES = [(5,), (), (0,), (300, 2), (4097,)]


def make(device="cpu", dtype=torch.float32, seed=0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in SHAPES]


def set_grads(params: list[Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p)


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """The same bits; on a GPU, whose logarithm differs, scalars may be off by one ulp."""
    if ours[0].device.type == "cpu":
        return all(map(same_bits, ours, theirs))
    return all(
        torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(ours, theirs, strict=True)
    )


@every_backend
@pytest.mark.parametrize("beta2", [0.9, 0.999, 0.9999])
def test_steps_are_those_of_counts_on_the_host(backend, device, beta2):
    a, b = make(device), make(device)
    options = dict(betas=(0.9, beta2), weight_decay=0.1, backend=backend)
    ours = RAdam([{"params": a[:2]}, {"params": a[2:], "lr": 0.1}], capturable=True, **options)
    host = RAdam([{"params": b[:2]}, {"params": b[2:], "lr": 0.1}], **options)
    for i in range(12):
        for params, stepper in ((a, ours), (b, host)):
            set_grads(params, i)
            if i % 3 == 1:
                params[1].grad = None  # falls behind
            stepper.step()
        assert same(a, b)
    assert ours.state[a[0]]["step"] == 12
    assert ours.state[a[1]]["step"] == 8


@every_device
def test_a_learning_rate_in_a_tensor_is_read_at_each_step(device):
    a, b = make(device), make(device)
    lr = torch.tensor(0.5, device=device)
    ours, host = RAdam(a, lr=lr, capturable=True), RAdam(b, lr=0.5)
    for i in range(8):
        lr.fill_(0.5 / (i + 1))
        host.param_groups[0]["lr"] = lr.item()
        for params, stepper in ((a, ours), (b, host)):
            set_grads(params, i)
            stepper.step()
    assert same(a, b)


@every_device
def test_the_state_is_torchs_and_goes_there_and_back(device):
    a, b = make(device), make(device)
    ours, theirs = RAdam(a, capturable=True), torch.optim.RAdam(b)
    for i in range(7):
        set_grads(a, i)
        ours.step()
    step = ours.state[a[0]]["step"]
    assert (step.shape, step.dtype, step.device) == ((), torch.float32, a[0].device)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    again = RAdam(make(device))
    again.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert again.param_groups[0]["capturable"] is True
    back = again.state[again.param_groups[0]["params"][0]]["step"]
    assert (back.item(), back.dtype, back.device) == (7, torch.float32, a[0].device)


@every_device
def test_counts_move_when_capturable_is_edited(device):
    a, b = make(device), make(device)
    ours, host = RAdam(a), RAdam(b)
    for i in range(9):
        ours.param_groups[0]["capturable"] = 3 <= i < 6
        for params, stepper in ((a, ours), (b, host)):
            set_grads(params, i)
            stepper.step()
        assert ours.state[a[0]]["step"].device.type == (device if 3 <= i < 6 else "cpu")
    assert ours.state[a[0]]["step"] == 9
    assert same(a, b)


def test_an_invalid_count_is_left_and_its_parameter_too():
    params = make()
    for backend in ("cpu", "reference"):
        ours = RAdam(params, capturable=True, backend=backend)
        set_grads(params, 0)
        ours.step()
        ours.state[params[0]]["step"].fill_(-5)
        before = [p.detach().clone() for p in params]
        ours.step()
        assert torch.equal(params[0], before[0])
        assert not torch.equal(params[3], before[3])
        assert ours.state[params[0]]["step"] == -5
        assert ours.state[params[3]]["step"] == 2


def test_counts_that_share_memory_are_refused():
    params = make()
    ours = RAdam(params, capturable=True)
    set_grads(params, 0)
    ours.step()
    ours.state[params[3]]["step"] = ours.state[params[0]]["step"]
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"step of param \d of group 0 shares memory with step of"):
        ours.step()
    assert all(map(torch.equal, params, before))
    assert ours.state[params[0]]["step"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(betas=(0.9, 1.5)), "beta2: expected 0 <= beta2 < 1, got 1.5"),
        (dict(eps=float("nan")), "eps: expected a number >= 0, got nan"),
        (dict(rho_threshold=3.0), "rho_threshold: expected at least 4.0"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_moves(options, message):
    params = make()
    ours = RAdam(params, capturable=True)
    set_grads(params, 0)
    ours.step()
    ours.param_groups[0].update(options)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=message):
        ours.step()
    assert all(map(torch.equal, params, before))
    assert ours.state[params[0]]["step"] == 1


def test_state_made_during_a_capture_is_refused(monkeypatch):
    params = make()
    ours = RAdam(params, capturable=True)
    set_grads(params, 0)
    monkeypatch.setattr(repair, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"param 0 of group 0 .*step once before the capture"):
        ours.step()
    assert not ours.state
    monkeypatch.undo()
    ours.step()
    monkeypatch.setattr(repair, "is_capturing", lambda device: True)
    ours.state[params[3]]["step"] = 1  # would have to become a tensor
    with pytest.raises(RuntimeError, match="param 3 of group 0"):
        ours.step()


# GradScaler


def amp_steps(device: str, capturable: bool, backend="auto", unscale=False, dtype=torch.float32):
    """Nine steps under a scaler, of which the fourth has an infinite gradient."""
    params = make(device, dtype)
    ours = RAdam(params, lr=0.1, capturable=capturable, backend=backend)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**12, growth_interval=3)
    scaler.scale(torch.ones((), device=device))  # makes the scale a tensor
    for i in range(9):
        set_grads(params, i, scaler.get_scale())
        if i == 3:
            params[3].grad[0, 0] = float("inf")
        if unscale:
            scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
    return params, ours, scaler


@every_backend
@pytest.mark.parametrize("unscale", [False, True])
def test_a_scaler_gets_the_steps_of_its_default_path(backend, device, unscale):
    a, ours, scaler = amp_steps(device, True, backend, unscale)
    b, host, other = amp_steps(device, False, backend, unscale)
    assert same(a, b)
    assert ours.state[a[0]]["step"] == host.state[b[0]]["step"] == 8
    assert scaler.get_scale() == other.get_scale()
    assert not {"grad_scale", "found_inf"} & set(vars(ours))


@every_device
def test_gradients_stay_scaled_where_the_step_unscales_them(device):
    params = make(device)
    ours = RAdam(params, capturable=True)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    scaler.scale(sum(p.sum() for p in params)).backward()
    scaler.step(ours)
    assert all((p.grad == 1024).all() for p in params)
    torch.testing.assert_close(ours.state[params[0]]["exp_avg"], torch.full_like(params[0], 0.1))


@every_device
def test_without_amp_scaling_the_scaler_unscales_before_the_step(device):
    params = make(device)
    ours = RAdam(params, capturable=True, amp_scaling=False)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    for inf_at in (None, 3):
        for p in params:
            p.grad = None
        scaler.scale(sum(p.sum() for p in params)).backward()
        if inf_at is not None:
            params[inf_at].grad[0, 0] = float("inf")
        scaler.step(ours)
        scaler.update()
        assert all((p.grad == 1).all() for i, p in enumerate(params) if i != inf_at)
        assert ours.state[params[0]]["step"] == 1
    torch.testing.assert_close(ours.state[params[0]]["exp_avg"], torch.full_like(params[0], 0.1))


@every_backend
@pytest.mark.parametrize("found_inf", [0.0, 1.0, 2.0])
def test_found_inf_of_several_devices_may_be_two(backend, device, found_inf):
    params = make(device)
    ours = RAdam(params, capturable=True, backend=backend)
    set_grads(params, 0)
    ours.step()
    before = [p.detach().clone() for p in params]
    moments = ours.state[params[0]]["exp_avg"].clone()
    ours.grad_scale = None
    ours.found_inf = torch.tensor(found_inf)  # may be on another device
    ours.step()
    stepped = found_inf == 0
    assert ours.state[params[0]]["step"] == 1 + stepped
    assert torch.equal(params[0], before[0]) is not stepped
    assert torch.equal(ours.state[params[0]]["exp_avg"], moments) is not stepped


def test_a_scaler_takes_its_default_path_if_a_group_counts_on_the_host():
    params = make()
    groups = [{"params": params[:2]}, {"params": params[2:], "capturable": True}]
    ours = RAdam(groups)
    assert not ours._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    set_grads(params, 0, 8.0)
    scaler.step(ours)
    assert ours.state[params[0]]["step"] == ours.state[params[3]]["step"] == 1
    params[0].grad.fill_(float("inf"))
    scaler.update()
    scaler.step(ours)
    assert ours.state[params[0]]["step"] == ours.state[params[3]]["step"] == 1


@pytest.mark.parametrize(
    ("options", "remedy"),
    [({}, "capturable=True"), ({"capturable": True, "amp_scaling": False}, "amp_scaling=True")],
)
def test_a_found_inf_that_would_be_ignored_is_refused(options, remedy):
    params = make()
    ours = RAdam(params, **options)
    set_grads(params, 0)
    ours.found_inf = torch.tensor(1.0)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=f"only a step with .*{remedy}.* reads them"):
        ours.step()
    assert all(map(torch.equal, params, before))


def test_a_refused_step_leaves_no_found_inf_behind():
    params = make()
    ours = RAdam(params, capturable=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(sum(p.sum() for p in params)).backward()
    ours.param_groups[0]["eps"] = float("nan")
    with pytest.raises(ValueError, match="eps"):
        scaler.step(ours)
    ours.param_groups[0]["eps"] = 1e-8
    scaler.step(ours)
    torch.testing.assert_close(ours.state[params[0]]["exp_avg"], torch.full_like(params[0], 0.1))


@every_backend
def test_a_found_inf_of_another_dtype_is_read_as_it_is(backend, device):
    params = make(device)
    ours = RAdam(params, capturable=True, backend=backend)
    set_grads(params, 0)
    for _ in range(20):
        ours.grad_scale = torch.tensor(2.0, dtype=torch.float64)
        ours.found_inf = torch.tensor(0.0, dtype=torch.float64)
        ours.step()
    assert ours.state[params[0]]["step"] == 20
    host = RAdam(others := make(device), backend=backend)
    set_grads(others, 0, 0.5)
    for _ in range(20):
        host.step()
    torch.testing.assert_close(params, others)


@every_device
def test_a_float64_count_is_loaded_as_it_is(device):
    ours = RAdam(make(device), capturable=True)
    set_grads(ours.param_groups[0]["params"], 0)
    ours.step()
    for state in ours.state.values():
        state["step"] = torch.tensor(2.0**40 + 1, dtype=torch.float64, device=device)
    again = RAdam(make(device), capturable=True)
    again.load_state_dict(ours.state_dict())
    step = again.state[again.param_groups[0]["params"][0]]["step"]
    assert (step.item(), step.dtype) == (2.0**40 + 1, torch.float64)


class _Bucket:
    """What launch() asks of a bucket in a capture."""

    def __init__(self, device_type: int, capturable: bool) -> None:
        self.device = (device_type, 0)
        self.capturable = capturable


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ((len, _Bucket(2, False)), "construct RAdam with capturable=True"),
        ((len, _Bucket(1, True)), "some parameters are on the CPU"),
        ((reference, _Bucket(2, True)), "the reference backend waits"),
    ],
)
def test_what_a_replay_would_not_do_is_refused(step, reason):
    with pytest.raises(RuntimeError, match=reason):
        launch._check_capture([(len, _Bucket(2, True)), step])


# Counts on the device by Triton


@needs_triton
@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_triton_follows_the_cpu_kernel(dtype, device):
    results = []
    for backend, where in (("triton", device), ("cpu", "cpu")):
        params = make(where, dtype)
        groups = [
            dict(params=params[:2], maximize=True, betas=(0.5, 0.9), lr=torch.tensor(0.02)),
            dict(
                params=params[2:4],
                weight_decay=0.1,
                decoupled_weight_decay=True,
                decouple_lr=True,
                initial_lr=0.5,
            ),
            dict(params=params[4:], rectification="exact", degenerated_to_sgd=False),
        ]
        groups[0]["lr"] = groups[0]["lr"].to(where)
        ours = RAdam(groups, lr=0.05, betas=(0.9, 0.99), capturable=True, backend=backend)
        for i in range(14):
            set_grads(params, i, 64.0)
            if i % 5 == 1:
                params[1].grad = None  # falls behind
            ours.grad_scale = torch.tensor(64.0, device=where)
            ours.found_inf = torch.tensor(float(i == 9), device=where)
            groups[0]["lr"].mul_(0.9)
            ours.step()
        results.append([t.cpu() for p in params for t in (p.detach(), *ours.state[p].values())])
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {}
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    assert [int(results[0][i]) for i in range(1, len(results[0]), 4)] == [13, 10, 13, 13, 13]


@needs_triton
@every_device
@pytest.mark.parametrize("size", [8, 256, 264, 4000])
def test_bytes_arrive_as_arguments_of_launches(size, device):
    rows = torch.randint(0, 256, (size,), dtype=torch.uint8).numpy().tobytes()
    arrived = triton_.upload_by_arguments(torch.device(device))(rows)
    assert arrived.dtype == torch.int64
    assert arrived.cpu().numpy().tobytes() == rows


@needs_triton
@every_device
def test_what_only_a_capture_launches_is_loaded_by_the_step_before(device, monkeypatch):
    loaded = []
    upload = triton_.upload_by_arguments
    monkeypatch.setattr(
        triton_, "upload_by_arguments", lambda device: loaded.append(device) or upload(device)
    )
    triton_._load_upload.cache_clear()
    params = make(device)
    ours = RAdam(params, capturable=True, backend="triton")
    for i in range(2):
        set_grads(params, i)
        ours.step()
    assert [device.type for device in loaded] == [device]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_count_beyond_whole_numbers_is_skipped(backend):
    param = Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = RAdam([param], backend=backend, capturable=True)
    optimizer.step()
    optimizer.state[param]["step"].fill_(2.0**54)
    before = param.detach().clone()
    optimizer.step()
    assert torch.equal(param, before)
