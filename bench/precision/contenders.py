"""The formats that are compared: a row each. What the model sees of a weight is its bfloat16."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from radam_kernels import RAdam, formats
from radam_kernels.backends.reference import radam_update_
from radam_kernels.schedule import group_scalars

from . import emulations
from .emulations import Codec, Moments

EPS, BETA1 = 1e-8, 0.9
OURS, TODAY, EMULATION = "ours", "today", "emulation"
Span = tuple[int, int]  # of a parameter in a row: its start, a multiple of 256, and its elements


class Stepper(Protocol):
    """An optimizer of bfloat16 weights (seeds, n), which it changes in place."""

    def step(self, grads: Tensor, lr: float) -> None: ...

    def moments(self) -> tuple[Tensor, Tensor]:
        """exp_avg and exp_avg_sq, as float32 (seeds, n)."""


Make = Callable[[Tensor, Sequence[Span], float], Stepper]  # weights, parameters, beta2


@dataclass(frozen=True)
class Format:
    """A row of what is compared.

    Attributes:
        kind: OURS, TODAY (what torch and this package do without options) or EMULATION.
        stored: bytes for each parameter: weight, remainder and moments, without the gradient.
        alike: the name of another format with the same moments, whose fidelity is not measured
            again.
    """

    name: str
    kind: str
    stored: float
    make: Make
    alike: str = ""

    @property
    def moved(self) -> float:
        """Bytes that a step reads and writes for each parameter, with a bfloat16 gradient."""
        return 2 + 2 * self.stored


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


class _Reference:
    def __init__(self, weights, spans, beta2, **options):
        names = {32: "master32", 24: "master24"}
        sr = options.get("stochastic_rounding", False)
        mw = options.get("master_weights")
        sd = options.get("state_dtype")
        w = names.get(mw) or ("bfloat16_stochastic" if sr or sd == "block8" else "bfloat16")
        s = "block8" if sd == "block8" else "float32" if sd is None else "bfloat16_stochastic" if sr else "bfloat16"
        from radam_kernels.backends.reference import _FORMATS
        self.codes = (_FORMATS.index(w), _FORMATS.index("bfloat16"), _FORMATS.index(s))
        self.w = weights
        n = weights.numel()
        dt = {"block8": torch.uint8, "float32": torch.float32}.get(s, torch.bfloat16)
        self.mv = [torch.zeros(n, dtype=dt) for _ in range(2)]
        if s == "block8":
            self.ex = [torch.full((n // 128,), 16 * (i + 1), dtype=torch.uint8) for i in range(2)]
        else:
            self.ex = [None, None]
        rem = {"master32": torch.int16, "master24": torch.int8}.get(w)
        self.rem = None if rem is None else torch.zeros(n, dtype=rem)
        self.group = RAdam([torch.zeros(1, requires_grad=True)], betas=(BETA1, beta2), eps=EPS).param_groups[0]
        self.t = 0

    def step(self, grads, lr):
        from radam_kernels.backends.reference import low_memory_update_
        self.t += 1
        self.group["lr"] = lr
        sc = group_scalars(self.group, self.t)
        k = formats.step_key(0, self.t)
        sc = sc._replace(key_low=float(k.low), key_high=float(k.high))
        low_memory_update_(self.w.view(-1), grads.reshape(-1), *self.mv, formats.LowMemory(self.rem, *self.ex, 0, formats.parameter_key(0, 0)), sc, self.codes)

    def moments(self):
        return tuple(formats.decode_moment(x, e, k).view(self.w.shape) for x, e, k in zip(self.mv, self.ex, ("exp_avg", "exp_avg_sq")))


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


def _ours(**options: object) -> Make:
    return lambda *arguments: _Reference(*arguments, **options)


def _emulated(weight: Codec, moments: Moments) -> Make:
    return lambda *arguments: _Emulated(*arguments, weight=weight, moments=moments)


_SR16 = dict(state_dtype=torch.bfloat16, stochastic_rounding=True)
_B8 = dict(state_dtype="block8")
EXACT = "32, float32 moments"
NEAREST = "32, bf16 nearest"
TORCH = "torch RAdam, all bf16"
FLASH = "flashoptim 24 bit"
BLOCK = 2 / 128  # bytes of block8's exponents, for each element
FORMATS = [
    Format(EXACT, OURS, 12, _ours(master_weights=32)),
    Format("24, float32 moments", OURS, 11, _ours(master_weights=24), EXACT),
    Format("SR, float32 moments", OURS, 10, _ours(stochastic_rounding=True), EXACT),
    Format("32, bf16 SR", OURS, 8, _ours(master_weights=32, **_SR16)),
    Format("24, bf16 SR", OURS, 7, _ours(master_weights=24, **_SR16), "32, bf16 SR"),
    Format("SR, bf16 SR", OURS, 6, _ours(**_SR16), "32, bf16 SR"),
    Format("32, block8", OURS, 6 + BLOCK, _ours(master_weights=32, **_B8)),
    Format("24, block8", OURS, 5 + BLOCK, _ours(master_weights=24, **_B8), "32, block8"),
    Format("SR, block8", OURS, 4 + BLOCK, _ours(**_B8), "32, block8"),
    Format(NEAREST, OURS, 8, _ours(master_weights=32, state_dtype=torch.bfloat16)),
    Format("bf16 nearest, float32 moments", TODAY, 10, _ours(), EXACT),
    Format(TORCH, TODAY, 6, _Torch),
]
_E = emulations
# Their bytes include the scales.
FORMATS += [
    Format(name, EMULATION, stored, _emulated(weight, moments), alike)
    for name, stored, weight, moments, alike in (
        (FLASH, 5.125, _E.ErrorInt8(), _E.FLASH, ""),
        ("32, flashoptim's moments", 6.125, _E.Exact(), _E.FLASH, FLASH),
        ("bitsandbytes 8 bit", 4.03, _E.BFloat16(), _E.DYNAMIC, ""),
        ("32, bitsandbytes' moments", 6.03, _E.Exact(), _E.DYNAMIC, "bitsandbytes 8 bit"),
        ("torchao 8 bit, SR", 4.03, _E.BFloat16Random(), _E.DYNAMIC, "bitsandbytes 8 bit"),
        ("32, torchao's fp8 moments", 6.03, _E.Exact(), _E.FLOAT8, ""),
        ("torch-optimi, Kahan", 8, _E.Kahan(), _E.NEAREST, ""),
    )
]
BY_NAME = {row.name: row for row in FORMATS}
