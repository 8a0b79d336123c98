"""Holds every kernel to the reference, to the last bit."""

import os
import struct
import subprocess
import sys
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

import radam_kernels
from radam_kernels.backends import reference, triton_
from radam_kernels.modules import DTYPES, cpu
from radam_kernels.schedule import Action, StepScalars
from tests.helpers import DTYPE_SETS as CODES
from tests.helpers import same_bits
from tests.kernels.stepping import (
    CUDA,
    FIELDS,
    MOMENTUM,
    NUMEL,
    RECTIFIED,
    SCALARS,
    SKIP,
    STREAMS,
    TRITON,
    Arena,
    Kernel,
    make_kernels,
)

F32, BF16, F16, F64 = DTYPES
DTYPE_SETS = [tuple(DTYPES[code] for code in codes) for codes in CODES]
# The interpreter takes some 10 ms a program: each width on each side at least once.
TRITON_SETS = [(F64, F64, F64), (F32, F32, F32), (BF16, F32, F32), (F16, BF16, BF16)]
SIZES = (0, 1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 255, 256, 257)
# Around what a kernel steps at once: a block's chunk on a GPU.
CHUNKS = [k + d for k in (512, 1024, 2048, 4096, 8192) for d in (-1, 0, 1)]
pytestmark = [
    # The kernels are told their threads; torch would wake its own for each small comparison.
    pytest.mark.usefixtures("one_thread"),
    # Of inf - inf and the like, where Triton is interpreted.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


@pytest.fixture(params=["cpu", CUDA])
def fast_kernels(request) -> list[Kernel]:
    """The kernels of the C++ and CUDA backends."""
    return make_kernels(request.param)


@pytest.fixture(params=["triton", TRITON])
def triton(request) -> list[Kernel]:
    """Triton's kernel, interpreted or on a GPU."""
    return make_kernels(request.param)


@pytest.fixture(params=["cpu", "triton", CUDA, TRITON])
def kernels(request) -> list[Kernel]:
    """The kernels of each backend."""
    return make_kernels(request.param)


Streams = tuple[Tensor, Tensor, Tensor, Tensor]


def stepped_by_reference(segments, scalars, which) -> list[Streams]:
    compute = F64 if segments[0][0].dtype == F64 else F32
    results = []
    for streams, row in zip(segments, which, strict=True):
        p, g, m, v = (t.clone() for t in streams)
        reference.radam_update_(p, g, m, v, scalars[row], compute)
        results.append((p, g, m, v))
    return results


def check(kernels, segments, scalars, which=None, offsets=None) -> list[Streams]:
    """Steps segments with every kernel, and holds each to the reference, which it returns."""
    which = which or [i % len(scalars) for i in range(len(segments))]
    expected = stepped_by_reference(segments, scalars, which)
    param, grad, state, _ = (DTYPES.index(t.dtype) for t in segments[0])
    right = None  # the memory after a kernel that gave the bits of the reference
    for kernel in kernels:
        arena = Arena(segments, kernel.device, offsets)
        kernel.launch(*arena.tables(which), (param, grad, state), np.array(scalars))
        if right is not None and torch.equal(arena.memory, right):
            continue
        for i, (got, want) in enumerate(zip(arena.read(), expected, strict=True)):
            for name, a, b in zip(STREAMS, got, want, strict=True):
                assert same_bits(a, b), (
                    f"{kernel.name}: {name} of segment {i} with {len(a)} elements and "
                    f"{scalars[which[i]]} differs: {a[a != b][:4]} against {b[a != b][:4]}"
                )
        right = arena.memory
    return expected


def ordinary(n: int, dtypes, seed: int = 0) -> Streams:
    """Values as training has them, over many magnitudes."""
    random = torch.Generator().manual_seed(seed)
    p, g, m, v = (
        torch.randn(n, dtype=F64, generator=random)
        * 10 ** (6 * torch.rand(n, dtype=F64, generator=random) - 5)
        for _ in range(4)
    )
    param, grad, state = dtypes
    return p.to(param), g.to(grad), m.to(state), v.abs().to(state)


def any_bits(n: int, dtypes, seed: int = 0) -> Streams:
    """Values of any bits: subnormals, infinities, NaNs and negative second moments among them."""
    random = np.random.default_rng(seed)
    param, grad, state = dtypes
    return tuple(
        torch.from_numpy(random.integers(0, 256, n * t.itemsize, dtype=np.uint8)).view(t)
        for t in (param, grad, state, state)
    )


def dtypes_id(dtypes) -> str:
    return "-".join(str(t).removeprefix("torch.") for t in dtypes)


by_dtypes = pytest.mark.parametrize("dtypes", DTYPE_SETS, ids=dtypes_id)
by_triton_dtypes = pytest.mark.parametrize("dtypes", TRITON_SETS, ids=dtypes_id)


@by_dtypes
def test_every_size_form_and_action_in_one_table(fast_kernels, dtypes):
    segments = [ordinary(n, dtypes, n) for n in SIZES for _ in SCALARS]
    check(fast_kernels, segments, SCALARS)


@by_dtypes
def test_any_bits(fast_kernels, dtypes):
    check(fast_kernels, [any_bits(5000, dtypes, i) for i in range(len(SCALARS))], SCALARS)


@by_triton_dtypes
def test_triton_in_every_form_and_action(triton, dtypes):
    sizes = [SIZES[i % len(SIZES)] for i in range(len(SCALARS))]
    segments = [ordinary(n, dtypes, n) for n in sizes] + [any_bits(5000, dtypes, 1)] * 3
    check(triton, segments, SCALARS, [*range(len(SCALARS)), 0, 1, 4])


@pytest.mark.parametrize("n", [*SIZES, *CHUNKS])
def test_triton_at_every_size(triton, n):
    check(triton, [ordinary(n, (F32,) * 3)], [RECTIFIED])


@by_triton_dtypes
def test_sizes_around_what_a_kernel_steps_at_once(fast_kernels, dtypes):
    check(fast_kernels, [ordinary(n, dtypes, n) for n in CHUNKS], [RECTIFIED, MOMENTUM])


@pytest.mark.parametrize("dtypes", [(F32,) * 3, (BF16, F32, F32), (F64,) * 3], ids=dtypes_id)
def test_a_large_odd_tensor(fast_kernels, dtypes):
    check(fast_kernels, [ordinary(2**20 + 3, dtypes)], [RECTIFIED])


def test_triton_on_a_large_odd_tensor(triton):
    check(triton, [ordinary(2**20 + 3, (F32,) * 3)], [RECTIFIED])


@pytest.mark.parametrize("dtypes", [(F32,) * 3, (F16, BF16, F32), (F64,) * 3], ids=dtypes_id)
def test_threads_divide_elements_wherever_segments_end(fast_kernels, dtypes):
    sizes = (5000, 0, 257, 12345, 0, 0, 3, 9999, 1, 8191, 1, 0, 20001, 0)
    check(fast_kernels, [ordinary(n, dtypes, n) for n in sizes], SCALARS)


# Argument: the file of _cpu, to load it without torch and its OpenMP.
STEP_ON_MANY_THREADS = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
import numpy as np
if len(sys.argv) == 2:
    spec = spec_from_file_location("_cpu", sys.argv[1])
    cpu = module_from_spec(spec)
    spec.loader.exec_module(cpu)
else:
    from radam_kernels.modules import cpu
n, threads = 100_003, 7
p, g, m, v = [np.full(n, x, np.float32) for x in (0, 1, 0, 0)]
row = np.array([[*(x.ctypes.data for x in (p, m, v)), n, 0]])
grad = np.array([g.ctypes.data])
scalars = np.array([[1, 0, 1, 0.25, 0.5, 0.5, 0, 1, 2, 0, 0]], float)
for _ in range(2):
    cpu.step(row.ctypes.data, grad.ctypes.data, 1, 0, 0, 0, scalars.ctypes.data, 1, threads)
assert (m == 0.4375).all() and (v == 0.75).all() and (p == -0.6875).all(), (p, m, v)
print(cpu.threads_from())
"""


def step_on_many_threads(*arguments: str, **environment: str) -> str:
    """Each element is stepped once by each of two steps, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", STEP_ON_MANY_THREADS, *arguments],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def test_a_team_of_fewer_threads_than_asked_for_steps_everything():
    step_on_many_threads(OMP_THREAD_LIMIT="2")


def test_threads_without_an_openmp_step_everything():
    assert step_on_many_threads(cpu.__file__) == "std::thread"


@by_dtypes
def test_streams_start_anywhere(fast_kernels, dtypes):
    offsets = unaligned(dtypes)
    segments = [ordinary(67, dtypes, i) for i in range(len(offsets))]
    check(fast_kernels, segments, [RECTIFIED], offsets=offsets)


@by_triton_dtypes
def test_triton_where_streams_start_anywhere(triton, dtypes):
    # A whole chunk, so that only the addresses keep it from 16-byte accesses.
    offsets = unaligned(dtypes)[::3]
    segments = [ordinary(triton_.triton_kernel.CHUNK + 1, dtypes, i) for i in range(len(offsets))]
    check(triton, segments, [RECTIFIED], offsets=offsets)


def unaligned(dtypes) -> list[tuple[int, ...]]:
    """One stream, or all of them, at every element within 16 bytes."""
    param, grad, state = (16 // t.itemsize for t in dtypes)
    limits = (param, grad, state, state)
    alone = [
        tuple(k if i == stream else 0 for i in range(4))
        for stream in range(4)
        for k in range(1, limits[stream])
    ]
    return alone + [tuple(k % limit for limit in limits) for k in range(1, max(limits))]


SPECIAL = (0.0, -0.0, 1.0, -3.0, float("inf"), float("-inf"), float("nan"))


by_one_dtype = pytest.mark.parametrize(
    "dtypes", [(F32,) * 3, (BF16,) * 3, (F16,) * 3, (F64,) * 3], ids=dtypes_id
)


def special_values(dtypes) -> Streams:
    """Every combination of them in the four streams."""
    limits = [torch.finfo(t) for t in dtypes]
    edges = [(t.max, -t.max, t.smallest_normal, t.smallest_normal * t.eps) for t in limits]
    values = [SPECIAL + edge for edge in (*edges, edges[-1])]
    streams = [torch.tensor(x, dtype=F64) for x in zip(*product(*values), strict=True)]
    param, grad, state = dtypes
    return tuple(x.to(t) for x, t in zip(streams, (param, grad, state, state), strict=True))


@by_one_dtype
def test_every_combination_of_special_values(fast_kernels, dtypes):
    scalars = [*SCALARS, RECTIFIED._replace(eps=0.0)]
    check(fast_kernels, [special_values(dtypes)] * len(scalars), scalars)


@by_one_dtype
def test_triton_on_every_combination_of_special_values(triton, dtypes):
    scalars = [SCALARS[1], RECTIFIED._replace(eps=0.0)]
    check(triton, [special_values(dtypes)] * len(scalars), scalars)


@by_dtypes
def test_what_lies_halfway_is_rounded_to_even(kernels, dtypes):
    halves = RECTIFIED._replace(one_minus_beta1=0.5, beta2=0.5, one_minus_beta2=0.5, step_size=0.5)
    actions = [halves._replace(action=float(action)) for action in (Action.HOLD, Action.MOMENTUM)]
    p, g, m, v = (x.to(F16).to(x.dtype).clamp(-60, 60) for x in ordinary(5000, dtypes))
    # Neighbours in memory, so that every place in a vector has its turn.
    check(kernels, [(p, g, m, v)] * 2, actions)
    if dtypes[2] == BF16:
        exact = m.double() + 0.5 * (g.double() - m.double())
        assert (exact.to(F32).view(torch.int32) & 0xFFFF == 0x8000).sum() > 100, "no ties to see"


FULL_NAN = struct.unpack("<d", struct.pack("<Q", 2**63 - 1))[0]  # all bits of the payload set


INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@by_dtypes
def test_nan_stays_nan_whatever_its_payload(fast_kernels, dtypes):
    """A payload of ones, which rounding up would turn into a number."""
    segments = [ordinary(4096, dtypes, i) for i in range(6)]
    for i in range(4):  # in each stream, of either sign
        bits = segments[i][i].view(INTEGERS[segments[i][i].itemsize])
        bits[::7], bits[1::7] = torch.iinfo(bits.dtype).max, -1
    scalars = [MOMENTUM._replace(**{name: FULL_NAN}) for name in ("step_size", "grad_scale")]
    stepped = check(fast_kernels, segments, [RECTIFIED, *scalars], [0, 0, 0, 0, 1, 2])
    for i in range(4):
        assert stepped[i][0][:2].isnan().all()
    assert stepped[4][0].isnan().all()
    assert stepped[5][0].isnan().all()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_subnormal_moments_are_not_flushed(kernels, dtype):
    tiny = torch.finfo(dtype).smallest_normal
    p, g, m, v = ordinary(5000, (dtype,) * 3)
    m, v, g = (x * tiny / x.abs().max() for x in (m, v, g))
    assert ((m != 0) & (m.abs() < tiny)).any()
    no_eps = RECTIFIED._replace(eps=0.0)
    [(_, _, m, v)] = check(kernels, [(p, g, m, v)], [no_eps])
    assert ((v != 0) & (v < tiny)).any()


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_zero_gradients_without_eps_give_nan_as_torch_does(kernels, dtype):
    zeros = torch.zeros(5, dtype=dtype)
    no_eps = RECTIFIED._replace(eps=0.0)
    segments = [(torch.ones(5, dtype=dtype), zeros, zeros, zeros)]
    [(p, _, m, v)] = check(kernels, segments, [no_eps])
    assert p.isnan().all()
    assert not m.any()
    assert not v.any()

    param = torch.nn.Parameter(torch.ones(5, dtype=dtype))
    theirs = torch.optim.RAdam([param], eps=0.0)
    for _ in range(8):
        param.grad = zeros
        theirs.step()
    assert param.isnan().all()


def test_an_infinite_parameter_stays_infinite_without_weight_decay(kernels):
    segments = [(torch.full((5,), torch.inf), torch.ones(5), torch.zeros(5), torch.zeros(5))]
    [(p, _, m, _)] = check(kernels, segments, [RECTIFIED])
    assert p.isposinf().all()
    assert m.isfinite().all()


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_each_16_bit_value_is_read_exactly(fast_kernels, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    p, g, m, v = ordinary(len(every), (F32,) * 3)
    check(fast_kernels, [(every, g, m, v)], [RECTIFIED])
    check(fast_kernels, [(p, every, m, v)], [RECTIFIED])
    check(fast_kernels, [(p, g, every, every)], [RECTIFIED])


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_each_16_bit_value_is_written_exactly(kernels, dtype):
    """By a step that changes nothing."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    finite = every[every.isfinite()]
    idle = StepScalars(1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, float(Action.RECTIFIED))
    n = len(finite)
    one = torch.ones(n, dtype=dtype)
    [(p, _, m, _)] = check(kernels, [(finite, one, finite, one)], [idle])
    assert torch.equal(p, finite)
    assert torch.equal(m, finite)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_16_bit_results_round_to_nearest_even(kernels, dtype):
    # Values on each tie between neighbours, and next to it; the last one overflows to infinity.
    low = torch.arange(0, 2**15, dtype=torch.int16).view(dtype)
    low = low[low.isfinite()]
    high = (low.view(torch.int16) + 1).view(dtype).double()
    high[-1] = 2 * low[-1].double() - low[-2].double()
    tie = ((low.double() + high) / 2).float()
    tie = torch.cat([tie, tie.nextafter(tie * torch.inf), tie.nextafter(tie * 0)])
    values = torch.cat([tie, -tie, any_bits(5000, (F32,) * 3)[0]])
    # A step that hands exp_avg on to param, and to itself.
    hand_on = StepScalars(1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, -1.0, float(Action.MOMENTUM))
    n = len(values)
    zeros = torch.zeros(n, dtype=dtype)
    streams = (zeros, torch.where(values.isfinite(), 1.0, values), values, torch.ones(n))
    [(p, _, _, _)] = check(kernels, [streams], [hand_on])
    assert same_bits(p[values != 0], values.to(dtype)[values != 0])
    assert p[len(low) - 1].isposinf()
    assert p[3 * len(low) - 1].isfinite()

    # One that puts the gradient into exp_avg, where the moments have 16 bits.
    take = hand_on._replace(one_minus_beta1=1.0, step_size=0.0)
    zeros32 = torch.zeros(n)
    [(_, _, m, _)] = check(kernels, [(zeros32, values, zeros, zeros)], [take])
    assert same_bits(m[values != 0], values.to(dtype)[values != 0])


def test_a_skipped_step_reads_nothing_and_writes_nothing(kernels):
    segments = [any_bits(5000, dtypes) for dtypes in [(F32,) * 3] * 2]
    expected = check(kernels, segments, [SKIP])
    for streams, before in zip(expected, segments, strict=True):
        for a, b in zip(streams, before, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# From the user's side: backends by name, through the public functions.


def parameters(device="cpu"):
    """Two of each dtype, with several layouts; each second one joins at a later step."""
    torch.manual_seed(0)
    params = []
    for dtype in DTYPES:
        params.append(torch.randn(3, 5, 4).to(dtype).transpose(0, 2))
        params.append(torch.randn(257).to(dtype))
    return [p.to(device).requires_grad_() for p in params]


def trajectory(backend: str, device: str, **options) -> list[Tensor]:
    """Twelve steps, across the threshold, with two groups whose step counts differ."""
    params = parameters(device)
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.1, "betas": (0.5, 0.99)}]
    optimizer = radam_kernels.RAdam(groups, lr=0.01, backend=backend, **options)
    random = torch.Generator().manual_seed(1)
    for step in range(12):
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=random)
            p.grad = torch.empty_like(p).copy_(grad) if i % 2 == 0 or step > 2 else None
        optimizer.step()
    state = [optimizer.state[p] for p in params]
    assert [int(s["step"]) for s in state] == [12, 9] * 4
    return [*params, *(s["exp_avg"] for s in state), *(s["exp_avg_sq"] for s in state)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(weight_decay=0.1, rho_threshold=4.0),
        dict(weight_decay=0.1, decoupled_weight_decay=True, rectification="exact"),
        dict(weight_decay=0.1, decoupled_weight_decay=True, decouple_lr=True),
        dict(maximize=True, degenerated_to_sgd=False, state_dtype=torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["cpu", "triton", CUDA, TRITON])
def test_twelve_steps_of_an_optimizer(backend, options):
    device = make_kernels(backend)[0].device
    for a, b in zip(
        trajectory(backend, device, **options),
        trajectory("reference", "cpu", **options),
        strict=True,
    ):
        assert same_bits(a, b)


# What the C++ checks.


@dataclass
class Table:
    """Two segments, and the arguments of _cpu.step for them."""

    arena: Arena
    rows: np.ndarray
    grads: np.ndarray
    low_memory: np.ndarray

    def step(self, *, count=2, codes=(0, 0, 0), threads=1, isa=0) -> None:
        scalars = np.array([RECTIFIED])
        tables = self.rows.ctypes.data, self.grads.ctypes.data
        cpu.step(*tables, count, *codes, scalars.ctypes.data, 1, threads, isa)


@pytest.fixture
def table():
    arena = Arena([ordinary(8, (F32,) * 3), ordinary(5, (F32,) * 3)], "cpu")
    return Table(arena, *arena.tables([0, 0]))


def test_the_kernel_steps_a_good_table(table):
    before = table.arena.memory.clone()
    table.step()
    assert not torch.equal(table.arena.memory, before)


@pytest.mark.parametrize("field", STREAMS)
@pytest.mark.parametrize("change", ["null", "unaligned"])
def test_the_kernel_refuses_null_and_misaligned_pointers(table, field, change):
    column = table.grads if field == "grad" else table.rows[:, FIELDS.index(field)]
    column[1] = 0 if change == "null" else column[1] + 2
    before = table.arena.memory.clone()
    with pytest.raises(ValueError, match=r"segment 1 of 2.*null or not aligned"):
        table.step()
    assert torch.equal(table.arena.memory, before), "the segment before it was stepped"
    table.rows[1, NUMEL] = 0
    table.step()  # an empty tensor may have any pointer


@pytest.mark.parametrize(
    ("field", "value"), [("numel", -1), ("scalars", -1), ("scalars", 1), ("scalars", 2**40)]
)
def test_the_kernel_refuses_counts_out_of_range(table, field, value):
    table.rows[1, FIELDS.index(field)] = value
    with pytest.raises(ValueError, match=f"segment 1 of 2.*{field} {value}"):
        table.step()


def test_the_kernel_refuses_a_negative_count(table):
    with pytest.raises(ValueError, match="-1"):
        table.step(count=-1)


def test_the_kernel_refuses_null_tables(succeeds):
    # In a process of its own, which a kernel without these checks would crash.
    script = """
import numpy as np
from radam_kernels.modules import cpu
row, grad, scalars = np.zeros((1, 5), np.int64), np.zeros(1, np.int64), np.zeros((1, 11))
good = [x.ctypes.data for x in (row, grad, scalars)]
for i in range(3):
    segments, grads, at = (0 if j == i else address for j, address in enumerate(good))
    try:
        cpu.step(segments, grads, 1, 0, 0, 0, at, 1, 1)
    except ValueError:
        continue
    raise SystemExit(f"not refused: {i}")
"""
    succeeds(script)


UNKNOWN = [(8, 0, 0), (0, -1, 0), (0, 0, 99)]
UNSUPPORTED = [(3, 0, 0), (0, 3, 3), (0, 7, 0), (7, 0, 7), (1, 1, 4)]


@pytest.mark.parametrize("codes", UNKNOWN + UNSUPPORTED)
def test_the_kernel_refuses_dtypes_it_does_not_know(table, codes):
    with pytest.raises(ValueError, match=r"dtype code|dtypes that do not go together"):
        table.step(codes=codes)


@pytest.mark.parametrize("isa", [-1, len(cpu.instruction_sets)])
def test_the_kernel_refuses_instruction_sets_it_does_not_have(table, isa):
    with pytest.raises(ValueError, match=f"isa.*{isa}"):
        table.step(isa=isa)


def test_no_segments_and_no_threads_are_legal(table):
    cpu.step(0, 0, 0, 0, 0, 0, 0, 0, 1)
    table.step(threads=0)
    assert table.arena.read()[0][2].abs().sum() > 0
