"""The arithmetic of PTX on numpy arrays, a bit pattern for a bit pattern.

Floating point is IEEE: one rounding per operation, subnormals are kept, and every NaN becomes the
GPU's canonical one. `meaning()` gives the numpy function of an instruction that only computes. It
raises a `Fault` for an instruction that is unknown, flushes subnormals, approximates, or leaves the
rounding to ptxas, which may then fuse it with another operation.
"""

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

np.seterr(all="ignore")

UINT = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
TYPES = {
    f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}")
    for kind, letter in (("b", "u"), ("u", "u"), ("s", "i"))
    for bits in (8, 16, 32, 64)
}
TYPES |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")}
TYPES |= {"pred": np.dtype(bool), "bf16": np.dtype("u2"), "f16x2": np.dtype("u4")}


class Fault(Exception):
    """Something that a kernel must not do."""

    def __init__(self, reason: str, lanes: np.ndarray | None = None) -> None:
        super().__init__(reason)
        self.lanes = lanes  # a mask of the lanes that did it


def canonical(x: np.ndarray) -> np.ndarray:
    """Replaces every NaN by the one that the GPU produces."""
    nan = x != x
    if nan.any():
        bits = {4: 0x7FFFFFFF, 8: 0x7FF8000000000000}[x.itemsize]
        x[nan] = np.array(bits, UINT[8 * x.itemsize]).view(x.dtype)
    return x


def odd_sum(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x + y in float64, rounded to odd, so that a further rounding to float32 is the only one."""
    s = x + y
    b = s - x
    error = (x - (s - b)) + (y - b)
    bits = s.view(np.int64)
    mend = (error != 0) & np.isfinite(s) & (bits & 1 == 0)
    return np.where(mend, bits + np.where((error > 0) == (s > 0), 1, -1), bits).view(np.float64)


def narrowed(x: np.ndarray, mode: str) -> np.ndarray:
    """Rounds float64, exact or rounded to odd, to float32 in a rounding mode."""
    r = x.astype(np.float32)
    if mode == "rn":
        return r
    up = (r > x) & ((mode == "rm") | ((mode == "rz") & (x > 0)))
    down = (r < x) & ((mode == "rp") | ((mode == "rz") & (x < 0)))
    r = np.where(up, np.nextafter(r, np.float32(-np.inf)), r)
    return np.where(down, np.nextafter(r, np.float32(np.inf)), r)


_libm = ctypes.CDLL("libm.so.6")
_libm.fma.restype, _libm.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
_fma64 = np.frompyfunc(_libm.fma, 3, 1)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: str = "rn") -> np.ndarray:
    if a.dtype == np.float32:
        a, b, c = (x.astype(np.float64) for x in (a, b, c))
        return narrowed(odd_sum(a * b, c), mode)  # the product is exact
    return np.asarray(_fma64(a, b, c), np.float64)


def floating(name: str, mode: str) -> Callable:
    direct = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
              "sqrt": np.sqrt, "rcp": lambda x: x.dtype.type(1) / x, "fma": fma}[name]  # fmt: skip

    def directed(*xs: np.ndarray) -> np.ndarray:
        if xs[0].dtype != np.float32 or name not in ("add", "sub", "mul", "fma"):
            raise Fault(f"{name}.{mode} is not implemented")
        x, *ys = (x.astype(np.float64) for x in xs)
        if name == "mul":
            return narrowed(x * ys[0], mode)
        if name == "fma":
            return narrowed(odd_sum(x * ys[0], ys[1]), mode)
        return narrowed(odd_sum(x, ys[0] if name == "add" else -ys[0]), mode)

    operation = direct if mode == "rn" else directed
    return lambda *xs: canonical(operation(*xs))


def on_pairs(operation: Callable) -> Callable:
    """Applies an operation on float32 to both halves of 64 bits."""

    def run(*xs: np.ndarray) -> np.ndarray:
        halves = (np.ascontiguousarray(x).reshape(-1, 1).view(np.float32) for x in xs)
        return operation(*halves).view(np.uint64)[:, 0]

    return run


def to_bfloat16(x: np.ndarray, mode: str) -> np.ndarray:
    u = x.view(np.uint32).astype(np.uint64)
    up = 0x7FFF + (u >> np.uint64(16) & np.uint64(1)) if mode == "rn" else np.uint64(0)
    return np.where(x != x, 0x7FFF, u + up >> np.uint64(16)).astype(np.uint16)


def to_float16(x: np.ndarray, mode: str) -> np.ndarray:
    h = x.astype(np.float16)
    if mode == "rz":
        h = np.where(np.abs(h.astype(x.dtype)) > np.abs(x), np.nextafter(h, np.float16(0)), h)
    return np.where(x != x, 0x7FFF, h.view(np.uint16)).astype(np.uint16)


def to_integer(x: np.ndarray, to: np.dtype, mode: str) -> np.ndarray:
    whole = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}[mode](x)
    low, high = np.iinfo(to).min, np.iinfo(to).max
    inside = (whole >= low) & (whole <= high)
    clamped = np.where(whole > high, high, low)  # a NaN of float64 becomes the lowest too
    return np.where(inside, np.where(inside, whole, 0).astype(to), clamped.astype(to))


def convert(modifiers: list[str], to: str, source: str) -> Callable:
    mode = next((m for m in modifiers if re.fullmatch(r"r[nzmp]i?", m)), "")
    if to == "f16x2":
        return lambda a, b: to_float16(a, mode).astype(np.uint32) << 16 | to_float16(b, mode)
    if source[0] == "f" and to == "bf16":
        return lambda x: to_bfloat16(x, mode)
    if source[0] == "f" and to == "f16":
        return lambda x: to_float16(x, mode)
    if to[0] == "f" and source[0] == "f":
        if mode.endswith("i"):
            return lambda x: canonical({"rmi": np.floor, "rzi": np.trunc, "rni": np.rint}[mode](x))
        if source == "f64" and to == "f32":
            return lambda x: canonical(narrowed(x, mode))
        return lambda x: canonical(x.astype(TYPES[to]))
    if source[0] == "f":
        return lambda x: to_integer(x, TYPES[to], mode)
    if to == "f64" and source in ("s32", "u32"):  # exact
        return lambda x: x.astype(np.float64)
    if to[0] == "f":
        raise Fault(f"cvt from {source} to {to} is not implemented")
    return lambda x: x.astype(TYPES[to])


def shift(name: str) -> Callable:
    def run(x: np.ndarray, by: np.ndarray) -> np.ndarray:
        bits = 8 * x.itemsize
        inside = np.minimum(by, bits - 1).astype(x.dtype)
        shifted = x << inside if name == "shl" else x >> inside
        over = x >> (bits - 1) if x.dtype.kind == "i" else x.dtype.type(0)
        return np.where(by >= bits, over, shifted).astype(x.dtype)

    return run


def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint64)
    for i in range(4):
        nibble = (selector >> 4 * i & 0xF).astype(np.uint64)
        byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        result |= np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return result.astype(np.uint32)


def insert(a: np.ndarray, b: np.ndarray, at: np.ndarray, count: np.ndarray) -> np.ndarray:
    at, count = int(at[0]), int(count[0])  # the compilers give immediates only
    mask = ((1 << count) - 1 << at) & (1 << 8 * a.itemsize) - 1
    return (b & a.dtype.type(~mask & (1 << 8 * a.itemsize) - 1)) | (
        a << a.dtype.type(at) & a.dtype.type(mask)
    )


def extract(x: np.ndarray, at: np.ndarray, count: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << np.minimum(count, 32).astype(np.uint64)) - np.uint64(1)
    return shift("shr")(x, at) & mask.astype(np.uint32)


_seed_off_by = 0


@contextmanager
def reciprocal_seed_off_by(units: int) -> Iterator[None]:
    """Moves the results of rcp.approx.ftz.f64 by so many units of their last bit."""
    global _seed_off_by
    _seed_off_by = units
    try:
        yield
    finally:
        _seed_off_by = 0


def reciprocal_seed(x: np.ndarray) -> np.ndarray:
    """rcp.approx.ftz.f64: reads the upper half of a float64 and writes the upper half.

    What the hardware gives in its last bits is not specified; see `reciprocal_seed_off_by`.
    """
    x = (x.view(np.uint64) & np.uint64(0xFFFFFFFF_00000000)).view(np.float64)
    x = np.where(np.abs(x) < np.finfo(np.float64).tiny, np.copysign(0.0, x), x)
    y = (1.0 / x).view(np.uint64) + np.uint64(1 << 31) >> np.uint64(32)
    y = ((y.astype(np.int64) + _seed_off_by) << 32).view(np.float64)
    y = np.where(np.isfinite(x) & (x != 0), y, 1.0 / x)
    return canonical(np.where(np.abs(y) < np.finfo(np.float64).tiny, np.copysign(0.0, y), y))


def minimum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind != "f":
        return np.minimum(a, b)
    return canonical(np.where((a == b) & np.signbit(b), b, np.fmin(a, b)))


COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
           "gt": np.greater, "ge": np.greater_equal}  # fmt: skip
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def meaning(op: str) -> tuple[str, list[str], Callable]:
    """The type of the result, the types of the operands, and the numpy function of `op`."""
    name, *rest = op.split(".")
    kind = rest[-1]
    if "ftz" in rest or "approx" in rest:
        if op == "rcp.approx.ftz.f64":
            return kind, [kind], reciprocal_seed
        raise Fault("flushes subnormals or approximates")
    if kind in ("f32", "f64", "f32x2") and name in (
        "add", "sub", "mul", "div", "sqrt", "rcp", "fma"
    ):  # fmt: skip
        if len(rest) != 2 or rest[0] not in ("rn", "rz", "rm", "rp"):
            raise Fault("says no rounding: ptxas may fuse it")
        count = {"sqrt": 1, "rcp": 1, "fma": 3}.get(name, 2)
        if kind == "f32x2":
            return "b64", ["b64"] * count, on_pairs(floating(name, rest[0]))
        return kind, [kind] * count, floating(name, rest[0])
    if name == "setp":
        test, unordered = rest[0], rest[0].endswith("u") and len(rest[0]) == 3
        if test in ("nan", "num") and len(rest) == 2:
            return "pred", [kind] * 2, lambda a, b: ((a != a) | (b != b)) == (test == "nan")
        compare = COMPARE[test[:2]] if unordered or test in COMPARE else None
        if compare is None or (kind[0] == "b" and test not in ("eq", "ne")) or len(rest) != 2:
            raise Fault("is not implemented")
        if unordered:
            return "pred", [kind] * 2, lambda a, b: compare(a, b) | (a != a) | (b != b)
        if kind[0] == "f" and test == "ne":
            return "pred", [kind] * 2, lambda a, b: (a != b) & (a == a) & (b == b)
        return "pred", [kind] * 2, compare
    if name == "cvt":
        to, source = rest[-2:]
        count = 2 if to == "f16x2" else 1
        return "b16" if to == "f16" else to, [source] * count, convert(rest[:-2], to, source)
    if name == "selp":
        bits = f"b{8 * TYPES[kind].itemsize}"
        return bits, [bits, bits, "pred"], lambda a, b, p: np.where(p, a, b)
    if name in ("mov", "cvta") and kind[0] in "bufsp":
        bits = kind if kind == "pred" else f"b{8 * TYPES[kind].itemsize}"
        return bits, [bits], np.copy
    if name in LOGIC and len(rest) == 1:
        return kind, [kind] * 2, LOGIC[name]
    if name == "not" and len(rest) == 1:
        return kind, [kind], np.invert
    if name == "neg" and kind in ("s32", "s64", "f32", "f64"):
        return kind, [kind], lambda x: canonical(-x) if kind[0] == "f" else -x
    if name == "abs" and kind in ("f32", "f64"):
        return kind, [kind], lambda x: canonical(np.abs(x))
    if name == "min" and len(rest) == 1:
        return kind, [kind] * 2, minimum
    if name == "max" and len(rest) == 1 and kind[0] in "us":
        return kind, [kind] * 2, np.maximum
    if kind[0] in "us" and len(rest) == 1 and name in ("add", "sub"):
        return kind, [kind] * 2, {"add": np.add, "sub": np.subtract}[name]
    if name in ("mul", "mad") and kind[0] in "us" and rest[0] in ("wide", "lo"):
        wide = TYPES[f"{kind[0]}{8 * TYPES[kind].itemsize * (1 + (rest[0] == 'wide'))}"]
        to = f"{kind[0]}{8 * wide.itemsize}"
        if name == "mul":
            return to, [kind] * 2, lambda a, b: a.astype(wide) * b.astype(wide)
        return to, [kind, kind, to], lambda a, b, c: a.astype(wide) * b.astype(wide) + c
    if name in ("shl", "shr") and len(rest) == 1:
        return kind, [kind, "u32"], shift(name)
    if name == "prmt" and kind == "b32" and len(rest) == 1:
        return kind, [kind] * 3, permute
    if name == "bfi":
        return kind, [kind, kind, "u32", "u32"], insert
    if name == "bfe" and kind == "u32":
        return kind, [kind, "u32", "u32"], extract
    raise Fault("is not implemented")
