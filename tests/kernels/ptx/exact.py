"""Is the interpreter's own arithmetic right? Compares it with exact rational numbers and torch."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import torch

from radam_kernels.modules import DTYPES

from .arithmetic import meaning, to_bfloat16, to_float16
from .cases import tensor

COUNT = 4000  # results of each operation

OPERATIONS: dict[str, Callable[[Fraction, Fraction, Fraction], Fraction]] = {
    "add": lambda x, y, z: x + y,
    "sub": lambda x, y, z: x - y,
    "mul": lambda x, y, z: x * y,
    "div": lambda x, y, z: x / y,
    "fma": lambda x, y, z: x * y + z,
}


def check_arithmetic() -> tuple[list[str], list[str]]:
    """Returns what is wrong, and what is worth knowing."""
    rng, wrong, tested = np.random.default_rng(1), [], 0
    for dtype, kind in ((np.float32, "f32"), (np.float64, "f64")):
        a, b, c = (_numbers(rng, dtype, COUNT) for _ in range(3))
        b = np.where(b == 0, dtype(1), b)
        # Half of the sums cancel almost all of the product, which shows a second rounding.
        nearly = -(a * b) * (1 + rng.integers(-3, 4, COUNT).astype(dtype) * np.finfo(dtype).eps)
        c = np.where((rng.random(COUNT) < 0.5) & np.isfinite(nearly), nearly, c).astype(dtype)
        for name, exact in OPERATIONS.items():
            operands = (a, b, c) if name == "fma" else (a, b)
            results = meaning(f"{name}.rn.{kind}")[2](*operands)
            for *xyz, result in zip(*(x.tolist() for x in (a, b, c, results)), strict=True):
                truth = _rounded(exact(*map(Fraction, xyz)), dtype)
                if result != truth:
                    wrong.append(f"{name}.rn.{kind} of {xyz}: {result!r}, not {truth!r}")
            tested += COUNT
        roots = meaning(f"sqrt.rn.{kind}")[2](np.abs(a))
        for x, root in zip(np.abs(a), roots, strict=True):
            low, r, high = (
                Fraction(float(y))
                for y in (np.nextafter(root, dtype(0)), root, np.nextafter(root, dtype(np.inf)))
            )
            if x and not ((low + r) / 2) ** 2 <= Fraction(float(x)) <= ((r + high) / 2) ** 2:
                wrong.append(f"sqrt.rn.{kind} of {x!r}: {root!r}")
        tested += COUNT
    for code, narrow in ((1, to_bfloat16), (2, to_float16)):
        x = _around_halves(rng, code)
        truth = torch.from_numpy(x).to(DTYPES[code]).view(torch.int16).numpy().view(np.uint16)
        bad = np.flatnonzero(narrow(x, "rn") != truth)
        wrong += [f"{narrow.__name__} of {x[i]!r}" for i in bad]
        tested += len(x)
    return wrong, [f"{tested} results are the exact ones, rounded once"]


def _numbers(rng: np.random.Generator, dtype: type, count: int) -> np.ndarray:
    """Finite numbers: any bits, numbers near 1, and numbers near the subnormals."""
    uint = {4: np.uint32, 8: np.uint64}[np.dtype(dtype).itemsize]
    anything = rng.integers(0, np.iinfo(uint).max, count, dtype=uint, endpoint=True).view(dtype)
    near = rng.standard_normal(count).astype(dtype)
    tiny = (rng.standard_normal(count) * float(np.finfo(dtype).tiny)).astype(dtype)
    x = np.choose(rng.integers(3, size=count), [anything, near, tiny])
    return np.where(np.isfinite(x), x, dtype(1.5))


def _rounded(x: Fraction, dtype: type) -> float:
    """x to the nearest number of a type, half to even."""
    try:
        if dtype == np.float64:
            return float(x)  # Python rounds this once
        if x == 0:
            return 0.0
        exponent = max(abs(x).numerator.bit_length() - abs(x).denominator.bit_length() - 1, -126)
        if abs(x) >= Fraction(2) ** (exponent + 1):
            exponent += 1
        unit = Fraction(2) ** (exponent - 23)
        result = float(round(x / unit) * unit)
    except OverflowError:
        return math.inf if x > 0 else -math.inf
    return result if abs(result) <= np.finfo(dtype).max else math.copysign(math.inf, result)


def _around_halves(rng: np.random.Generator, code: int) -> np.ndarray:
    """float32: every number of a 16-bit type, every middle of two, and those beside the middles."""
    every = tensor(np.arange(2**16, dtype=np.uint16), DTYPES[code]).float().numpy()
    every = np.sort(every[np.isfinite(every)])
    middles = ((every[1:].astype(np.float64) + every[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    ends = [math.inf, -math.inf, 65519.996, 65520, 3.3961775e38, 3.4e38]
    others = _numbers(rng, np.float32, 10**5)
    return np.concatenate([every, middles, *beside, np.array(ends, np.float32), others])
