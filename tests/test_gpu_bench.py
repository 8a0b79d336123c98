"""How bench times a step: wrong results, refusals, a lack of time and a lost device are told."""

import json
import re
import time
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from bench import clocks, contenders, formula, gpu_time, turns
from bench.cases import DTYPES, Case, cases
from bench.clocks import CudaClock, HostClock, Sample
from bench.contenders import ADAM, CUDA, GRAPH, RADAM, Contender, Started
from bench.models import MODELS
from bench.turns import OUT_OF_TIME

CPU = torch.device("cpu")
CASE = Case("small", torch.float32, [(300,), (5, 7)])
FAST = [
    c
    for c in contenders.contenders(torch.float32, "cpu")
    if c.make is None or c.name in (CUDA, ADAM, RADAM)
]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No kernels that are interpreted, and few rounds."""
    monkeypatch.setattr(turns, "ROUNDS", 2)
    real = contenders.contenders
    fast = {c.name for c in FAST} | {GRAPH}
    monkeypatch.setattr(gpu_time, "contenders", lambda *a: [c for c in real(*a) if c.name in fast])


def measure(peers, case=CASE, clock=None, **options):
    options = {"deadline": time.monotonic() + 60, "seconds": 5, "refused": {}, **options}
    return turns.measure(case, peers, clock or HostClock(), CPU, **options)


class Forgetful(torch.optim.RAdam):
    """Never steps the last element of a tensor."""

    def step(self):
        kept = [p[-1].clone() for p in self.param_groups[0]["params"]]
        super().step()
        with torch.no_grad():
            for p, last in zip(self.param_groups[0]["params"], kept, strict=True):
                p[-1] = last


def contender(name, make, **options):
    return Contender(name, 28, make, **options)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_the_radams_pass_and_a_tail_that_is_not_stepped_does_not(dtype):
    for peer in contenders.contenders(dtype, "cpu"):
        if peer.radam and peer.name in (CUDA, RADAM, contenders.CUDA16, contenders.RADAM_LOOP):
            assert formula.check(peer.start, CPU, dtype) is None, peer.name
    late = contender("late", lambda params, lr: Forgetful(params, lr=lr), radam=True)
    assert re.match("param of tensor 0 is off by", formula.check(late.start, CPU, dtype))


def test_the_formula_is_that_of_torch_in_float64():
    param = torch.randn(50, dtype=torch.float64).requires_grad_()
    param.grad = torch.randn_like(param)
    optimizer = torch.optim.RAdam([param], lr=0.1, betas=(0.8, 0.99))
    optimizer.step()
    for _ in range(9):  # on both sides of the threshold
        assert formula.wrong(optimizer, optimizer.step, [param]) is None


def test_a_wrong_result_has_no_speed():
    late = contender("late", lambda params, lr: Forgetful(params, lr=lr), radam=True)
    row = measure([*FAST, late])["late"]
    assert "param" in row["wrong"]
    assert "device_ms" not in row


def test_what_is_refused_is_told_and_the_others_are_measured():
    def refuse(params, lr):
        raise NotImplementedError("capturable=True\nand more")

    rows = measure([*FAST, contender("no", refuse)], refused={RADAM: {"wrong": "said before"}})
    assert rows["no"]["not_measured"] == "NotImplementedError: capturable=True"
    assert rows[RADAM]["wrong"] == "said before"
    assert rows[CUDA]["vs_radam_foreach"] is None
    assert rows[CUDA]["device_ms"]["count"] >= turns.STEPS[0]


def test_a_list_without_room_is_told():
    def make(device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB.")

    big = SimpleNamespace(name="big", make=make, elements=1)
    rows = measure(FAST, case=big)
    assert all("out of memory" in row["not_measured"] for row in rows.values())


def test_no_time_leaves_a_whole_file_without_numbers(tmp_path):
    chosen = cases(dry_run=True)[:3]
    found = gpu_time.run(chosen, CPU, tmp_path / "gpu.json", time.monotonic() - 1, 1)
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
    assert list(found["cases"]) == [case.name for case in chosen]
    for case in found["cases"].values():
        assert all(row["not_measured"] == OUT_OF_TIME for row in case["rows"].values())


def test_time_that_runs_out_in_a_case_costs_the_last_rows(monkeypatch):
    ticks = count()
    monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    rows = list(measure(FAST, deadline=12, seconds=0).values())
    assert "device_ms" in rows[0]
    assert rows[-1]["not_measured"] == OUT_OF_TIME


def test_a_lost_device_ends_the_run_but_not_the_file(tmp_path, monkeypatch):
    class Lost(HostClock):
        def sample(self, step, lead):
            if step.__class__.__name__ != "function":
                self.lost = True
                raise RuntimeError("CUDA error: an illegal memory access")
            return super().sample(step, lead)

        def synchronize(self):
            if hasattr(self, "lost"):
                raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(gpu_time, "make_clock", lambda device: Lost())
    chosen = cases(dry_run=True)[:2]
    file = tmp_path / "gpu.json"
    gpu_time.run(chosen, CPU, file, time.monotonic() + 60, 1)
    for case in json.loads(file.read_text())["cases"].values():
        assert all("the device failed" in row["not_measured"] for row in case["rows"].values())


def test_resuming_measures_what_lacked_time_and_keeps_the_rest(tmp_path, monkeypatch):
    chosen, file = cases(dry_run=True)[:2], tmp_path / "gpu.json"
    soon = time.monotonic() + 60
    before = gpu_time.run(chosen, CPU, file, soon, 0.01)
    kept = before["cases"][chosen[0].name]
    assert "device_ms" in kept["rows"][CUDA]
    before["cases"][chosen[1].name]["rows"][CUDA] = {"not_measured": OUT_OF_TIME}
    file.write_text(json.dumps(before))
    again = gpu_time.run(chosen, CPU, file, soon, 0.01, resume=True)["cases"]
    assert again[chosen[0].name] == kept
    assert "device_ms" in again[chosen[1].name]["rows"][CUDA]
    monkeypatch.setattr(gpu_time.machine, "measured_fingerprint", lambda root: "other sources")
    other = gpu_time.run(chosen, CPU, file, 0, 0.01, resume=True)["cases"]
    assert other[chosen[0].name]["rows"][CUDA] == {
        "not_measured": OUT_OF_TIME, "bytes_per_element": 28
    }  # fmt: skip


def test_the_sizes_and_models_are_all_there():
    real = {case.name: case for case in cases(dry_run=False)}
    assert list(real) == [case.name for case in cases(dry_run=True)]
    for dtype in DTYPES:
        assert {f"2^{power} {dtype}" for power in range(10, 32, 2)} <= real.keys()
        for name, model in MODELS.items():
            assert real[f"{name} {dtype}"].elements == model.parameters
    assert real["2^28 bfloat16"].elements == 1 << 28


@pytest.mark.parametrize(("host", "lead"), [(0.002, 0.0041), (0.2, 0.0)])
def test_the_device_sleeps_until_the_host_is_ahead_where_that_helps(host, lead):
    clock = SimpleNamespace(sample=lambda step, lead: Sample(0.001, host, lead < host))
    assert clocks.find_lead(clock, lambda: None) == pytest.approx(lead)


def test_a_step_is_timed_between_events_behind_a_sleep_and_a_sweep(monkeypatch):
    did = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            did.append("event")

        def elapsed_time(self, other):
            return 2.0

        def query(self):
            return False

        def synchronize(self):
            pass

    for name, fake in {
        "Event": Event,
        "_sleep": lambda cycles: did.append(f"sleep {cycles}"),
        "synchronize": lambda: None,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1 << 20),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    clock = CudaClock(CPU)
    assert clock._sweep.nbytes == 3 << 20
    did.clear()
    clock._sweep = SimpleNamespace(fill_=lambda value: did.append("sweep"))
    sample = clock.sample(lambda: did.append("step"), 0.001)
    assert did == ["sleep 500000", "sweep", "event", "step", "event"]
    assert sample.device == 0.002
    assert not sample.waited


def test_a_graph_is_captured_after_a_warm_up_and_replayed(monkeypatch):
    did = []

    class Context:
        def __init__(self, *_):
            pass

        def __enter__(self):
            did.append("begin")

        def __exit__(self, *_):
            did.append("end")

        def wait_stream(self, other):
            pass

    graph = SimpleNamespace(replay=lambda: did.append("replay"))
    for name, fake in {
        "Stream": Context, "stream": Context, "graph": Context,
        "current_stream": Context, "CUDAGraph": lambda: graph,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    optimizer = SimpleNamespace(step=lambda: did.append("step"))
    params = [SimpleNamespace(device=SimpleNamespace(type="cuda"))]
    started: Started = contender("graph", lambda *_: optimizer, graph=True).start(params)
    started.step()
    warm = ["step"] * contenders.WARM
    assert did == ["begin", *warm, "end", "begin", "step", "end", "replay"]


def test_one_step_for_a_profiler(capsys, monkeypatch):
    assert gpu_time.main(["--dry-run", "--once", "2^10 float32"]) == 0
    assert f"one step of {CUDA}, 280 bytes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu_time.main(["--dry-run", "--once", "2^11 float32"])


def test_wrong_results_are_told_at_the_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(formula, "radam_float64", lambda p, g, m, v, **_: (p, m, v))
    words = ["--dry-run", "--out", str(tmp_path), "--only", r"2\^10 float32"]
    assert gpu_time.main(words) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"WRONG: {CUDA}, 2^10 float32: param of tensor 0 is off")


def test_without_a_gpu_it_says_how_to_try(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_time.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err
