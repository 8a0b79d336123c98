"""The optimizers that are compared: a row each. Tables, plots, goals and tests read this list."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.cpp_extension import get_default_build_root

import radam_kernels
from radam_kernels.backends import why_not

CPU, CPU16 = "radam_kernels cpu", "radam_kernels cpu, bf16 moments"
CUDA, CUDA16 = "radam_kernels cuda", "radam_kernels cuda, bf16 moments"
TRITON, REFERENCE = "radam_kernels triton", "radam_kernels reference"
RADAM, ADAM = "torch RAdam(foreach)", "torch Adam(fused)"
OPTIMI, PYTORCH_OPTIMIZER = "torch-optimi RAdam", "pytorch_optimizer RAdam"
DEEPSPEED = "DeepSpeed CPUAdam"

DRY_RUN = "dry run"  # of a GPU's path, on the CPU
LR = 1e-3
WARM_UP = 6  # steps before anything is timed: they load code, make state, and end rectified

Make = Callable[[Sequence[Tensor], float], torch.optim.Optimizer]  # parameters, learning rate


def wide(size: int) -> int:
    """Bytes that a step moves for each element of that size, with moments of 32 bits at least."""
    return 3 * size + 4 * max(4, size)


def narrow(size: int) -> int:
    """The same with moments of the parameter's own size."""
    return 7 * size


def quantized(size: int) -> int:
    """The same with moments of 8 bits; their scales are not counted."""
    return 3 * size + 4


@dataclass
class Session:
    """An optimizer at work on parameters, warmed up."""

    step: Callable[[], object]
    optimizer: torch.optim.Optimizer
    params: Sequence[Tensor]


@dataclass(frozen=True)
class Optimizer:
    """A row of what is compared.

    Attributes:
        traffic: bytes that a step must read and write for each element, by the size of one.
        package: that must be installed, by its name on PyPI.
        kinds: types of device on which it works.
        level: 0 is what the goals speak of, 1 is part of a quick report, 2 of a full one.
        radam: whether its steps must agree with the formula of RAdam.
        debiased: its moments are stored divided by their bias corrections.
        slack: a relative error that it is known to have.
        graph: stepped by a CUDA graph. Its gradients must stay where they are.
        compiled: by torch.compile, which takes long for many shapes.
        flat: moves its parameters into a buffer of its own.
        half: it is a way to step 16-bit parameters.
        any_gradient: it takes gradients of another dtype than their parameters'.
        in_place: it needs no temporary tensors of the size of the parameters.
        backend: of ours.
    """

    name: str
    make: Make
    traffic: Callable[[int], int] = narrow
    package: str = ""
    kinds: tuple[str, ...] = ("cpu", "cuda")
    level: int = 2
    color: str = "#777777"
    marker: str = "o"
    dashed: bool = False
    radam: bool = False
    debiased: bool = False
    slack: float = 0.0
    graph: bool = False
    compiled: bool = False
    flat: bool = False
    half: bool = False
    any_gradient: bool = False
    in_place: bool = False
    backend: str = ""

    def absent(self, kind: str) -> str:
        """Why it can't run on that type of device, or nothing. Any type does for a "dry run"."""
        if self.package and not version_of(self.package):
            return f"{self.package} is not installed"
        if kind == DRY_RUN:
            return ""
        if kind not in self.kinds:
            return f"works on {', '.join(self.kinds)} only"
        return (why_not(self.backend, kind) if self.backend else None) or ""

    def start(self, params: Sequence[Tensor], lr: float = LR) -> Session:
        """Ready for timed steps: warm, and captured if it is a graph."""
        optimizer = self.make(params, lr)
        step = optimizer.step
        if not self.any_gradient and params[0].grad.dtype != params[0].dtype:
            step = _converting(step, params)
        if self.graph:
            step = _captured(step, params[0].device)
        else:
            for _ in range(WARM_UP):
                step()
        return Session(step, optimizer, params)


def version_of(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _converting(step: Callable[[], object], params: Sequence[Tensor]) -> Callable[[], None]:
    """The step, with gradients of the parameters' dtype made first, which is part of its time."""

    def converted() -> None:
        arrived = [param.grad for param in params]
        for param in params:
            param.grad = param.grad.to(param.dtype)
        step()
        for param, grad in zip(params, arrived, strict=True):
            param.grad = grad

    return converted


def _captured(step: Callable[[], object], device: torch.device) -> Callable[[], None]:
    if device.type != "cuda":
        raise NotImplementedError("CUDA graphs need a GPU")
    stream = torch.cuda.Stream()  # a capture needs a warm-up on another stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _ours(backend: str, **options: object) -> Make:
    def make(params: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
        # A dry run tries the path of a GPU on the CPU.
        dry = backend == "cuda" and params[0].device.type == "cpu"
        return radam_kernels.RAdam(params, lr, backend="cpu" if dry else backend, **options)

    return make


def _half_moments(backend: str) -> Make:
    return lambda params, lr: _ours(backend, state_dtype=params[0].dtype)(params, lr)


def _torch(name: str, **options: object) -> Make:
    return _imported("torch.optim", name, **options)


def _imported(module: str, name: str, **options: object) -> Make:
    return lambda params, lr: getattr(import_module(module), name)(params, lr=lr, **options)


def _flash(params: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
    bits = 24 if params[0].dtype.itemsize == 2 else None
    return _imported("flashoptim", "FlashAdamW", master_weight_bits=bits)(params, lr)


def _compiled(params: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
    torch.compiler.reset()  # after a few optimizers it would silently compile no more
    optimizer = torch.optim.RAdam(params, lr)
    optimizer.step = torch.compile(optimizer.step)
    return optimizer


def _schedule_free(params: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
    optimizer = _imported("schedulefree", "RAdamScheduleFree")(params, lr)
    optimizer.train()
    return optimizer


def _deepspeed(params: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return _imported("deepspeed.ops.adam", "DeepSpeedCPUAdam")(params, lr)


def _deepspeed_is_built() -> bool:
    """Its first use compiles it, which takes longer than a quick report."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", get_default_build_root()))
    return any(root.glob("**/cpu_adam.so"))


# Okabe and Ito's colors, which stay apart for color-blind readers; relatives share one.
ORANGE, BLACK, BLUE, SKY = "#E69F00", "#000000", "#0072B2", "#56B4E9"
GREEN, PURPLE, RED, GRAY = "#009E73", "#CC79A7", "#D55E00", "#777777"

_CPU = dict(kinds=("cpu",), backend="cpu", color=ORANGE, any_gradient=True, in_place=True)
_CUDA = dict(kinds=("cuda",), backend="cuda", color=ORANGE, any_gradient=True, in_place=True)
_TRITON = {**_CUDA, "backend": "triton", "color": RED, "marker": "s"}
# The most telling first, so that a lack of time costs the least.
OPTIMIZERS = [
    Optimizer(CPU, _ours("cpu"), wide, level=0, radam=True, **_CPU),
    Optimizer(CUDA, _ours("cuda"), wide, level=0, radam=True, **_CUDA),
    Optimizer(TRITON, _ours("triton"), wide, level=0, radam=True, **_TRITON),
    Optimizer(ADAM, _torch("Adam", fused=True), level=0, in_place=True, color=BLUE, marker="^"),
    Optimizer(RADAM, _torch("RAdam", foreach=True), level=0, radam=True, color=BLACK, marker="P"),
    Optimizer(CPU16, _half_moments("cpu"), level=0, radam=True, half=True, **_CPU),
    Optimizer(CUDA16, _half_moments("cuda"), level=0, radam=True, half=True, **_CUDA),
    Optimizer(
        f"{TRITON}, bf16 moments", _half_moments("triton"), radam=True, half=True, **_TRITON
    ),
    Optimizer(
        f"{CUDA}, graph", _ours("cuda", capturable=True), wide, radam=True, graph=True, **_CUDA
    ),
    Optimizer(
        f"{CPU}, flat", _ours("cpu", flatten=True), wide, level=1, radam=True, flat=True,
        **_CPU | dict(color=RED, marker="s", dashed=True),
    ),
    Optimizer(
        f"{CUDA}, flat", _ours("cuda", flatten=True), wide, radam=True, flat=True,
        **_CUDA | dict(marker="s", dashed=True),
    ),
    Optimizer(
        "torch AdamW(fused)", _torch("AdamW", fused=True), in_place=True, color=BLUE, marker="v",
        dashed=True,
    ),
    Optimizer(
        "torch RAdam(for-loop)", _torch("RAdam", foreach=False), radam=True, color=BLACK,
        marker="*", dashed=True,
    ),
    Optimizer("torch Adam(foreach)", _torch("Adam", foreach=True), color=SKY, marker="^"),
    Optimizer(
        "torch AdamW(foreach)", _torch("AdamW", foreach=True), color=SKY, marker="v", dashed=True
    ),
    # Compiled it makes the scalars in float32, which shows at the first rectified steps.
    Optimizer(
        "torch RAdam(compiled)", _compiled, radam=True, compiled=True, slack=0.02,
        color=BLACK, marker="p", dashed=True,
    ),
    # Kahan sums would take the gradient for scratch, and the defaults are not Adam's.
    Optimizer(
        OPTIMI, _imported("optimi", "RAdam", betas=(0.9, 0.999), eps=1e-8, kahan_sum=False),
        package="torch-optimi", level=1, radam=True, debiased=True, color=GREEN, marker="D",
    ),
    Optimizer(
        PYTORCH_OPTIMIZER, _imported("pytorch_optimizer", "RAdam", degenerated_to_sgd=True),
        package="pytorch_optimizer", level=1, radam=True, color=PURPLE, marker="X",
    ),
    Optimizer(
        DEEPSPEED, _deepspeed, wide, package="deepspeed", kinds=("cpu",),
        level=1 if _deepspeed_is_built() else 2, in_place=True, color=SKY, marker="h",
    ),
    # Another algorithm: it averages the weights in place of a schedule.
    Optimizer(
        "schedulefree RAdamScheduleFree", _schedule_free, package="schedulefree", color=GREEN,
        marker="<", dashed=True,
    ),
    Optimizer(
        "flashoptim AdamW(8 bit)", _flash, lambda size: quantized(size) + 2 * (size == 2),
        package="flashoptim", kinds=("cuda",), color=PURPLE, marker=">", dashed=True,
    ),
    # Tensors of less than 4,096 elements keep moments of 32 bits in these two.
    Optimizer(
        "bitsandbytes Adam(8 bit)", _imported("bitsandbytes.optim", "Adam8bit"), quantized,
        package="bitsandbytes", color=GRAY, marker="d", dashed=True,
    ),
    Optimizer(
        "torchao AdamW(8 bit)", _imported("torchao.optim", "AdamW8bit"), quantized,
        package="torchao", compiled=True, color=GRAY, marker="H", dashed=True,
    ),
    Optimizer(REFERENCE, _ours("reference"), wide, level=3, radam=True, backend="reference"),
]  # fmt: skip
BY_NAME = {optimizer.name: optimizer for optimizer in OPTIMIZERS}


def select(dtype: torch.dtype, kind: str, level: int) -> list[Optimizer]:
    """Those that are meant for the dtype and that type of device, up to the level."""
    return [
        optimizer
        for optimizer in OPTIMIZERS
        if optimizer.level <= level
        and (not optimizer.backend or kind in optimizer.kinds)
        and (not optimizer.half or dtype.itemsize == 2)
    ]
