"""The kernels around the step, executed: the advance of step counts, and both uploads."""

import itertools
import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from radam_kernels.modules import cpu
from radam_kernels.scaling import Scaling
from radam_kernels.schedule import StepScalars

from .arithmetic import reciprocal_seed_off_by
from .cases import INTS, options
from .machine import launch
from .memory import Memory
from .program import Program, loose

# The fields of csrc/core/advance.h and csrc/core/schedule.h.
COUNTER = np.dtype([("step", "u8"), ("dtype", "i4"), ("group", "i4")])
NUMBERS = ("lr", "beta1", "beta2", "grad_scale", "eps", "weight_decay", "rho_threshold", "seed")
FLAGS = ("decoupled_weight_decay", "maximize", "degenerated_to_sgd", "exact")
HYPERPARAMETERS = np.dtype(
    [*((name, "f8") for name in NUMBERS), *((name, "?") for name in FLAGS),
     ("lr_dtype", "i4"), ("lr_data", "u8")]
)  # fmt: skip

COUNTS = (
    0, 1, 3, 4, 5, 6, 7, 8, 40, 100, 999, 10**4, 10**6, 2**24 - 2, 2**24 - 1, 2**24, 10**9, 2**40,
    2**53 - 2, 2**53 - 1, 2**53, -1, 0.5, math.nan, math.inf, 1e300,
)  # fmt: skip
GROUPS = 40

EXACT = [StepScalars._fields.index(name) for name in ("action", "key_low", "key_high")]

# Options that no step can be made of, by which the device must skip.
INVALID = (
    ("beta1", 1.0), ("beta1", -0.1), ("beta1", math.nan), ("beta2", 1.0), ("beta2", math.nan),
    ("eps", -1e-9), ("eps", math.nan), ("rho_threshold", 1.999), ("rho_threshold", math.nan),
    ("seed", -1.0), ("seed", 2.0**32), ("seed", 0.5), ("seed", math.nan),
)  # fmt: skip

# What libdevice's log, expm1 and exp are made of. Other kernels must not contain these.
LIBDEVICE = {"rcp.approx.ftz.f64", "fma.rn.f64"}


class Counters(NamedTuple):
    """Step counts and their groups, as the host lays them out for the device."""

    counters: np.ndarray
    hyperparameters: np.ndarray
    groups: list[dict[str, Any]]
    before: list[Tensor]  # the step counts
    truth: np.ndarray  # the rows of StepScalars that the host makes
    after: np.ndarray  # the step counts that the host leaves


def make_counters(seed: int, dtype: torch.dtype, scaling: Scaling) -> Counters:
    """COUNTS in each of GROUPS random groups; the host advances them as the CPU backend does."""
    rng = np.random.default_rng(seed)
    groups, state = [], {}
    for _ in range(GROUPS):
        group = options(rng)
        betas = (0.9, 0.0, 0.5, 0.99, 1e-5, 1e-310, rng.random())
        betas2 = (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.999999, 1 - 1e-9, 1e-310, rng.random())
        for name in ("beta1", "beta2", "grad_scale"):
            del group[name]
        group["betas"] = float(rng.choice(betas)), float(rng.choice(betas2))
        group["capturable"] = True
        if group["rectification"] == "exact":
            group["rho_threshold"] = float(rng.choice([2.0, 2.5, 4.0, 5.0, math.inf]))
        if rng.random() < 0.4:
            kinds = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
            group["lr"] = torch.tensor(group["lr"], dtype=kinds[rng.integers(4)])
        group["params"] = [torch.zeros(1) for _ in COUNTS]
        for param, count in zip(group["params"], COUNTS, strict=True):
            param.grad = torch.zeros(1)
            step = torch.tensor(float(count), dtype=dtype)
            state[param] = {
                "step": step, "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)
            }  # fmt: skip
        groups.append(group)
    steps = [entry["step"] for entry in state.values()]
    before = [step.clone() for step in steps]
    plan = cpu.Plan()
    assert plan.refresh(groups, state, {}, scaling) == []
    [bucket] = plan.buckets
    counters = np.frombuffer(bucket.counter_rows, COUNTER).copy()
    hyperparameters = np.frombuffer(bucket.hyperparameter_rows, HYPERPARAMETERS).copy()
    plan.run_cpu(1)
    truth = np.frombuffer(bucket.scalar_rows, np.float64).reshape(len(before), -1).copy()
    plan.release()
    after = np.array([step.item() for step in steps])
    return Counters(counters, hyperparameters, groups, before, truth, after)


def advance(program: Program, made: Counters, scaling: Scaling) -> tuple[np.ndarray, np.ndarray]:
    """The rows of scalars and the counts that one launch leaves."""
    n, fields = len(made.counters), len(StepScalars._fields)
    memory = Memory(n * 1024 + 2**17)
    counters, hyperparameters = made.counters.copy(), made.hyperparameters.copy()
    counters["step"] = [
        memory.put(step.numpy(), f"step {i}", True, 8 * (i % 3))
        for i, step in enumerate(made.before)
    ]
    for row, group in zip(hyperparameters, made.groups, strict=True):
        lr = group["lr"]
        if torch.is_tensor(lr):
            row["lr_data"] = memory.put(lr.view(INTS[lr.element_size()]).numpy(), "lr")
    out = memory.put(np.full((n, fields), -7.0), "scalars", True)
    at_scaling = [0 if x is None else memory.put(x.numpy(), "scaling") for x in scaling[:2]]
    params = struct.pack(
        "<QqQQQQi4xQ", memory.put(counters, "counters"), n,
        memory.put(hyperparameters, "hyperparameters"), out, *at_scaling, 0, 0,
    )  # fmt: skip
    launch(program, memory, params, -(-n // program.threads))
    assert memory.guards_intact(), "a guard byte has changed"
    assert memory.written(out, 8 * fields * n).all(), "a row of scalars is missing"
    counts = [
        memory.get(int(at), step.numpy().dtype, 1)[0]
        for at, step in zip(counters["step"], made.before, strict=True)
    ]
    return memory.get(out, np.float64, fields * n).reshape(n, fields), np.array(counts)


def check_advance(program: Program) -> tuple[list[str], list[str]]:
    """Compares with the host: counts, actions and keys the same bits, scalars to an ulp of float32.

    CUDA's logarithm is not the host's. What the hardware's reciprocal gives in its last bits is not
    specified, so it is moved up and down, which must not matter.

    Returns: what is wrong, and what is worth knowing.
    """
    wrong, total, equal, furthest = [], 0, 0, dict.fromkeys(StepScalars._fields, 0)
    factors = (None, (1024.0, 0.0), (3.0, 0.0), (2.0, 1.0), (1.0, math.nan))
    for trial, (dtype, pair) in enumerate(
        itertools.product((torch.float32, torch.float64), factors)
    ):
        scaling = Scaling(*map(torch.tensor, pair)) if pair else Scaling()
        made = make_counters(trial, dtype, scaling)
        for off_by in (0, -2, 2, -40, 40):
            with reciprocal_seed_off_by(off_by):
                ours, counts = advance(program, made, scaling)
            with np.errstate(invalid="ignore", over="ignore"):
                a, b = ours.astype(np.float32), made.truth.astype(np.float32)
                distance = np.abs(a - b) / np.spacing(np.abs(b))
            apart = np.where(_same(a, b), 0, distance)
            for i, f in zip(*np.nonzero(~(apart <= 1)), strict=True):
                group = made.groups[made.counters["group"][i]]
                options = {name: value for name, value in group.items() if name != "params"}
                wrong.append(
                    f"{StepScalars._fields[f]} of step {made.before[i]} {options}, reciprocal off "
                    f"by {off_by}: {ours[i, f]!r}, not {made.truth[i, f]!r}"
                )
            if (ours[:, EXACT] != made.truth[:, EXACT]).any():
                wrong.append(f"an action or a key differs (reciprocal off by {off_by})")
            if not _same(counts, made.after).all():
                wrong.append(f"a count differs (reciprocal off by {off_by})")
            if off_by == 0:
                bits = [x.view(np.int64) for x in (ours, np.ascontiguousarray(made.truth))]
                ulps = np.where(_same(ours, made.truth), 0, np.abs(bits[0] - bits[1]))
                total, equal = total + len(ours), equal + int((ulps == 0).all(1).sum())
                for name, column in zip(StepScalars._fields, ulps.T, strict=True):
                    furthest[name] = max(furthest[name], int(column.max()))
        wrong += _check_invalid(program, made, scaling)
    wrong += [
        f"line {one.line}: {one.text}: not one exact rounding" for one in loose(program, LIBDEVICE)
    ]
    ulps = {name: ulp for name, ulp in furthest.items() if ulp}
    notes = [f"{total} counters, {equal} rows equal in all bits; the rest differ by at most {ulps} "
             "ulp of float64"]  # fmt: skip
    return wrong, notes


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a == b) | (np.isnan(a) & np.isnan(b))


def _check_invalid(program: Program, made: Counters, scaling: Scaling) -> list[str]:
    for row, (name, value) in zip(made.hyperparameters, INVALID, strict=False):
        row[name] = value
    ours, counts = advance(program, made, scaling)
    refused = made.counters["group"] < len(INVALID)
    before = np.array([step.item() for step in made.before])
    if ours[refused].any() or not _same(counts, before)[refused].all():
        return ["a step with invalid options is not skipped"]
    return []


def check_cuda_upload(program: Program) -> tuple[list[str], list[str]]:
    """Payloads of 500 words as upload_cuda() cuts them. Returns what is wrong, and notes."""
    words = program.params_size // 8 - 2

    def pack(to: int, part: np.ndarray) -> bytes:
        return struct.pack("<Qq", to, len(part)) + part.tobytes().ljust(8 * words, b"\0")

    return _check_upload(program, np.dtype(np.uint64), words, pack)


def check_triton_upload(program: Program) -> tuple[list[str], list[str]]:
    """Launches of 64 words as upload_by_arguments() cuts them. Returns what is wrong, and notes."""
    from radam_kernels.backends.triton_kernel import _WORDS

    def pack(to: int, part: np.ndarray) -> bytes:
        return program.pack(to, len(part), *part.tolist())

    return _check_upload(program, np.dtype(np.int32), _WORDS, pack)


def _check_upload(
    program: Program, dtype: np.dtype, words: int, pack: Callable[[int, np.ndarray], bytes]
) -> tuple[list[str], list[str]]:
    rng, wrong, launches = np.random.default_rng(0), [], 0
    item = dtype.itemsize
    sizes = (8, 16, 8 * (words // 2), item * (words - 1) // 8 * 8, item * words, item * words + 8,
             3 * item * words, 5 * item * words - 16)  # fmt: skip
    for size in sizes:
        rows = rng.integers(0, 256, size, dtype=np.uint8).view(dtype)
        memory = Memory(size + 4096)
        to = memory.put(np.zeros_like(rows), "to", True)
        for begin in range(0, len(rows), words):
            params = pack(to + begin * item, rows[begin : begin + words])
            launch(program, memory, params, 1)
            launches += 1
        if not memory.guards_intact():
            wrong.append(f"{size} bytes: a guard byte has changed")
        if (memory.get(to, dtype, len(rows)) != rows).any():
            wrong.append(f"{size} bytes: other bytes arrived")
    return wrong, [f"{len(sizes)} uploads in {launches} launches"]
