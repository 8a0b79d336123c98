"""Memory of GPT-2 124M: the bytes of all tensors, and the peak of a process after two steps."""

import json
import os
import subprocess
import sys
from math import prod

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import Parameter

from radam_kernels import RAdam
from radam_kernels.formats import blocks

from ..memory import _peak
from ..models import MODELS
from ..paper.harness import plots
from ..paper.harness.experiment import Row, Run, Verdict
from ..release import MAPPED

TITLE = "Memory of GPT-2 124M"
CLAIM = "A process takes what its tensors take: parameters, gradients, moments and no more."
MOST = 0.04  # that a peak may be above the tensors
# master_weights, state_dtype, and bytes of the tensors for each parameter without exponents.
TIERS = {
    "bf16, float32 moments": (None, "float32", 2 + 2 + 8),
    "32, float32 moments": (32, "float32", 2 + 2 + 2 + 8),
    "32, bf16 SR": (32, "bfloat16", 2 + 2 + 2 + 4),
    "24, bf16 SR": (24, "bfloat16", 2 + 2 + 1 + 4),
    "SR, bf16 SR": (None, "bfloat16", 2 + 2 + 4),
    "32, block8": (32, "block8", 2 + 2 + 2 + 2),
    "24, block8": (24, "block8", 2 + 2 + 1 + 2),
    "SR, block8": (None, "block8", 2 + 2 + 2),
}


def memory(tier: str, model: str) -> list[Row]:
    """Measured in a process of its own."""
    code = f"from bench.precision.memory import inside; inside({tier!r}, {model!r})"
    found = subprocess.check_output(
        [sys.executable, "-c", code], env={**os.environ, **MAPPED}, text=True
    )
    return [{"tier": tier, "expected": expected(tier, model), **json.loads(found)}]


def expected(tier: str, model: str) -> int:
    """Bytes of all tensors, from the shapes."""
    _, state_dtype, each = TIERS[tier]
    sizes = [prod(shape) for shape in MODELS[model].shapes()]
    exponents = sum(2 * blocks(n) for n in sizes) if state_dtype == "block8" else 0
    return each * sum(sizes) + exponents + 4 * len(sizes)  # step counts are float32


def inside(tier: str, model: str) -> None:
    """Prints, as JSON, bytes of the tensors, and how far the process's peak rose for them."""
    torch.set_num_threads(1)
    master_weights, state_dtype, _ = TIERS[tier]
    options = {"master_weights": master_weights, "state_dtype": state_dtype}
    options["stochastic_rounding"] = state_dtype == "bfloat16"

    def train(shapes: list[tuple[int, ...]]) -> RAdam:
        params = [Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in shapes]
        optimizer = RAdam(params, **options)
        for _ in range(2):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
        return optimizer

    train([(300,)])  # loads code
    before = _peak()
    optimizer = train(MODELS[model].shapes())
    peak = _peak() - before
    tensors: list[Tensor] = []
    for param in optimizer.param_groups[0]["params"]:
        tensors += [param, param.grad, *optimizer.state[param].values()]
    print(json.dumps({"tensors": sum(t.nbytes for t in tensors), "peak": peak}))


def runs(quick: bool) -> list[Run]:
    model = "GPT-2 124M"
    return [] if quick else [Run(memory, {"tier": tier, "model": model}) for tier in TIERS]


def judge(rows: pd.DataFrame, quick: bool) -> list[Verdict]:
    above = rows["peak"] / rows["tensors"] - 1
    return [
        Verdict(
            bool((rows["tensors"] == rows["expected"]).all()),
            "The bytes of all tensors are those that the shapes give, for every tier.",
        ),
        Verdict(
            bool(above.abs().max() < MOST),
            f"A process's peak is within {MOST:.0%} of them: {above.min():+.1%} to "
            f"{above.max():+.1%}.",
        ),
    ]


def table(rows: pd.DataFrame) -> pd.DataFrame:
    each = sum(prod(shape) for shape in MODELS["GPT-2 124M"].shapes())
    return pd.DataFrame(
        {
            "tier": rows["tier"],
            "tensors (MB)": (rows["tensors"] / 1e6).round(1).map("{:,.1f}".format),
            "of a parameter (bytes)": (rows["tensors"] / each).map("{:.3f}".format),
            "peak (MB)": (rows["peak"] / 1e6).map("{:,.1f}".format),
        }
    )


def draw(rows: pd.DataFrame) -> Figure:
    figure, (ax,) = plots.panels(height=2.8)
    ax.barh(rows["tier"], rows["tensors"] / 1e6, color=plots.SKY, label="tensors")
    ax.plot(rows["peak"] / 1e6, rows["tier"], "|", color=plots.BLACK, ms=14, label="peak")
    ax.set(xlabel="MB: parameters, gradients, moments")
    ax.invert_yaxis()
    ax.legend()
    return figure
