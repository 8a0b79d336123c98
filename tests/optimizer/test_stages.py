"""The stages of a step, as profilers show them."""

import pytest
import torch
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

from radam_kernels import RAdam, stages

NAMES = ["radam_kernels.plan", "radam_kernels.update"]


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


def test_without_a_profiler_no_range_is_made(monkeypatch):
    assert stages.listen() is None
    monkeypatch.setattr(stages, "record_function", None)  # would fail if it were called
    optimizer().step()


def test_an_nvtx_tool_gets_a_range_for_each_stage(monkeypatch):
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
