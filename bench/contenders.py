"""The optimizers that are compared, the bytes each must move, and a limit to measure them by."""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

import radam_kernels
from radam_kernels.backends import why_not

CUDA, TRITON, GRAPH = "radam_kernels cuda", "radam_kernels triton", "radam_kernels cuda, graph"
CUDA16, TRITON16 = "radam_kernels cuda, bf16 moments", "radam_kernels triton, bf16 moments"
RADAM, RADAM_LOOP = "torch RAdam(foreach)", "torch RAdam(for-loop)"
ADAM, ADAMW = "torch Adam(fused)", "torch AdamW(fused)"
CPU, CPU16, FLAT = "radam_kernels cpu", "radam_kernels cpu, bf16 moments", ", flat"
COMPILED, REFERENCE = "torch RAdam(compiled)", "radam_kernels reference"
OPTIMI, PYTORCH_OPTIMIZER = "torch-optimi RAdam", "pytorch_optimizer RAdam"

# What a quick comparison has.
QUICK = {CPU, CPU16, CPU + FLAT, CUDA, CUDA16, CUDA + FLAT, TRITON, ADAM, RADAM}
QUICK |= {OPTIMI, PYTORCH_OPTIMIZER}
COPY, STREAM = "copy of", "stream of"

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
    compiled: bool = False
    flat: bool = False  # the parameters move into a buffer of their own, and stay there
    debiased: bool = False  # its moments are divided by their bias corrections already
    slack: float = 0.0  # how far it is known to be off
    absent: str = ""  # why it can't run here

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
            step = optimizer.step
            if self.compiled:
                torch.compiler.reset()  # after a few optimizers it would silently compile no more
                step = torch.compile(step)
            for _ in range(WARM):
                step()
            return Started(step, optimizer)
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


def ours(backend: str, **options: object) -> Make:
    return lambda params, lr: radam_kernels.RAdam(params, lr, backend=backend, **options)


def torchs(kind: type[torch.optim.Optimizer], **options: object) -> Make:
    return lambda params, lr: kind(params, lr=lr, **options)


def widths(dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a step with moments of 32 bits at least, and with moments of the dtype itself."""
    size = dtype.itemsize
    return 3 * size + 4 * max(4, size), 7 * size


def contenders(dtype: torch.dtype, device_type: str) -> list[Contender]:
    """What is timed on a GPU, the most telling first, so that a lack of time costs the least."""
    cuda = "cuda" if device_type == "cuda" else "cpu"  # the same code path, to be tried anywhere
    wide, narrow = widths(dtype)
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


def everyone(dtype: torch.dtype, device_type: str) -> list[Contender]:
    """All of the above on that type of device, and all other RAdams; the flat ones last."""
    wide, narrow = widths(dtype)
    base = [
        c._replace(name=on(c.name, device_type))
        for c in contenders(dtype, device_type)
        if device_type == "cuda" or not c.graph
    ]
    flats = [
        c._replace(name=c.name + FLAT, make=ours(backend, flatten=True), flat=True)
        for c in base
        for backend in (device_type, "triton")
        if c.name == f"radam_kernels {backend}"
    ]
    found = [
        *base,
        Contender(REFERENCE, wide, ours("reference"), radam=True),
        # Compiled it makes the scalars in float32, which shows at the first rectified steps.
        Contender(
            COMPILED, narrow, torchs(torch.optim.RAdam), radam=True, compiled=True, slack=0.02
        ),
        *_peers(narrow, dtype),
        *flats,
    ]
    return [c._replace(absent=c.absent or _absent(c.name, device_type)) for c in found]


def on(name: str, device_type: str) -> str:
    """The name of a GPU's contender on a type of device."""
    if device_type == "cuda":
        return name
    return name.replace(" cuda", f" {device_type}").replace(COPY, STREAM)


def _absent(name: str, device_type: str) -> str:
    backend = name.removeprefix("radam_kernels ").partition(",")[0]
    if backend == name or backend == "reference":
        return ""
    if backend == "triton" and device_type == "cpu":
        return "Triton interprets on the CPU, which has no speed"
    return why_not(backend, device_type) or ""


def _peers(narrow: int, dtype: torch.dtype) -> list[Contender]:
    """Optimizers of other packages, whether or not they are installed."""
    quantized = 3 * dtype.itemsize + 4  # moments of 8 bits; their scales are not counted
    half = dtype.itemsize == 2

    def make(module: str, name: str, **options: object) -> Make:
        return lambda params, lr: getattr(import_module(module), name)(params, lr=lr, **options)

    # Kahan sums would take the gradient for scratch, and the defaults are not Adam's.
    optimi = make("optimi", "RAdam", betas=(0.9, 0.999), eps=1e-8, kahan_sum=False)
    other = make("pytorch_optimizer", "RAdam", degenerated_to_sgd=True)
    flash = make("flashoptim", "FlashAdamW", master_weight_bits=24 if half else None)
    bits = make("bitsandbytes.optim", "Adam8bit")
    rows = {
        "optimi": Contender(OPTIMI, narrow, optimi, radam=True, debiased=True),
        "pytorch_optimizer": Contender(PYTORCH_OPTIMIZER, narrow, other, radam=True),
        "flashoptim": Contender("flashoptim AdamW(8 bit)", quantized + 2 * half, flash),
        "bitsandbytes": Contender("bitsandbytes Adam(8 bit)", quantized, bits),
    }
    return [
        row._replace(absent="" if find_spec(package) else f"{package} is not installed")
        for package, row in rows.items()
    ]


def copy_name(moved: int) -> str:
    """The copy that moves as many bytes for each element."""
    return f"{COPY} {moved} B"
