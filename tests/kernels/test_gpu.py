"""What only a GPU can show: the kernels on it, streams, queues, graphs and GradScaler."""

import copy
import gc
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from radam_kernels import RAdam, available_backends, radam_, schedule
from radam_kernels.backends import cuda, triton_
from radam_kernels.backends.upload import DeviceTables, upload_pinned
from radam_kernels.modules import DTYPES, cpu
from radam_kernels.scaling import UNSCALED
from tests.helpers import DTYPE_SETS, GPU, SIZES, dtypes_id, same_bits
from tests.kernels import norms

pytestmark = GPU
MODULES = {"cuda": cuda, "triton": triton_}
USUAL = dict(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8)


@pytest.fixture(params=["cuda", "triton"])
def backend(request) -> str:
    if reason := available_backends()[request.param]:
        pytest.fail(f"{request.param} does not work on this GPU: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """An error of a launch shows at the next synchronization: at the latest here."""
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()


def tensors(sizes, codes, seed=0) -> list[list[Tensor]]:
    """Params, grads, exp_avgs and exp_avg_sqs on the CPU, for `.cuda()` to bring over."""
    generator = torch.Generator().manual_seed(seed)
    lists = []
    for stream, code in enumerate((codes[0], codes[1], codes[2], codes[2])):
        lists.append([])
        for size in sizes:
            values = torch.randn(size, generator=generator)
            values = values.square() if stream == 3 else values
            lists[-1].append(values.to(DTYPES[code]))
    return lists


def on_gpu(lists: list[list[Tensor]], offset: int = 0, device="cuda") -> list[list[Tensor]]:
    """Copies that start `offset` elements behind a multiple of 16 bytes."""
    moved = []
    for stream in lists:
        moved.append([])
        for t in stream:
            room = torch.full((len(t) + offset + 16,), 777.0, dtype=t.dtype, device=device)
            moved[-1].append(room[offset : offset + len(t)].copy_(t))
    return moved


def guards_hold(lists: list[list[Tensor]], offset: int) -> bool:
    """Whether the memory around the tensors of on_gpu() is unchanged."""
    for t in itertools.chain(*lists):
        size = len(t)
        room = t.as_strided((size + offset + 16,), (1,), 0)
        if not ((room[:offset] == 777).all() and (room[offset + size :] == 777).all()):
            return False
    return True


@pytest.mark.parametrize("codes", DTYPE_SETS, ids=dtypes_id)
def test_every_backend_gives_the_same_bits(backend, codes):
    truth = tensors((*SIZES, 2**20 + 3), codes)
    on_device = on_gpu(truth)
    slow = on_gpu(truth)
    host = [[t.clone() for t in stream] for stream in truth]
    for t, more in ((1, {}), (1, {"degenerated_to_sgd": False}), (8, {"weight_decay": 0.1})):
        more = dict(more, step=t, **USUAL)
        radam_(*on_device, **more, backend=backend)
        radam_(*slow, **more, backend="reference")
        radam_(*host, **more, backend="cpu")
        radam_(*truth, **more, backend="reference")
        for ours, *others in zip(
            *(itertools.chain(*x) for x in (on_device, slow, host, truth)), strict=True
        ):
            assert all(same_bits(ours, other) for other in others)
    assert guards_hold(on_device, 0)


@pytest.mark.sanitize
@pytest.mark.parametrize("offset", range(1, 9))
@pytest.mark.parametrize("codes", [(0, 0, 0), (1, 1, 0), (1, 1, 1), (3, 3, 3)], ids=dtypes_id)
def test_tensors_that_start_anywhere(backend, codes, offset):
    truth = tensors((0, 1, 5, 257, 5000), codes)
    ours = on_gpu(truth, offset)
    more = dict(USUAL, step=7, weight_decay=0.1, decoupled_weight_decay=True, maximize=True)
    radam_(*ours, **more, backend=backend)
    radam_(*truth, **more, backend="reference")
    for a, b in zip(itertools.chain(*ours), itertools.chain(*truth), strict=True):
        assert same_bits(a, b)
    assert guards_hold(ours, offset)


@pytest.mark.parametrize("count", [1000, 5000])
def test_many_segments(backend, count):
    check_segments(backend, count)


@pytest.mark.sanitize
@pytest.mark.parametrize("count", [1, 2, 200])
def test_few_segments(backend, count):
    check_segments(backend, count)


def check_segments(backend, count):
    truth = tensors([*(i % 71 for i in range(count)), 20_000], (0, 0, 0))
    ours = on_gpu(truth)
    radam_(*ours, **USUAL, step=9, backend=backend)
    radam_(*truth, **USUAL, step=9, backend="reference")
    for a, b in zip(itertools.chain(*ours), itertools.chain(*truth), strict=True):
        assert same_bits(a, b)


def test_more_elements_than_an_int32_can_count(backend):
    numel = 2**31 + 4099
    free, _ = torch.cuda.mem_get_info()
    if free < 10 * numel:
        pytest.skip(f"needs {10 * numel >> 30} GiB of GPU memory, {free >> 30} are free")
    four = [torch.empty(numel, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
    for t in four:
        t.normal_().square_()
    ends = (slice(0, 5000), slice(2**31 - 5000, 2**31 + 4099))
    parts = [[t[end].cpu() for end in ends] for t in four]
    radam_(*four, **USUAL, step=8, backend=backend)
    radam_(*parts, **USUAL, step=8, backend="cpu")
    for t, (a, b) in zip(four, parts, strict=True):
        assert same_bits(t[ends[0]], a)
        assert same_bits(t[ends[1]], b)


# The norm of gradients


def make_gradients(device="cuda") -> norms.Gradients:
    generator = torch.Generator().manual_seed(0)
    sizes = [0, *(i % 71 for i in range(1000)), 2**20 + 3]
    return norms.Gradients([torch.randn(n, generator=generator).to(device) for n in sizes])


@pytest.mark.sanitize
@pytest.mark.parametrize("norm_type", norms.NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_is_exact_and_the_same_each_time(backend, dtype, norm_type):
    gradients = make_gradients()
    gradients.tensors = [t.to(dtype) for t in gradients.tensors]
    found = [MODULES[backend].power_sum(gradients.bucket, norm_type) for _ in range(5)]
    assert len({x.item() for x in found}) == 1
    norms.assert_close(found[0].item(), gradients.tensors, norm_type, norms.TRITON_ERROR)


def test_the_norm_of_more_elements_than_an_int32_can_count(backend):
    numel = 2**31 + 4099
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * numel:
        pytest.skip(f"needs {3 * numel >> 30} GiB of GPU memory, {free >> 30} are free")
    large = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    large[:: 2**20] = 3.0
    large[-1] = 4.0
    count = (numel + 2**20 - 1) // 2**20
    assert MODULES[backend].power_sum(norms.Gradients([large]).bucket, 2.0) == 9.0 * count + 16


def test_the_norm_does_not_wait_for_the_device(backend):
    gradients = make_gradients()
    MODULES[backend].power_sum(gradients.bucket, 2.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients.tensors[3] = torch.ones(7, device="cuda")
        MODULES[backend].power_sum(gradients.bucket, 2.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# The host runs ahead of the device


def sleep() -> None:
    torch.cuda._sleep(200_000_000)  # about a tenth of a second


def make(shapes=((5,), (300, 2), (4097,), (2**20 + 1,)), device="cuda") -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(s, generator=generator).to(device)) for s in shapes]


def new_grads(params: list[Parameter], seed: int) -> None:
    """Gradients at other addresses than the last, which are given back at once."""
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, ((7 * seed + 3 * i) % 11 - 5) / 10)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_hundred_steps_queued_behind_a_sleeping_kernel(backend, capturable):
    # The queue holds about a thousand launches: with counts by torch's operations, of ten steps.
    within = 5 if backend == "triton" and capturable else 20
    results = []
    for queued in (False, True):
        params = make()
        optimizer = RAdam(params, lr=0.1, backend=backend, capturable=capturable)
        stray = []
        for i in range(101):
            if i == 1 and queued:  # the first step loads code
                torch.cuda.synchronize()
                asleep = torch.cuda.Event()
                sleep()
                asleep.record()
            new_grads(params, i)
            optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
            optimizer.step()
            # Takes what a table may have given back too early, and overwrites it.
            for n in (1, 8, 24, 36, 600):
                stray.append(torch.full((n,), -1, dtype=torch.int64, device="cuda"))
            if not queued:
                torch.cuda.synchronize()
            elif i == within:
                assert not asleep.query(), "the host waited for the device"
        results.append(params)
    assert all(map(same_bits, *results))


def test_steps_go_to_the_current_stream(backend):
    params, other = make(), make()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    ours, plain = RAdam(params, backend=backend), RAdam(other, backend=backend)
    with torch.cuda.stream(stream):
        for i in range(8):
            if i == 1:  # the first step loads code, and makes what it needs
                torch.cuda.synchronize()
                sleep()
            new_grads(params, i)
            ours.step()
        done = torch.cuda.Event()
        done.record()
    assert not done.query(), "the host waited, or the steps went to another stream"
    for i in range(8):
        new_grads(other, i)
        plain.step()
    stream.synchronize()
    assert all(map(same_bits, params, other))


def test_a_step_does_not_wait_for_the_device(backend):
    params = make()
    optimizer = RAdam(params, backend=backend)
    for i in range(3):
        new_grads(params, i)
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        new_grads(params, 3)
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_device(backend):
    params, other = make(device="cuda:1"), make(device="cuda:0")
    both = [*params, *other]
    optimizer = RAdam(both, backend=backend)
    for i in range(8):
        new_grads(both, i)
        optimizer.step()
        assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    assert not any(same_bits(a, b) for a, b in zip(params, make(), strict=True))
    host = make(device="cpu")
    on_cpu = RAdam([*host, *(h2 := make(device="cpu"))])
    for i in range(8):
        new_grads([*host, *h2], i)
        on_cpu.step()
    assert all(map(same_bits, both, [*host, *h2]))


# Counts on the device


@pytest.mark.parametrize("form", schedule.FORMS)
@pytest.mark.parametrize("beta2", [0.0, 0.9, 0.999, 0.9999, 0.999999])
def test_scalars_made_on_the_device_are_the_schedules_within_an_ulp(form, beta2):
    steps = [*range(40), 100, 999, 10_000, 10**6, 2**24 - 1]
    group = dict(
        lr=0.3, betas=(0.9, beta2), eps=1e-8, weight_decay=0.1, decoupled_weight_decay=True,
        maximize=False, rho_threshold=5.0, degenerated_to_sgd=True, rectification=form,
    )  # fmt: skip
    counters = torch.tensor(steps, dtype=torch.float32, device="cuda")
    device, state = counters.device, {}
    for step in counters:
        param, exp_avg, exp_avg_sq = (torch.zeros(1, device=device) for _ in range(3))
        param.grad = torch.zeros_like(param)
        state[param] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    plan = cpu.Plan()
    groups = [{**group, "params": list(state), "capturable": True}]
    assert plan.refresh(groups, state, {}, UNSCALED) == []
    [bucket] = plan.buckets
    stream = torch.cuda.current_stream().cuda_stream
    tables = DeviceTables(upload_pinned(device))
    rows = cuda.advance(cuda._cuda, bucket, tables, device, stream)
    ours = rows.cpu().numpy()
    truth = np.array([schedule.group_scalars(group, t + 1) for t in steps])
    assert (counters.cpu() == torch.tensor(steps) + 1).all()
    ulp = np.spacing(np.abs(truth.astype(np.float32)))
    assert (np.abs(ours.astype(np.float32) - truth.astype(np.float32)) <= ulp).all()
    assert (ours[:, -1] == truth[:, -1]).all(), "the threshold is crossed at the same step"


def captured(
    params: list[Parameter], step: Callable[[], object], grads: list[Tensor]
) -> torch.cuda.CUDAGraph:
    """A graph of one step that copies the gradients from `grads`, after a step to warm up."""
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for p, g in zip(params, grads, strict=True):
            p.grad = g * 1.0  # in the memory of the graph
        step()
    return graph


@pytest.mark.parametrize("many", [False, True], ids=["few tensors", "a thousand tensors"])
def test_a_graph_steps_through_the_threshold_with_new_learning_rates(backend, many):
    shapes = [(64,)] * 1000 if many else [(5,), (300, 2), (2**20 + 1,)]
    params, other = make(shapes), make(shapes)
    lr = torch.tensor(0.1, device="cuda")
    options = dict(lr=lr, capturable=True, weight_decay=0.1, backend=backend)
    ours, plain = RAdam(params, **options), RAdam(other, **options)
    grads = [torch.ones_like(p) for p in params]
    graph = captured(params, ours.step, grads)
    for i in range(12):
        if i > 0:
            lr.fill_(0.1 / (i + 1))
            for j, g in enumerate(grads):
                g.fill_((i + j) % 5 - 2)
            graph.replay()
        for p, g in zip(other, grads, strict=True):
            p.grad = g.clone()
        plain.step()
        assert all(map(same_bits, params, other)), f"step {i + 1}"
    assert ours.state[params[0]]["step"] == 12


def test_a_graph_clips_by_the_norm_at_each_replay(backend):
    params, other = make(), make()
    options = dict(lr=0.1, capturable=True, backend=backend)
    ours, plain = RAdam(params, **options), RAdam(other, **options)
    grads = [torch.ones_like(p) for p in params]

    def step() -> None:
        ours.clip_grad_norm_(0.5)
        ours.step()

    graph = captured(params, step, grads)
    for i in range(9):
        if i > 0:
            for j, g in enumerate(grads):
                g.fill_((i + j) % 5 / 1000)
            graph.replay()
        total = norms.power_sum(grads, 2.0) ** 0.5
        for p, g in zip(other, grads, strict=True):
            p.grad = g * min(1.0, 0.5 / (total + 1e-6))
        plain.step()
    for p, q in zip(params, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_graph_owns_its_tables(backend):
    params, other = make(), make()
    grads = [torch.ones_like(p) for p in params]
    ours = RAdam(params, capturable=True, backend=backend)
    graph = captured(params, ours.step, grads)
    # All that the optimizer keeps on the device but the state is given back and overwritten.
    state = {p: ours.state[p] for p in params}
    del ours
    gc.collect()
    torch.cuda.empty_cache()
    stray = [torch.full((n,), -1, dtype=torch.int64, device="cuda") for n in [50, 500, 5000] * 99]
    for _ in range(9):
        graph.replay()
    plain = RAdam(other, capturable=True, backend=backend)
    for _ in range(10):
        for p, g in zip(other, grads, strict=True):
            p.grad = g.clone()
        plain.step()
    assert all(map(same_bits, params, other))
    assert all(state[p]["step"] == 10 for p in params)
    assert all((t == -1).all() for t in stray)


def test_a_capture_wants_counts_on_the_device_and_a_state():
    params = make()
    host = RAdam(params)
    new_grads(params, 0)
    host.step()
    with (
        pytest.raises(
            RuntimeError, match="the host counts the steps: construct RAdam with capturable=True"
        ),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        host.step()
    assert host.state[params[0]]["step"] == 1
    fresh = RAdam(params, capturable=True)
    with (
        pytest.raises(RuntimeError, match="step once before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        fresh.step()
    assert not fresh.state


def test_a_loaded_state_can_be_captured_at_once():
    params, other = make(), make()
    before = RAdam(other, capturable=True)
    new_grads(other, 0)
    before.step()
    ours = RAdam(params, capturable=True)
    ours.load_state_dict(copy.deepcopy(before.state_dict()))  # a load aliases what fits
    for p, q in zip(params, other, strict=True):
        p.data.copy_(q)
        p.grad = q.grad.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    graph.replay()
    before.step()
    assert all(map(same_bits, params, other))


def test_a_scaler_does_not_wait_for_the_device_either(backend):
    results = []
    for capturable in (True, False):
        params = make()
        optimizer = RAdam(params, capturable=capturable, backend=backend)
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
        scale = scaler.scale(torch.ones((), device="cuda"))
        for i in range(8):
            new_grads(params, i)
            for p in params:
                p.grad.mul_(scale)
            if i == 4:
                params[0].grad[0] = float("inf")
            torch.cuda.set_sync_debug_mode("error" if capturable else "default")
            try:
                scaler.step(optimizer)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            scaler.update(1024.0)
        results.append((params, optimizer.state[params[0]]["step"].item()))
    (ours, count), (other, host_count) = results
    assert count == host_count == 7
    for a, b in zip(ours, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_learning_rate_on_the_host_is_part_of_the_graph():
    params = make()
    ours = RAdam(params, lr=0.5, capturable=True)
    grads = [torch.ones_like(p) for p in params]  # the graph reads them
    graph = captured(params, ours.step, grads)
    ours.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in params]
    graph.replay()
    assert not any(map(same_bits, params, before))
