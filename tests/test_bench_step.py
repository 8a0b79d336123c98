"""`pytest bench --benchmark-only`: what it selects, checks, leaves out and writes down."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import contenders, limits, memory, others, stream
from bench.cases import ALL_DTYPES, Case, all_cases
from bench.contenders import ADAM, COMPILED, CPU, FLAT, OPTIMI, RADAM, Contender, everyone
from bench.gpu_time import fault
from bench.models import ALL_MODELS

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    find_spec("pytest_benchmark") is None, reason="needs pytest-benchmark"
)


@pytest.fixture(scope="module")
def bench_step():
    return pytest.importorskip("bench.bench_step")


class Forgetful(torch.optim.RAdam):
    """Never steps the first element of a tensor."""

    def step(self):
        kept = [p[0].clone() for p in self.param_groups[0]["params"]]
        super().step()
        with torch.no_grad():
            for p, first in zip(self.param_groups[0]["params"], kept, strict=True):
                p[0] = first


def row(bench_step, contender, shapes=((300,), (64,))):
    case = Case("small", torch.float32, list(shapes))
    return bench_step.Row("cpu", "float32", "small", case, contender)


def test_a_tiny_selection_runs_and_writes_what_a_report_needs(tmp_path):
    file = tmp_path / "out.json"
    words = "float32 and one_1K and (stream or radam_kernels_cpu or Adam_fused)"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "bench"]
    command += ["--benchmark-only", f"--benchmark-json={file}", "-k", words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "share of the limit" in done.stdout
    results = json.loads(file.read_text())
    assert results["machine_info"]["radam_kernels"]["cpu"]["threads"] >= 1
    rows = {r["params"]["contender"]: r for r in results["benchmarks"]}
    assert {r["group"] for r in rows.values()} == {"cpu, 2^10 float32"}
    assert {CPU, CPU + FLAT, ADAM} <= rows.keys()
    ours = rows[CPU]
    assert ours["name"] == "test_step[cpu-float32-one_1K-radam_kernels_cpu]"
    extra, median = ours["extra_info"], ours["stats"]["median"]
    assert extra["bytes"] == 28 << 10
    assert extra["gb_s"] == pytest.approx(extra["bytes"] / median / 1e9)
    peer = rows[ADAM]["stats"]["median"]
    assert extra["vs_adam_fused"] == pytest.approx(peer / median)
    assert extra["vs_radam_foreach"] is None  # not among the selected
    if not stream.why_not():
        assert extra["limit"] == "streaming loop"
        assert extra["share_of_limit"] == pytest.approx(extra["gb_s"] / extra["limit_gb_s"])


def test_plain_pytest_runs_the_tests_alone():
    assert 'testpaths = ["tests"]\n' in (ROOT / "pyproject.toml").read_text()
    assert not list((ROOT / "tests").rglob("bench_*.py"))


def test_nothing_in_bench_is_named_like_a_module_of_the_standard_library():
    assert not {f.stem for f in (ROOT / "bench").glob("*.py")} & sys.stdlib_module_names


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ALL_DTYPES.values(), ids=str)
def test_one_list_serves_both_devices(dtype, device_type):
    found = {c.name: c for c in everyone(dtype, device_type)}
    assert len(found) == len(everyone(dtype, device_type))
    assert {f"radam_kernels {device_type}", f"radam_kernels {device_type}{FLAT}"} <= found.keys()
    assert {ADAM, RADAM, COMPILED, OPTIMI} <= found.keys()
    wide = {torch.float32: 28, torch.bfloat16: 22, torch.float64: 56}[dtype]
    assert found[f"radam_kernels {device_type}"].bytes == wide
    if device_type == "cuda":
        timed = contenders.contenders(dtype, "cuda")
        assert [c.name for c in everyone(dtype, "cuda")][: len(timed)] == [c.name for c in timed]
    else:
        assert "interprets" in found["radam_kernels triton"].absent


def test_a_peer_that_is_not_there_is_left_out_with_a_word(bench_step, monkeypatch):
    monkeypatch.setattr(contenders, "find_spec", lambda package: None)
    peer = next(c for c in everyone(torch.float32, "cpu") if c.name == OPTIMI)
    with pytest.raises(pytest.skip.Exception, match="optimi is not installed"):
        bench_step.check(row(bench_step, peer))


@pytest.mark.parametrize("dtype", ALL_DTYPES.values(), ids=str)
def test_the_radams_here_pass(dtype):
    for peer in everyone(dtype, "cpu"):
        if peer.radam and not peer.absent and not peer.compiled:
            assert fault(peer, DEVICE, dtype) is None, peer.name


def test_a_wrong_result_fails_before_it_is_timed(bench_step, monkeypatch):
    peer = Contender("late", 28, lambda params, lr: Forgetful(params, lr=lr), radam=True)
    monkeypatch.setattr(bench_step, "everyone", lambda *_: [peer])
    bench_step._fault.cache_clear()
    one = row(bench_step, peer)
    with pytest.raises(pytest.fail.Exception, match="param of tensor 0 is off"):
        bench_step.check(one)
    with pytest.raises(AssertionError, match="param of tensor 0 is off"):
        bench_step.measure(one, one.case.make(DEVICE), benchmark=None)


def test_what_does_not_fit_is_left_out_with_a_word(bench_step, monkeypatch):
    ours, foreach = (
        next(c for c in everyone(torch.float32, "cpu") if c.name == name) for name in (CPU, RADAM)
    )
    monkeypatch.setattr(memory, "available", lambda device: 40 << 30)
    case = all_cases("float32")["one_256M"]
    assert memory.no_room(case, ours, DEVICE) is None
    monkeypatch.setattr(memory, "available", lambda device: 4 << 30)
    assert "2^28 float32 needs" in memory.no_room(case, ours, DEVICE)
    assert memory.no_room(case, ours, DEVICE, held=2 << 30) is None
    assert memory.needs(case, foreach, DEVICE) > memory.needs(case, ours, DEVICE) >= 16 << 28
    with pytest.raises(pytest.skip.Exception, match="memory: small needs"):
        bench_step.check(row(bench_step, ours, shapes=[(1 << 40,)]))


def test_free_memory_is_known():
    assert 0 < memory.available(DEVICE) < 1 << 50


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_the_cases_are_all_there(dtype):
    found = all_cases(dtype)
    for power, short in {10: "1K", 20: "1M", 28: "256M"}.items():
        assert found[f"one_{short}"].elements == 1 << power
    assert len(found["10000_of_64"].shapes) == 10_000
    totals = {case.elements for case in found.values()}
    assert {model.parameters for model in ALL_MODELS.values()} <= totals
    assert "ViT-B-16" in found


def test_16_bit_moments_are_held_against_divisions_where_those_are_slower(monkeypatch):
    if reason := stream.why_not():
        pytest.skip(reason)
    dtype = torch.bfloat16
    params = Case("small", dtype, [(4096,)]).make(DEVICE)
    peer = Contender("narrow", 14, lambda params, lr: torch.optim.RAdam(params, lr=lr))
    optimizer = peer.start(params).optimizer
    for speed, kind in ((1.0, "divisions and square roots in cache"), (1e30, "streaming loop")):
        monkeypatch.setattr(limits, "divisions", lambda _, speed=speed: speed)
        limit = limits.Limit(peer, params, optimizer)
        limit.measure()
        assert limit.against(1.0, 14 * 4096)["limit"] == kind


def test_on_a_gpu_the_limit_is_a_copy_and_both_are_waited_for(monkeypatch):
    did = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: did.append("wait"))
    copy = contenders.Started(lambda: did.append("copy"), None)
    monkeypatch.setattr(Contender, "start", lambda self, params: copy)
    params = [SimpleNamespace(device=SimpleNamespace(type="cuda"))]
    monkeypatch.setattr(limits, "WARM", 0.0)
    monkeypatch.setattr(limits, "SECONDS", 0.0)
    limit = limits.Limit(Contender("ours", 28), params, None)
    limit.measure()
    assert did == ["copy", "wait"] * (1 + limits.PASSES)
    assert limit.against(1.0, 28)["limit"] == "copy"


def test_without_a_compiler_a_row_says_why_it_has_no_limit(monkeypatch):
    monkeypatch.setattr(stream, "why_not", lambda: "no streaming loop: no C++ compiler")
    params = Case("small", torch.float32, [(64,)]).make(DEVICE)
    limit = limits.Limit(Contender("ours", 28), params, None)
    limit.measure()
    found = limit.against(1e-6, 28 * 64)
    assert "no C++ compiler" in found["limit"]
    assert "share_of_limit" not in found
    assert found["gb_s"] == pytest.approx(1.792)


def test_the_work_of_others_is_seen_and_ones_own_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(others, "STAT", tmp_path / "stat")
    monkeypatch.setattr(others.os, "sysconf", lambda name: 100)
    ticks = iter([(0.0, 5.0), (2.0, 6.0)])  # seconds of the clock, and of this process
    now = {}

    def tell(busy):
        (tmp_path / "stat").write_text(f"cpu {busy} 0 0 77 0 0 0 0 0 0\ncpu0 1\n")
        now["wall"], now["own"] = next(ticks)

    monkeypatch.setattr(others.time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(others.time, "process_time", lambda: now["own"])
    tell(busy=1000)
    with others.Others() as seen:
        tell(busy=1250)
    assert seen.cores == pytest.approx(0.75)  # (2.5 s - 1 s) in 2 s
    monkeypatch.setattr(others, "STAT", tmp_path / "none")
    with others.Others() as seen:
        pass
    assert seen.cores is None
