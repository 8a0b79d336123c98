"""Steps in backward (RAdam.step_in_backward): time for each parameter, and peak memory.

`python -m bench.release` prints both as tables, beside plain backward passes and those with a hook
that only frees gradients. CPU only.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from radam_kernels import RAdam

from .timing import OtherWork

PLAIN, FREE, RELEASE = KINDS = ("plain backward", "hooks that free", "step_in_backward()")
# From this size on, malloc gives memory back to the system at once.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
TOKENS = 8


def start(kind: str, params: Sequence[Tensor]) -> RAdam:
    """An optimizer with state, and the hooks of a kind."""
    optimizer = RAdam(params)
    for param in params:  # one at a time, for the sake of memory
        param.grad = torch.zeros_like(param)
        optimizer.step()
        param.grad = None
    if kind == RELEASE:
        optimizer.step_in_backward()
    for param in params if kind == FREE else ():
        param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return optimizer


def times(tensors: int, rounds: int) -> dict[str, float]:
    """Microseconds of backward for each parameter of 64 elements; medians, taken in turns.

    CPU time of one thread, because wall time includes waiting for other processes.
    """
    torch.set_num_threads(1)
    params = {kind: [Parameter(torch.randn(64)) for _ in range(tensors)] for kind in KINDS}
    optimizers = {kind: start(kind, params[kind]) for kind in KINDS}
    samples: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            loss = torch.cat(params[kind]).square().sum()
            begin = time.thread_time()
            loss.backward()
            samples[kind].append(time.thread_time() - begin)
            if kind == RELEASE:
                optimizers[kind].step()
            optimizers[kind].zero_grad()
    return {kind: 1e6 * median(seconds) / tensors for kind, seconds in samples.items()}


class GPT2(nn.Module):
    """OpenAI's smallest, with 124 M parameters if the output layer is the embedding."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50257, 768), nn.Embedding(1024, 768)
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    768, 12, 3072, 0.0, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(12)
            ),
            nn.LayerNorm(768),
        )
        self.output = nn.Linear(768, 50257, bias=False)
        if tied:
            self.output.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.output(self.layers(x))


def peak(kind: str, tied: bool) -> tuple[float, float]:
    """MiB: the peak of this process, and how far that is above what it has between steps."""
    model = GPT2(tied=tied)
    optimizer = start(kind, list(model.parameters()))
    tokens = torch.arange(TOKENS)[None]
    for _ in range(3):
        optimizer.zero_grad()
        rest = status("VmRSS")
        nn.functional.cross_entropy(model(tokens)[0], tokens[0]).backward()
        if kind != FREE:
            optimizer.step()
    return status("VmHWM"), status("VmHWM") - rest


def status(name: str) -> float:
    """MiB that Linux reports of this process."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{name}:")[2].split()[0]) / 1024


def main() -> None:
    with OtherWork() as others:
        rows = {f"{n:,} of 64": times(n, 90_000 // n) for n in (300, 3000)}
    print(f"us of backward for each parameter (cores of others: {others.cores:.1f})\n")
    print(pd.DataFrame(rows).to_markdown(floatfmt=".1f"))
    print(f"\nMiB, GPT-2 124M, {TOKENS} tokens: peak of the process, and above rest\n")
    table = {}
    for name, tied in (("tied", True), ("untied", False)):
        for kind in KINDS:
            command = f"from bench.release import *; print(*peak({kind!r}, {tied}))"
            child = [sys.executable, "-c", command]
            output = subprocess.check_output(child, env={**os.environ, **MAPPED}, text=True)
            total, above = map(float, output.split())
            table.setdefault(name, {})[kind] = total
            table.setdefault(f"{name}, above rest", {})[kind] = above
    print(pd.DataFrame(table).to_markdown(floatfmt=".0f"))


if __name__ == "__main__":
    main()
