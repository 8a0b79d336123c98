"""The optimizers that are compared: a row each. Tables, plots, goals and tests read this list."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import get_default_build_root

import radam_kernels
from radam_kernels.backends import why_not

CPU, CPU16 = "radam_kernels cpu", "radam_kernels cpu, bf16 moments"
CUDA, CUDA16 = "radam_kernels cuda", "radam_kernels cuda, bf16 moments"
TRITON = "radam_kernels triton"
PLAIN = f"{CPU}, plain tensors"
FLOAT32 = f"{CPU}, float32 parameters"
RADAM, ADAM = "torch RAdam(foreach)", "torch Adam(fused)"
DRY_RUN = "dry run"  # of a GPU's path, on the CPU
LR = 1e-3
WARM_UP = 6  # steps before anything is timed: they load code, make state, and end rectified

# Formats for low memory: bytes moved for each bfloat16 parameter without exponents, and options.
TIERS: dict[str, tuple[int, dict[str, Any]]] = {
    f"{weights} + {moments}": (2 + 2 * (2 + remainder + both), {**master, **options})
    for moments, both, options in (
        ("bf16 SR", 4, {"state_dtype": torch.bfloat16, "stochastic_rounding": True}),
        ("block8", 2, {"state_dtype": "block8"}),
    )
    for weights, remainder, master in (
        ("32", 2, {"master_weights": 32}),
        ("24", 1, {"master_weights": 24}),
        ("SR", 0, {"stochastic_rounding": True}),
    )
}
NARROW = ("half", "tier", "float32")  # forms that are for 16-bit parameters only

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
    max_norm: float | None = None  # its steps clip first


@dataclass(frozen=True)
class Optimizer:
    """A row of what is compared.

    Attributes:
        traffic: bytes that a step must read and write for each element, by the size of one.
        level: 0 is what the goals speak of, 1 is part of a quick report, 2 of a full one.
        style: color, marker and line in matplotlib's words.
        package: that must be installed, by its name on PyPI.
        kinds: types of device on which it works.
        backend: of ours.
        radam: whether its steps must agree with the formula of RAdam.
        debiased: its moments are stored divided by their bias corrections.
        slack: a relative error that it is known to have.
        form: "graph", stepped by a CUDA graph; "compiled", which takes long for many shapes;
            "flat", moves its parameters into a buffer of its own; "half", for 16-bit parameters;
            "tier", for bfloat16 ones, in the formats for low memory;
            "plain", where the others step DTensors, it steps plain tensors;
            "float32", where they step 16-bit parameters, it steps as many of float32.
        any_gradient: it takes gradients of another dtype than their parameters'.
    """

    name: str
    make: Make
    traffic: Callable[[int], int] = narrow
    level: int = 2
    style: str = "C7o--"
    package: str = ""
    kinds: tuple[str, ...] = ("cpu", "cuda")
    backend: str = ""
    radam: bool = False
    debiased: bool = False
    slack: float = 0.0
    form: str = ""
    any_gradient: bool = False

    def absent(self, kind: str) -> str:
        """Why it can't run on that type of device (or in a DRY_RUN), or nothing."""
        if self.package and not version_of(self.package):
            return f"{self.package} is not installed"
        if kind == DRY_RUN:
            return ""
        if kind not in self.kinds:
            return f"works on {', '.join(self.kinds)} only"
        return (why_not(self.backend, kind) if self.backend else None) or ""

    def start(
        self, params: Sequence[Tensor], lr: float = LR, max_norm: float | None = None
    ) -> Session:
        """Ready for timed steps: warm, and captured if it is a graph."""
        optimizer = self.make(params, lr)
        step = optimizer.step
        if max_norm is not None:
            step = _clipping(optimizer, params, max_norm)
        if not self.any_gradient and params[0].grad.dtype != params[0].dtype:
            step = _converting(step, params)
        if self.form == "graph":
            step = _captured(step, params[0].device)
        else:
            for _ in range(WARM_UP):
                step()
        return Session(step, optimizer, params, max_norm)


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


def _clipping(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], max_norm: float
) -> Callable[[], None]:
    """The step with the clipping before it: ours with our own, the others with torch's."""

    def clipped() -> None:
        if isinstance(optimizer, radam_kernels.RAdam):
            optimizer.clip_grad_norm_(max_norm)
        else:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()

    return clipped


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


def _ours(backend: str, half: bool = False, **options: object) -> Make:
    def make(params: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
        # A dry run tries the path of a GPU on the CPU.
        dry = backend == "cuda" and params[0].device.type == "cpu"
        if half:
            options["state_dtype"] = params[0].dtype
        return radam_kernels.RAdam(params, lr, backend="cpu" if dry else backend, **options)

    return make


def _of(module: str, name: str, **options: object) -> Make:
    """A class of another package, which is imported at its first use."""
    return lambda params, lr: getattr(import_module(module), name)(params, lr=lr, **options)


def _compiled(params: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
    torch.compiler.reset()  # after a few optimizers it would silently compile no more
    optimizer = torch.optim.RAdam(params, lr)
    optimizer.step = torch.compile(optimizer.step)
    return optimizer


def _flash(params: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
    bits = 24 if params[0].dtype.itemsize == 2 else None
    return _of("flashoptim", "FlashAdamW", master_weight_bits=bits)(params, lr)


def _schedule_free(params: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
    optimizer = _of("schedulefree", "RAdamScheduleFree")(params, lr)
    optimizer.train()
    return optimizer


def _deepspeed(params: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return _of("deepspeed.ops.adam", "DeepSpeedCPUAdam")(params, lr)


def _deepspeed_is_built() -> bool:
    """Its first use compiles it, which takes longer than a quick report."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", get_default_build_root()))
    return any(root.glob("**/cpu_adam.so"))


def _tiers(name: str, common: dict[str, Any]) -> list[Optimizer]:
    return [
        Optimizer(
            f"{name}, {tier}",
            _ours(common["backend"], **options),
            lambda size, moved=moved: moved,
            0,
            form="tier",
            **common,
        )
        for tier, (moved, options) in TIERS.items()
    ]


_CPU = dict(kinds=("cpu",), backend="cpu", radam=True, any_gradient=True)
_CUDA = {**_CPU, "kinds": ("cuda",), "backend": "cuda"}
_TRITON = {**_CUDA, "backend": "triton"}
_TORCH = "torch.optim"
# The most telling first, so that a lack of time costs the least. Relatives share a color.
OPTIMIZERS = [
    Optimizer(CPU, _ours("cpu"), wide, 0, "C1o-", **_CPU),
    Optimizer(CUDA, _ours("cuda"), wide, 0, "C1o-", **_CUDA),
    Optimizer(TRITON, _ours("triton"), wide, 0, "C5s-", **_TRITON),
    Optimizer(ADAM, _of(_TORCH, "Adam", fused=True), narrow, 0, "C0^-"),
    Optimizer(RADAM, _of(_TORCH, "RAdam", foreach=True), narrow, 0, "kP-", radam=True),
    Optimizer(CPU16, _ours("cpu", half=True), narrow, 0, form="half", **_CPU),
    Optimizer(CUDA16, _ours("cuda", half=True), narrow, 0, form="half", **_CUDA),
    Optimizer(f"{TRITON}, bf16 moments", _ours("triton", half=True), form="half", **_TRITON),
    Optimizer(FLOAT32, _ours("cpu"), lambda size: 28, 0, form="float32", **_CPU),
    *_tiers(CPU, _CPU),
    *_tiers(CUDA, _CUDA),
    Optimizer(f"{CUDA}, graph", _ours("cuda", capturable=True), wide, form="graph", **_CUDA),
    Optimizer(f"{CPU}, flat", _ours("cpu", flatten=True), wide, 1, "C5s--", form="flat", **_CPU),
    Optimizer(PLAIN, _ours("cpu"), wide, 2, "C1o:", form="plain", **_CPU),
    Optimizer(f"{CUDA}, flat", _ours("cuda", flatten=True), wide, 2, form="flat", **_CUDA),
    Optimizer("torch AdamW(fused)", _of(_TORCH, "AdamW", fused=True), style="C0v--"),
    Optimizer(
        "torch RAdam(for-loop)", _of(_TORCH, "RAdam", foreach=False), style="k*:", radam=True
    ),
    Optimizer("torch Adam(foreach)", _of(_TORCH, "Adam", foreach=True), style="C4^-"),
    Optimizer("torch AdamW(foreach)", _of(_TORCH, "AdamW", foreach=True), style="C4v--"),
    # Compiled it makes the scalars in float32, which shows at the first rectified steps.
    Optimizer(
        "torch RAdam(compiled)", _compiled, style="kp--", radam=True, slack=0.02, form="compiled"
    ),
    # Kahan sums would take the gradient for scratch, and the defaults are not Adam's.
    Optimizer(
        "torch-optimi RAdam",
        _of("optimi", "RAdam", betas=(0.9, 0.999), eps=1e-8, kahan_sum=False),
        level=1, style="C8D-", package="torch-optimi", radam=True, debiased=True,
    ),
    Optimizer(
        "pytorch_optimizer RAdam", _of("pytorch_optimizer", "RAdam", degenerated_to_sgd=True),
        level=1, style="C3X-", package="pytorch_optimizer", radam=True,
    ),
    Optimizer(
        "DeepSpeed CPUAdam", _deepspeed, wide, 1 if _deepspeed_is_built() else 2, "C2h-",
        package="deepspeed", kinds=("cpu",),
    ),
    # Another algorithm: it averages the weights in place of a schedule.
    Optimizer(
        "schedulefree RAdamScheduleFree", _schedule_free, style="C8<--", package="schedulefree"
    ),
    Optimizer(
        "flashoptim AdamW(8 bit)", _flash, lambda size: quantized(size) + 2 * (size == 2),
        style="C3>--", package="flashoptim", kinds=("cuda",),
    ),
    # Tensors of less than 4,096 elements keep moments of 32 bits in these two.
    Optimizer(
        "bitsandbytes Adam(8 bit)", _of("bitsandbytes.optim", "Adam8bit"), quantized,
        style="C7d--", package="bitsandbytes",
    ),
    Optimizer(
        "torchao AdamW(8 bit)", _of("torchao.optim", "AdamW8bit"), quantized,
        style="C7H--", package="torchao", form="compiled",
    ),
]  # fmt: skip
BY_NAME = {optimizer.name: optimizer for optimizer in OPTIMIZERS}


def select(dtype: torch.dtype, kind: str, level: int, *, sharded: bool = False) -> list[Optimizer]:
    """Those that are meant for such parameters on that type of device, up to the level."""
    return [
        optimizer
        for optimizer in OPTIMIZERS
        if optimizer.level <= level
        and (not optimizer.backend or kind in optimizer.kinds)
        and (optimizer.form not in NARROW or dtype.itemsize == 2)
        and (optimizer.form != "plain" or sharded)
    ]
