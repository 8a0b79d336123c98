"""What the kernels are meant to reach, and whether results say that they do."""

from typing import NamedTuple

import pandas as pd

from .cases import CLIPPED, COLD, NEW, model, sharded, size, small
from .optimizers import ADAM, CPU, CPU16, CUDA, RADAM
from .roofline import STREAM, limit_name

ADAM_RATIO, RADAM_RATIO, SHARE = "vs_adam_fused", "vs_radam_foreach", "limit_share"
FLOAT32_RATIO = "vs_float32"
LARGE = [size(power) for power in (26, 28, 30)]  # 64M and more
SIZES = [size(power) for power in range(10, 30, 2)]
HALF = [size(26, "bfloat16")]
LISTS = [model(name) for name in ("ResNet-50", "GPT-2 124M", "Llama 3.2 1B")]
RESNET, SMALL = LISTS[:1], small(1000)
SHARDED = [sharded(300), sharded(300) + NEW]


class Goal(NamedTuple):
    title: str
    least: float
    cases: list[str]
    optimizer: str
    column: str


GOALS = [
    Goal("64M and more, share of a copy of 28 bytes", 0.95, LARGE, CUDA, SHARE),
    Goal(f"64M and more, times {RADAM}", 2.8, LARGE, CUDA, RADAM_RATIO),
    Goal(f"64M and more, times {ADAM}", 1.0, LARGE, CUDA, ADAM_RATIO),
    Goal(f"models, times {ADAM}", 1.1, LISTS, CUDA, ADAM_RATIO),
    Goal(f"models, host, times {ADAM}", 5.0, LISTS, CUDA, "host_vs_adam_fused"),
    Goal("models, host, gradients new", 5.0, [n + NEW for n in LISTS], CUDA, "host_vs_adam_fused"),
    Goal("float32 from 2^26, share of the streaming limit", 0.95, SIZES[8:], CPU, SHARE),
    Goal(f"float32, any size, times {ADAM}", 0.97, SIZES, CPU, ADAM_RATIO),
    Goal(f"float32 to 2^12, times {ADAM}", 2.5, SIZES[:2], CPU, ADAM_RATIO),
    Goal(f"float32, 2^14 and 2^16, times {ADAM}", 2.0, SIZES[2:4], CPU, ADAM_RATIO),
    Goal("bfloat16, share of the limit for 22 bytes", 0.93, HALF, CPU, SHARE),
    Goal("bfloat16 moments too, share of their limit", 0.90, HALF, CPU16, SHARE),
    Goal(
        "32 + bf16 SR, times the step of float32", 1.18, HALF, f"{CPU}, 32 + bf16 SR", FLOAT32_RATIO
    ),
    Goal(
        "24 + block8, times the step of float32", 0.87, HALF, f"{CPU}, 24 + block8", FLOAT32_RATIO
    ),
    Goal(f"ResNet-50, times {ADAM}", 1.1, RESNET, CPU, ADAM_RATIO),
    Goal(f"ResNet-50, times {RADAM}", 5.0, RESNET, CPU, RADAM_RATIO),
    Goal("1,000 tensors of 64, gradients new", 4.8, [SMALL + NEW], CPU, ADAM_RATIO),
    Goal("1,000 tensors of 64, caches cold", 3.3, [SMALL + NEW + COLD], CPU, ADAM_RATIO),
    Goal("300 DTensors, speed of plain tensors", 0.5, SHARDED, CPU, "vs_plain"),
    Goal(f"300 DTensors, times {ADAM}", 7.0, SHARDED, CPU, ADAM_RATIO),
    Goal(f"300 DTensors, times {RADAM}", 10.0, SHARDED, CPU, RADAM_RATIO),
    Goal(f"2^26, norm and step, times {ADAM}", 1.5, [size(26) + CLIPPED], CPU, ADAM_RATIO),
    Goal(
        f"300 DTensors, norm and step, times {ADAM}",
        5.0,
        [case + CLIPPED for case in SHARDED],
        CPU,
        ADAM_RATIO,
    ),
]


def lines(frame: pd.DataFrame, device: str) -> str:
    """A line for each goal on that type of device."""
    return "\n".join(
        f"- {goal.title}, at least {goal.least:.2f}: {verdict(frame, goal)}"
        for goal in GOALS
        if device in goal.optimizer
    )


def verdict(frame: pd.DataFrame, goal: Goal) -> str:
    """Whether the worst of the measured cases reaches the goal, and which were not measured."""
    values = {case: _value(frame, case, goal.optimizer, goal.column) for case in goal.cases}
    measured = {case: value for case, value in values.items() if value is not None}
    if not measured:
        return "not measured"
    worst = min(measured, key=measured.__getitem__)
    left = [case for case in goal.cases if case not in measured]
    word = "missed" if measured[worst] < goal.least else "open" if left else "met"
    # What a loop that does nothing but stream the same bytes reaches.
    limit = _value(frame, worst, limit_name(28, STREAM), goal.column)
    return (
        f"{word}, {measured[worst]:.3f} at {worst}"
        + (f"; memory allows {limit:.3f}" if limit and limit < goal.least else "")
        + (f"; not measured: {', '.join(left)}" if left else "")
    )


def _value(frame: pd.DataFrame, case: str, optimizer: str, column: str) -> float | None:
    rows = frame[(frame.case == case) & (frame.optimizer == optimizer)]
    values = rows[column].dropna() if column in rows else ()
    return float(values.iloc[0]) if len(values) else None
