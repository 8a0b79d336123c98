"""What a profiler sees of a step."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

from bench import step_profile
from radam_kernels import RAdam, stages

NAMES = [f"radam_kernels.{stage}" for stage in step_profile.STAGES]


def optimizer() -> RAdam:
    params = [Parameter(torch.ones(5)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones_like(p)
    return RAdam(params)


def seen(profiler: profile) -> list[str]:
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    return [event.name for event in events if event.name.startswith("radam_kernels.")]


def test_a_profiler_sees_the_stages_in_order():
    ours = optimizer()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        ours.step()
        ours.step()
    assert seen(profiler) == 2 * NAMES


def test_stages_end_where_a_step_is_refused():
    ours = optimizer()
    ours.param_groups[0]["eps"] = -1.0
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with pytest.raises(ValueError, match="eps"):
            ours.step()
        with torch.profiler.record_function("radam_kernels.after"):
            pass
    by_name = {event.name: event for event in profiler.events()}
    assert seen(profiler) == [*NAMES[:1], "radam_kernels.after"]
    assert by_name["radam_kernels.after"].cpu_parent is None, "not within the stage that failed"


def test_nobody_is_told_where_nobody_listens(monkeypatch):
    assert stages.listen() is None
    monkeypatch.setattr(stages, "record_function", None)  # would fail if it were called
    optimizer().step()


def test_nvtx_is_told_where_a_tool_has_asked_for_it(monkeypatch):
    told = []

    class Range:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            told.append(self.name)

        def __exit__(self, *error: object) -> None:
            told.append(f"end of {self.name}")

    monkeypatch.setattr(stages, "_NVTX", True)
    monkeypatch.setattr(torch.cuda.nvtx, "range", Range)
    optimizer().step()
    assert told == [text for name in NAMES for text in (name, f"end of {name}")]


def test_the_profile_names_all_stages_and_leaves_a_trace(tmp_path, capsys):
    trace = tmp_path / "trace.json"
    options = ["--case", "1,000 tensors of 64 float32", "--device", "cpu", "--steps", "3"]
    assert step_profile.main([*options, "--trace", str(trace), "--new-gradients"]) == 0
    printed = capsys.readouterr().out
    for row in (*step_profile.STAGES, "the rest", "step()"):
        assert f"\n{row} " in printed
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert set(NAMES) <= names


def test_nsys_missing_is_said_plainly(tmp_path):
    script = Path(step_profile.__file__).with_name("nsys.sh")
    (tmp_path / "bash").symlink_to(shutil.which("bash"))
    done = subprocess.run(
        [str(script)], env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 3
    assert "nsys is not on PATH" in done.stderr
