"""bench.timing: what is wrong, refused, too slow or lost is told, and the rest is timed fairly."""

import math
import time
from itertools import count
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from bench import timing, training
from bench.cases import CONVNET, Case
from bench.correctness import check, refusals
from bench.optimizers import ADAM, BY_NAME, CPU, CUDA, RADAM, WARM_UP, Optimizer, select
from bench.timing import OUT_OF_TIME, ROUNDS, CudaClock, DeviceLostError, Sample, find_lead

DEVICE = torch.device("cpu")
CASE = Case("small", shapes=[(300,), (5, 7)])
FEW = [BY_NAME[name] for name in (CPU, ADAM, RADAM)]


class Tail(torch.optim.RAdam):
    """Steps the last element of a tensor wrongly."""

    def step(self):
        super().step()
        for param in self.param_groups[0]["params"]:
            param.data[-1] += 1


pytestmark = pytest.mark.usefixtures("one_thread")
WRONG = Optimizer("wrong", Tail, radam=True)


def measure(optimizers, case=CASE, seconds=0.0, **options):
    rows = timing.measure(case, optimizers, DEVICE, seconds=seconds, **options)
    return {row["optimizer"]: row for row in rows}


@pytest.mark.parametrize("late", [True, False])
def test_where_all_are_refused_nothing_is_allocated(monkeypatch, late):
    monkeypatch.setattr(type(CASE), "make", lambda *_: pytest.fail("tensors were made"))
    why = {"status": "wrong", "reason": "why"}
    refused = {} if late else {row.name: why for row in FEW}
    rows = measure(FEW, deadline=0 if late else math.inf, refused=refused)
    assert list(rows) == [row.name for row in FEW]
    assert {row["reason"] for row in rows.values()} == {timing.OUT_OF_TIME if late else "why"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_radam_here_agrees_with_the_formula(dtype):
    rows = [row for row in select(dtype, "cpu", 2) if row.radam and not row.absent("cpu")]
    assert len(rows) >= 5
    assert refusals(rows, DEVICE, dtype) == {}


def test_a_tail_that_is_stepped_wrongly_has_no_time():
    assert check(WRONG, DEVICE, torch.float32).startswith("param of tensor 0 is off by")
    found = measure([*FEW, WRONG])
    assert "param of tensor" in found["wrong"]["reason"]
    assert [row["status"] for row in found.values() if "ms" not in row] == ["wrong"]


def test_rows_have_their_bytes_bandwidth_and_ratios_in_the_same_rounds():
    found = measure(FEW)
    assert found[CPU]["rounds"] == ROUNDS
    for row in found.values():
        assert row["bytes"] == 28 * 335
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
        assert row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert row["vs_adam_fused"] == pytest.approx(found[ADAM]["ms"] / row["ms"])
        assert row["vs_radam_foreach"] == pytest.approx(found[RADAM]["ms"] / row["ms"])
        assert row["limit_share"] == pytest.approx(found["stream of 28 B"]["ms"] / row["ms"])


def test_what_is_absent_refused_or_too_large_gets_a_reason(monkeypatch):
    def refuse(params, lr):
        raise NotImplementedError("capturable=True\nand more")

    rows = [*FEW, Optimizer("no", refuse), Optimizer("missing", refuse, package="no-such-package")]
    found = measure(rows, refused={RADAM: {"status": "wrong", "reason": "said before"}})
    assert found["no"]["reason"] == "NotImplementedError: capturable=True"
    assert found["missing"]["reason"] == "no-such-package is not installed"
    assert found[RADAM]["reason"] == "said before"
    assert found[CPU]["vs_radam_foreach"] is None
    large = Case("large", shapes=[(1 << 26,)])
    assert "up to 32M" in timing.left_out(large, BY_NAME["torch RAdam(for-loop)"], "cpu")
    assert "only" in timing.left_out(CASE, BY_NAME[CUDA], "cpu")
    monkeypatch.setattr(timing.psutil, "virtual_memory", lambda: SimpleNamespace(available=2 << 30))
    assert timing.left_out(large, BY_NAME[CPU], "cpu") == ""
    assert timing.left_out(large, BY_NAME[RADAM], "cpu").startswith("memory: needs 1.")
    monkeypatch.setattr(timing.psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 30))
    assert "memory" in timing.left_out(large, BY_NAME[CPU], "cpu")


def test_a_device_without_room_is_told(monkeypatch):
    monkeypatch.setattr(Case, "make", MagicMock(side_effect=torch.OutOfMemoryError("no room")))
    assert all("no room" in row["reason"] for row in measure(FEW).values())


def test_all_take_turns_and_the_judged_have_five_rounds_whatever_they_take(monkeypatch):
    turns = []

    def turn(self, player, seconds):
        turns.append(player.row.name)
        player.samples.append(Sample(1.0, 1.0, False))

    monkeypatch.setattr(timing._Turns, "_turn", turn)
    slow = Optimizer("slow", lambda params, lr: torch.optim.SGD(params, lr))
    measure([BY_NAME[ADAM], slow])
    assert turns == [ADAM, "slow", *[ADAM] * (ROUNDS - 1)]


def test_time_that_runs_out_costs_the_last_rows(monkeypatch):
    clock = SimpleNamespace(monotonic=count().__next__, perf_counter=time.perf_counter)
    monkeypatch.setattr(timing, "time", clock)
    first, *_, last = measure(FEW, deadline=12).values()
    assert first["status"] == "measured"
    assert last["reason"] == OUT_OF_TIME


def test_gradients_are_new_and_caches_swept_where_that_is_asked_for(monkeypatch):
    seen = []
    real = timing.HostClock.sample
    params = CASE.make(DEVICE)

    def sample(self, step, lead):
        seen.append((params[0].grad, self._sweep.nbytes))
        return real(self, step, lead)

    monkeypatch.setattr(timing.HostClock, "sample", sample)
    monkeypatch.setattr(Case, "make", lambda self, device: params)
    measure([BY_NAME[ADAM]])
    assert len({id(grad) for grad, _ in seen}) == 1
    assert max(size for _, size in seen) == 1
    seen.clear()
    case = Case("c", shapes=CASE.shapes, new_gradients=True, cold=True)
    row = measure([BY_NAME[ADAM]], case)[ADAM]
    assert (row["gradients"], row["caches"]) == ("new", "cold")
    assert {size for _, size in seen} == {timing.HOST_SWEEP}
    assert len({id(grad) for grad, _ in seen}) >= row["count"]


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_gradients_of_another_dtype_are_converted_within_the_step_of_a_peer():
    found = measure(FEW, Case("offload", shapes=[(64,)], grad_dtype=torch.bfloat16))
    assert {row["status"] for row in found.values()} == {"measured"}
    assert found[CPU]["bytes"] == 26 * 64
    assert "converts" in found[ADAM]["note"]


def test_a_dry_run_takes_the_path_of_a_gpu():
    found = measure([BY_NAME[name] for name in (CUDA, ADAM, f"{CUDA}, graph")], dry_run=True)
    assert {"host_us", "host_bound", "host_vs_adam_fused"} <= found[CUDA].keys()
    assert found[CUDA]["caches"] == "cold"
    assert "copy of 28 B" in found
    assert "CUDA graphs need a GPU" in found[f"{CUDA}, graph"]["reason"]


def test_a_device_that_fails_is_lost(monkeypatch):
    def fail(params, lr):
        monkeypatch.setattr(timing.HostClock, "synchronize", fail)
        raise RuntimeError("CUDA error: an illegal memory access")

    with pytest.raises(DeviceLostError, match=r"broken, small: the device failed"):
        measure([Optimizer("broken", fail)])


@pytest.mark.parametrize(("host", "lead"), [(0.002, 0.0041), (0.2, 0.0)])
def test_the_device_sleeps_until_the_host_is_ahead_where_that_helps(host, lead):
    clock = SimpleNamespace(sample=lambda step, lead: Sample(0.001, host, lead < host))
    assert find_lead(clock, lambda: None) == pytest.approx(lead)


def test_a_step_is_timed_between_events_behind_a_sleep_and_a_sweep(monkeypatch):
    did = []
    event = MagicMock(record=lambda: did.append("event"), elapsed_time=lambda other: 2.0)
    cuda = MagicMock(Event=lambda enable_timing: event)
    cuda._sleep = lambda cycles: did.append(f"sleep {cycles}")
    cuda.get_device_properties().L2_cache_size = 1 << 20
    monkeypatch.setattr(torch, "cuda", cuda)
    clock = CudaClock(DEVICE)
    assert clock._sweep.nbytes == 3 << 20
    did.clear()
    clock._sweep = SimpleNamespace(fill_=lambda value: did.append("sweep"))
    sample = clock.sample(lambda: did.append("step"), 0.001)
    assert did == ["sleep 500000", "sweep", "event", "step", "event"]
    assert sample.device == 0.002


def test_a_graph_is_captured_after_a_warm_up_and_replayed(monkeypatch):
    cuda, params = MagicMock(), [MagicMock()]
    monkeypatch.setattr(torch, "cuda", cuda)
    params[0].device.type = "cuda"
    params[0].grad.dtype = params[0].dtype
    Optimizer("graph", lambda *_: cuda.optimizer, form="graph").start(params).step()
    names = [name for name, _, _ in cuda.mock_calls]
    captured = names.index("graph")
    assert names[:captured].count("optimizer.step") == WARM_UP
    assert names[captured:].count("optimizer.step") == 1
    assert names[-1] == "CUDAGraph().replay"


def test_training_tells_the_share_of_the_step_and_ends_in_time():
    case = Case(CONVNET, kind="training")
    options = dict(seconds=0, deadline=math.inf, refused={}, dry_run=True)
    rows = training.measure(case, FEW, DEVICE, **options)
    assert len(rows) == len(FEW)
    for row in rows:
        assert row["tensors"] == 26
        assert 0 < row["step_share"] < 1
        assert row["step_share"] == pytest.approx(row["ms"] / row["iteration_ms"])
    begin = time.monotonic()
    rows = training.measure(case, FEW, DEVICE, **{**options, "deadline": 0, "seconds": 3})
    assert {row["reason"] for row in rows} == {OUT_OF_TIME}
    assert time.monotonic() < begin + 3
