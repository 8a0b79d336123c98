"""The formats that are compared: a row each. What the model sees of a weight is its bfloat16."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from radam_kernels import RAdam
from radam_kernels.backends.reference import radam_update_
from radam_kernels.schedule import group_scalars

from ..optimizers import version_of
from . import emulations
from .emulations import Codec, Moments

EPS, BETA1 = 1e-8, 0.9
OURS, TODAY, EMULATION, KERNEL = "ours", "today", "emulation", "own kernel"
Span = tuple[int, int]  # of a parameter in a row: its start, a multiple of 256, and its elements


class Stepper(Protocol):
    """An optimizer of bfloat16 weights (seeds, n), which it changes in place."""

    def step(self, grads: Tensor, lr: float) -> None: ...

    def moments(self) -> tuple[Tensor, Tensor]:
        """exp_avg and exp_avg_sq, as float32 (seeds, n)."""


Make = Callable[[Tensor, Sequence[Span], float], Stepper]  # weights, parameters, beta2


EXACT, NEAREST, TORCH = "32, float32 moments", "32, bf16 nearest", "torch RAdam, all bf16"
FLASH, ADAMW = "flashoptim 24 bit", "AdamW, float32 masters"


@dataclass(frozen=True)
class Format:
    """A row of what is compared.

    Attributes:
        kind: OURS, TODAY (what torch and this package do without options), EMULATION (of a
            package's format, on RAdam), or KERNEL (a package's own AdamW, on a GPU).
        stored: bytes for each parameter: weight, remainder, moments and their scales.
        alike: another format with the same moments, of which fidelity is measured.
        against: the format whose losses are subtracted.
        package: that must be installed.
    """

    name: str
    kind: str
    stored: float
    make: Make
    alike: str = ""
    against: str = EXACT
    package: str = ""

    @property
    def moved(self) -> float:
        """Bytes that a step reads and writes for each parameter, with a bfloat16 gradient."""
        return 2 + 2 * self.stored

    def absent(self) -> str:
        """Why it can't be measured here, or nothing."""
        if self.kind != KERNEL:
            return ""
        if not torch.cuda.is_available():
            return "needs a GPU"
        return "" if version_of(self.package) else f"{self.package} is not installed"


class _Product:
    """radam_kernels.RAdam, with a parameter for each span of each seed."""

    def __init__(
        self, weights: Tensor, spans: Sequence[Span], beta2: float, **options: object
    ) -> None:
        self._grads, self._shape = torch.zeros_like(weights), weights.shape
        self._places = [(row, slice(a, a + n)) for row in range(len(weights)) for a, n in spans]
        self._params = [Parameter(weights[place]) for place in self._places]
        for param, place in zip(self._params, self._places, strict=True):
            param.grad = self._grads[place]
        self._optimizer = RAdam(self._params, betas=(BETA1, beta2), eps=EPS, **options)

    def step(self, grads: Tensor, lr: float) -> None:
        self._grads.copy_(grads)
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()

    def moments(self) -> tuple[Tensor, Tensor]:
        state = self._optimizer.state_dict()["state"]  # block8 is written as bfloat16
        made = torch.zeros(2, *self._shape)
        for key, rows in zip(("exp_avg", "exp_avg_sq"), made, strict=True):
            for i, place in enumerate(self._places):
                rows[place] = state[i][key]
        return made[0], made[1]


class _Torch:
    """torch.optim.RAdam; moments have the parameters' dtype."""

    def __init__(self, weights: Tensor, spans: Sequence[Span], beta2: float) -> None:
        self._weights = Parameter(weights)
        self._optimizer = torch.optim.RAdam([self._weights], betas=(BETA1, beta2), eps=EPS)

    def step(self, grads: Tensor, lr: float) -> None:
        self._weights.grad = grads
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()

    def moments(self) -> tuple[Tensor, Tensor]:
        state = self._optimizer.state[self._weights]
        return state["exp_avg"].float(), state["exp_avg_sq"].float()


class _Emulated:
    """RAdam in float32 between two steps of which everything is stored by codecs."""

    def __init__(
        self,
        weights: Tensor,
        spans: Sequence[Span],
        beta2: float,
        *,
        weight: Codec,
        moments: Moments,
    ) -> None:
        self._shown, self._weight, self._codecs = weights, weight, moments
        self._stored = weight.encode(weights.float())
        self._moments = [codec.encode(torch.zeros(weights.shape)) for codec in moments]
        optimizer = RAdam([Parameter(torch.zeros(1))], betas=(BETA1, beta2), eps=EPS)
        self._group, self._step = optimizer.param_groups[0], 0

    def step(self, grads: Tensor, lr: float) -> None:
        self._group["lr"], self._step = lr, self._step + 1
        p, moments = self._weight.decode(*self._stored), self.moments()
        scalars = group_scalars(self._group, self._step)
        radam_update_(p, grads, *moments, scalars, torch.float32)
        self._stored = self._weight.encode(p)
        self._shown.copy_(self._stored[0])
        pairs = zip(self._codecs, moments, strict=True)
        self._moments = [codec.encode(moment) for codec, moment in pairs]

    def moments(self) -> tuple[Tensor, Tensor]:
        m, v = (c.decode(*s) for c, s in zip(self._codecs, self._moments, strict=True))
        return m, v


class _Kernels:
    """An AdamW on one tensor, on a GPU if there is one."""

    def __init__(
        self, weights: Tensor, spans: Sequence[Span], beta2: float, *, dtype: torch.dtype, **of: Any
    ) -> None:
        self._shown = weights
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._weights = Parameter(weights.to(device, dtype).flatten())
        make = getattr(import_module(of.pop("module")), of.pop("name"))
        common = {"betas": (BETA1, beta2), "eps": EPS, "weight_decay": 0.0}
        self._optimizer = make([self._weights], lr=1e-3, **common, **of)

    def step(self, grads: Tensor, lr: float) -> None:
        self._weights.grad = grads.flatten().to(self._weights)
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()
        self._shown.copy_(self._weights.detach().view(self._shown.shape))

    def moments(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("packages keep moments in formats of their own")


def _ours(**options: object) -> Make:
    return lambda *arguments: _Product(*arguments, **options)


def _emulated(weight: Codec, moments: Moments) -> Make:
    return lambda *arguments: _Emulated(*arguments, weight=weight, moments=moments)


def _kernels(module: str, name: str, dtype: torch.dtype, **of: object) -> Make:
    return lambda *arguments: _Kernels(*arguments, module=module, name=name, dtype=dtype, **of)


_SR16 = dict(state_dtype=torch.bfloat16, stochastic_rounding=True)
_B8 = dict(state_dtype="block8")
_SR_B8 = dict(_B8, stochastic_rounding=True)
_E = emulations
_EXPONENTS = 2 / 128  # bytes of block8's, for each element
FORMATS = [
    Format(EXACT, OURS, 12, _ours(master_weights=32)),
    Format("24, float32 moments", OURS, 11, _ours(master_weights=24), EXACT),
    Format("SR, float32 moments", OURS, 10, _ours(stochastic_rounding=True), EXACT),
    Format("32, bf16 SR", OURS, 8, _ours(master_weights=32, **_SR16)),
    Format("24, bf16 SR", OURS, 7, _ours(master_weights=24, **_SR16), "32, bf16 SR"),
    Format("SR, bf16 SR", OURS, 6, _ours(**_SR16), "32, bf16 SR"),
    Format("32, block8", OURS, 6 + _EXPONENTS, _ours(master_weights=32, **_B8)),
    Format("24, block8", OURS, 5 + _EXPONENTS, _ours(master_weights=24, **_B8), "32, block8"),
    Format("SR, block8", OURS, 4 + _EXPONENTS, _ours(**_SR_B8), "32, block8"),
    Format(NEAREST, OURS, 8, _ours(master_weights=32, state_dtype=torch.bfloat16)),
    Format("bf16, float32 moments", TODAY, 10, _ours(), EXACT),
    Format(TORCH, TODAY, 6, _Torch),
    *(
        Format(name, EMULATION, stored, _emulated(weight, moments), alike)
        for name, stored, weight, moments, alike in (
            (FLASH, 5.125, _E.ErrorInt8(), _E.FLASH, ""),
            ("32, flashoptim's moments", 6.125, _E.Exact(), _E.FLASH, FLASH),
            ("bitsandbytes 8 bit", 4.03, _E.BFloat16(), _E.DYNAMIC, ""),
            ("32, bitsandbytes' moments", 6.03, _E.Exact(), _E.DYNAMIC, "bitsandbytes 8 bit"),
            ("torchao 8 bit, SR", 4.03, _E.BFloat16Random(), _E.DYNAMIC, "bitsandbytes 8 bit"),
            ("32, torchao's fp8 moments", 6.03, _E.Exact(), _E.FLOAT8, ""),
            ("torch-optimi, Kahan", 8, _E.Kahan(), _E.NEAREST, NEAREST),
        )
    ),
    *(
        Format(name, KERNEL, stored, make, ADAMW, ADAMW, package)
        for name, stored, make, package in (
            (ADAMW, 14, _kernels("torch.optim", "AdamW", torch.float32), "torch"),
            (
                "flashoptim FlashAdamW", 5.125,
                _kernels("flashoptim", "FlashAdamW", torch.bfloat16, master_weight_bits=24),
                "flashoptim",
            ),
            (
                "bitsandbytes AdamW8bit", 4.03,
                _kernels("bitsandbytes.optim", "AdamW8bit", torch.bfloat16), "bitsandbytes",
            ),
        )
    ),
]  # fmt: skip
BY_NAME = {row.name: row for row in FORMATS}
AVAILABLE = [row for row in FORMATS if not row.absent()]
MOMENTS = [row for row in AVAILABLE if not row.alike]  # of which fidelity is measured
