"""Cases, models, optimizers and the streaming limit are what they say."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bench import cases, optimizers, timing
from bench.cases import all_cases, select
from bench.correctness import check
from bench.goals import GOALS, SHARDED
from bench.models import MODELS
from bench.optimizers import BY_NAME, CPU, OPTIMIZERS, PLAIN
from bench.roofline import Stream, streams

ROOT = Path(__file__).resolve().parents[2]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
KINDS = [  # dtypes of p, g and the moments
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64, torch.float64),
]


@pytest.mark.parametrize("name", MODELS)
def test_models_have_their_published_counts(name):
    shapes = MODELS[name].shapes()
    assert len(shapes) == MODELS[name].tensors
    assert sum(map(prod, shapes)) == MODELS[name].parameters


def test_names_are_unique_and_each_set_has_what_its_goals_ask_for():
    assert len({case.name for case in all_cases()}) == len(all_cases())
    assert len(BY_NAME) == len(OPTIMIZERS)
    sets = {which: {case.name for case in select(which)} for which in ("quick", "full", "gpu")}
    assert sets["quick"] < sets["full"]
    for goal in GOALS:
        assert goal.optimizer in BY_NAME
        missing = set(goal.cases) - sets["gpu" if "cuda" in goal.optimizer else "quick"]
        assert missing <= {
            cases.size(28),
            *SHARDED,
            *(case + cases.CLIPPED for case in SHARDED),
        }  # of a full report
        assert set(goal.cases) <= sets["gpu"] | sets["full"]


def test_sharded_parameters_are_stepped_too():
    case = next(case for case in all_cases() if case.sharded)
    params = case.tiny().make(torch.device("cpu"))
    before = params[0].to_local().clone()
    BY_NAME[CPU].start(params).step()
    assert not torch.equal(params[0].to_local(), before)
    dist.destroy_process_group()


def test_sharded_and_plain_tensors_take_turns():
    case = next(case for case in all_cases() if case.sharded).tiny()
    rows = timing.measure(case, [BY_NAME[CPU], BY_NAME[PLAIN]], torch.device("cpu"), seconds=0)
    by_name = {row["optimizer"]: row for row in rows}
    assert by_name[PLAIN]["vs_plain"] == 1.0
    assert by_name[CPU]["vs_plain"] == by_name[PLAIN]["ms"] / by_name[CPU]["ms"]
    assert not {row.name for row in optimizers.select(torch.float32, "cpu", 2)} & {PLAIN}
    dist.destroy_process_group()


TIERS = [row for row in OPTIMIZERS if row.form == "tier" and row.backend == "cpu"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("tier", TIERS, ids=lambda row: row.name)
def test_a_step_in_a_format_for_low_memory_is_compared_with_float64(tier):
    """Values that are stored wrongly after the last step are found."""
    assert check(tier, torch.device("cpu"), torch.bfloat16) is None

    def fault(key, change):
        def make(params, lr):
            optimizer, steps = tier.make(params, lr), itertools.count(1)

            def step():
                type(optimizer).step(optimizer)
                if next(steps) > optimizers.WARM_UP:
                    for state in optimizer.state.values():
                        state[key].copy_(change(state[key]))

            optimizer.step = step
            return optimizer

        return check(replace(tier, make=make), torch.device("cpu"), torch.bfloat16)

    if "block8" in tier.name:
        assert "exp_avg_sq of tensor 0 is off" in fault("exp_avg_sq_exponent", lambda e: e + 1)
        assert "exp_avg of tensor 0 is off" in fault("exp_avg", lambda codes: codes ^ 128)
    if " SR +" not in tier.name:
        assert "param of tensor 0 is off" in fault("param_remainder", torch.zeros_like)


def test_pytest_times_single_cases_of_bench_and_plain_pytest_none(tmp_path):
    file = tmp_path / "out.json"
    words = ["-m", "pytest", "-p", "no:cacheprovider", "bench", f"--benchmark-json={file}"]
    command = [sys.executable, *words, "-k", "2_10_float32 and (Adam_fused or kernels_cpu)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    rows = json.loads(file.read_text())["benchmarks"]
    assert {row["group"] for row in rows} == {"2^10 float32 on cpu"}
    for row in rows:
        assert row["extra_info"]["gb_s"] == pytest.approx((28 << 10) / row["stats"]["median"] / 1e9)
    assert 'testpaths = ["tests"]\n' in (ROOT / "pyproject.toml").read_text()


def bits(tensor):
    return tensor.view(BITS[tensor.element_size()])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtypes", KINDS)
def test_the_loop_moves_every_element_of_four_streams_once(dtypes, threads):
    torch.set_num_threads(threads)
    sizes = (5, 40_001, 1, 64, 8193)
    wide = [[torch.randint(-(1 << 62), 1 << 62, (size,)) for size in sizes] for _ in range(4)]
    lists = [
        [tensor.to(BITS[dtype.itemsize]).view(dtype) for tensor in tensors]
        for dtype, tensors in zip((*dtypes, dtypes[2]), wide, strict=True)
    ]
    before = [[bits(tensor).clone() for tensor in tensors] for tensors in lists]
    loop = Stream(*lists)
    loop.step()  # changes no value
    for tensors, olds in zip(lists, before, strict=True):
        assert all(torch.equal(bits(t), old) for t, old in zip(tensors, olds, strict=True))
    loop.step(mask=(1 << 64) - 1)  # adds the gradient's bits to p, m and v
    for i, grad in enumerate(before[1]):
        assert torch.equal(bits(lists[1][i]), grad)
        unsigned = grad.long() & 0xFFFF if grad.dtype == torch.int16 else grad
        for which in (0, 2, 3):
            old = before[which][i]
            expected = (old.long() + unsigned.long()).to(old.dtype)
            assert torch.equal(bits(lists[which][i]), expected)


def test_the_loop_runs_on_the_tensors_of_the_optimizer():
    params = cases.Case("", shapes=[(64,)]).make(torch.device("cpu"))
    optimizer = BY_NAME[CPU].start(params).optimizer
    found = streams(params, 28, optimizer.state)
    state = optimizer.state[params[0]]
    expected = (params[0], params[0].grad, state["exp_avg"], state["exp_avg_sq"])
    assert [t[0].data_ptr() for t in found] == [t.data_ptr() for t in expected]
    with pytest.raises(ValueError, match="no loop moves 15 bytes"):
        streams(params, 15, {})
