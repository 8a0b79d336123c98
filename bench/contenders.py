"""The optimizers that are compared, the bytes each must move, and a copy to measure them by."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import radam_kernels

CUDA, TRITON, GRAPH = "radam_kernels cuda", "radam_kernels triton", "radam_kernels cuda, graph"
CUDA16, TRITON16 = "radam_kernels cuda, bf16 moments", "radam_kernels triton, bf16 moments"
RADAM, RADAM_LOOP = "torch RAdam(foreach)", "torch RAdam(for-loop)"
ADAM, ADAMW = "torch Adam(fused)", "torch AdamW(fused)"

Make = Callable[[Sequence[Tensor], float], torch.optim.Optimizer]  # parameters, learning rate
LR = 1e-3
WARM = 6  # steps before anything is timed: they load code, make state, and end rectified


class Started(NamedTuple):
    """What a contender does for a turn."""

    step: Callable[[], object]
    optimizer: torch.optim.Optimizer | None


class Contender(NamedTuple):
    name: str
    bytes: int  # that a step must move for each element, read or written
    make: Make | None = None  # None copies that many bytes and does nothing else
    radam: bool = False
    graph: bool = False

    def start(self, params: Sequence[Tensor], lr: float = LR) -> Started:
        """Ready for timed steps: warm, and captured if that is its way."""
        if self.make is None:
            half = sum(param.numel() for param in params) * self.bytes // 2
            source = torch.empty(half, dtype=torch.uint8, device=params[0].device).random_()
            target = torch.zeros_like(source)
            target.copy_(source)
            return Started(lambda: target.copy_(source), None)
        optimizer = self.make(params, lr)
        if not self.graph:
            for _ in range(WARM):
                optimizer.step()
            return Started(optimizer.step, optimizer)
        if params[0].device.type != "cuda":
            raise NotImplementedError("CUDA graphs need a GPU")
        stream = torch.cuda.Stream()  # capture asks for a warm-up on a stream of its own
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        return Started(graph.replay, optimizer)


def contenders(dtype: torch.dtype, device_type: str) -> list[Contender]:
    """All of them, the most telling first, so that a lack of time costs the least."""
    cuda = "cuda" if device_type == "cuda" else "cpu"  # the same code path, to be tried anywhere
    wide, narrow = (3 * dtype.itemsize + 4 * size for size in (4, dtype.itemsize))

    def ours(backend: str, **options: object) -> Make:
        return lambda params, lr: radam_kernels.RAdam(params, lr, backend=backend, **options)

    def torchs(kind: type[torch.optim.Optimizer], **options: object) -> Make:
        return lambda params, lr: kind(params, lr=lr, **options)

    half = [
        Contender(copy_name(narrow), narrow),
        Contender(CUDA16, narrow, ours(cuda, state_dtype=dtype), radam=True),
        Contender(TRITON16, narrow, ours("triton", state_dtype=dtype), radam=True),
    ]
    optim = torch.optim
    return [
        Contender(copy_name(wide), wide),
        Contender(CUDA, wide, ours(cuda), radam=True),
        Contender(TRITON, wide, ours("triton"), radam=True),
        Contender(ADAM, narrow, torchs(optim.Adam, fused=True)),
        Contender(RADAM, narrow, torchs(optim.RAdam, foreach=True), radam=True),
        *(half if narrow < wide else ()),
        Contender(GRAPH, wide, ours(cuda, capturable=True), radam=True, graph=True),
        Contender(ADAMW, narrow, torchs(optim.AdamW, fused=True)),
        Contender(RADAM_LOOP, narrow, torchs(optim.RAdam, foreach=False), radam=True),
        Contender("torch Adam(foreach)", narrow, torchs(optim.Adam, foreach=True)),
        Contender("torch AdamW(foreach)", narrow, torchs(optim.AdamW, foreach=True)),
    ]


def copy_name(moved: int) -> str:
    """The copy that moves as many bytes for each element."""
    return f"copy of {moved} B"
