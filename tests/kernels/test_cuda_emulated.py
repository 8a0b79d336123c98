"""The CUDA source, compiled as plain C++ and run on the CPU, gives the bits of the reference.

It runs in a process of its own under AddressSanitizer and UBSan, behind the real bindings and the
real Python of the backend; only the CUDA runtime is a stand-in. The last tests plant faults in the
kernel and see these checks find them.
"""

import copy
import itertools
import math
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pybind11
import pytest
import torch
from torch import Tensor

from radam_kernels import RAdam, formats
from radam_kernels.backends.reference import low_memory_update_
from radam_kernels.launch import launch
from radam_kernels.modules import DTYPES, FORMAT_NAMES, cpu
from radam_kernels.scaling import Scaling
from radam_kernels.schedule import Action, StepScalars
from tests.helpers import (
    DTYPE_SETS,
    LOW_MEMORY_SETS,
    SIZES,
    dtypes_id,
    same_bits,
)
from tests.kernels import norms
from tests.kernels.cuda_emulation.faults import SMALLER, WRONG_LOW_MEMORY, WRONG_NORM, WRONG_STEP
from tests.kernels.cuda_emulation.worker import LowMemorySegment, make_plan

FOLDER = Path(__file__).parent / "cuda_emulation"
CSRC = Path(__file__).parents[2] / "csrc"
CUDA = CSRC / "cuda"
pytestmark = [
    pytest.mark.skipif(not CUDA.is_dir(), reason="not run from a source tree"),
    pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to compile the kernels with"),
]
FORMS = (
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
)
# Below the threshold, with and without a step; above it.
SIDES = ((1, {}), (1, {"degenerated_to_sgd": False}), (8, {}))


@dataclass
class Segment:
    tensors: list[Tensor]  # param, grad, exp_avg, exp_avg_sq
    offsets: tuple[int, ...]  # in elements, of where each starts behind 16 bytes
    step: float | Tensor
    group: int


class Crashed(Exception):
    """The process has ended; most likely a sanitizer ended it."""


class Worker:
    """A process under AddressSanitizer that runs functions of cuda_emulation/worker.py."""

    def __init__(self, asan: str, log: Path) -> None:
        self.preload, self.log = asan, log
        self.process: subprocess.Popen | None = None

    def __call__(self, name: str, *arguments: Any) -> Any:
        if self.process is None:
            environment = {
                **os.environ,
                "LD_PRELOAD": self.preload,
                "ASAN_OPTIONS": "detect_leaks=0",
                "UBSAN_OPTIONS": "print_stacktrace=1",
            }
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.kernels.cuda_emulation.worker"],
                cwd=CSRC.parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log.open("wb"),
                env=environment,
            )
        try:
            pickle.dump((name, arguments), self.process.stdin)
            self.process.stdin.flush()
            return pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError):
            self.process.wait()
            self.process = None
            raise Crashed(self.log.read_text()[:4000]) from None

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def compile_(*arguments: str) -> None:
    command = ["g++", "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    folders = [FOLDER, CSRC]
    systems = [sysconfig.get_paths()["include"], pybind11.get_include()]
    command += [*arguments, *(f"-I{f}" for f in folders)]
    subprocess.run([*command, *itertools.chain(*(("-isystem", s) for s in systems))], check=True)


SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compile_kernels(source: Path, folder: Path, overlay: Path = CSRC) -> Path:
    """The object file of one .cu file.

    Args:
        overlay: a folder that may hold changed headers.
    """
    compiled = folder / f"{source.stem}.o"
    compile_(
        "-c", "-O1", "-g1", "-ffp-contract=off", "-fno-strict-aliasing", *SANITIZE,
        f"-I{overlay}", "-x", "c++", str(source), "-o", str(compiled),
    )  # fmt: skip
    return compiled


def compile_bindings(folder: Path) -> Path:
    compiled = folder / "bind_cuda.o"
    define = ['-DRADAM_FINGERPRINT=""', '-DRADAM_ARCHITECTURES="emulated"']
    source = CSRC / "bind" / "bind_cuda.cpp"
    compile_("-c", "-O0", "-fvisibility=hidden", *define, str(source), "-o", str(compiled))
    return compiled


def link(objects: Iterable[Path], folder: Path) -> str:
    library = folder / "_cuda.so"
    compile_("-shared", *SANITIZE, *map(str, objects), "-o", str(library))
    return str(library)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, Path]:
    """The object files, by the stems of their sources."""
    folder = tmp_path_factory.mktemp("emulation")
    with ThreadPoolExecutor(2) as pool:
        sources = [*sorted(CUDA.glob("*.cu")), FOLDER / "emulation.cpp"]
        made = [pool.submit(compile_kernels, source, folder) for source in sources]
        made.append(pool.submit(compile_bindings, folder))
        return {done.result().stem: done.result() for done in made}


@pytest.fixture(scope="module")
def library(compiled, tmp_path_factory) -> str:
    return link(compiled.values(), tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    paths = []
    for name in ("libasan.so", "libstdc++.so"):  # the former intercepts what the latter throws
        found = subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        if not Path(found).is_absolute():
            pytest.skip(f"g++ has no {name} to run the emulated kernels under")
        paths.append(found)
    worker = Worker(" ".join(paths), tmp_path_factory.mktemp("worker") / "stderr.txt")
    yield worker
    worker.close()


def segment(size: int, codes, generator: torch.Generator, step, group: int, offsets=(0,) * 4):
    tensors = []
    for stream, code in enumerate((codes[0], codes[1], codes[2], codes[2])):
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        tensors.append((values.square() if stream == 3 else values).to(DTYPES[code]))
    return Segment(tensors, offsets, step, group)


def group(**changes) -> dict[str, Any]:
    usual = dict(
        lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, decoupled_weight_decay=False,
        maximize=False, rho_threshold=5.0, degenerated_to_sgd=True, rectification="first_order",
    )  # fmt: skip
    return usual | changes


def check(worker, library, segments: list[Segment], groups, scaling=None) -> None:
    """Steps copies of the segments with the emulated kernel and with the reference."""
    scaling = scaling or Scaling()
    sizes = [len(s.tensors[0]) for s in segments]
    streams, steps, whole = worker(
        "step",
        library,
        [torch.cat(stream) for stream in zip(*(s.tensors for s in segments), strict=True)],
        sizes,
        [s.offsets for s in segments],
        [s.step for s in segments],
        groups,
        [s.group for s in segments],
        scaling,
    )
    four, counts = [s.tensors for s in segments], [s.step for s in segments]
    plan = make_plan(four, counts, groups, [s.group for s in segments], scaling)
    launch(plan, "reference")
    ours = zip(*(stream.split(sizes) for stream in streams), strict=True)
    for i, (s, tensors) in enumerate(zip(segments, ours, strict=True)):
        for name, a, b in zip("pgmv", tensors, s.tensors, strict=True):
            assert torch.equal(a, b) or same_bits(a, b), f"{name} of segment {i}: {s}"
        assert whole[i], f"in front of segment {i}: {s}"
        if isinstance(s.step, Tensor):
            assert same_bits(steps[i], s.step), f"step of segment {i}: {s}"


def check_product(worker, library, codes) -> None:
    """Sizes x alignments x forms of weight decay x sides of the threshold, in one launch."""
    generator = torch.Generator().manual_seed(0)
    groups = [group(**form, **more) for form in FORMS for _, more in SIDES]
    segments = []
    units = [16 // DTYPES[code].itemsize for code in (codes[0], codes[1], codes[2], codes[2])]
    for size, k in itertools.product(SIZES, range(max(units))):
        for i in range(len(groups)):
            # Together, or one stream alone.
            shifted = range(4) if i % 2 else [k % 4]
            offsets = tuple(k % units[j] if j in shifted else 0 for j in range(4))
            step = float(SIDES[i % len(SIDES)][0])
            segments.append(segment(size, codes, generator, step, i, offsets))
    check(worker, library, segments, groups)


def check_many(worker, library, codes, count=1000) -> None:
    """So many short segments and a longer one, of many step counts."""
    generator = torch.Generator().manual_seed(1)
    segments = [segment(i % 71, codes, generator, float(1 + i % 9), i % 2) for i in range(count)]
    segments.insert(count // 2, segment(20_000, codes, generator, 8.0, 0))
    check(worker, library, segments, [group(), group(weight_decay=0.1)])


def check_far(worker, library, codes=(0, 0, 0)) -> None:
    """The blocks around elements 2^31 and 2^32 of one segment."""
    numel = 2**32 + 5
    chunk = 4096 if codes[0] == 0 else 8192
    blocks = [0, 2**31 // chunk - 1, 2**31 // chunk, 2**32 // chunk - 1, 2**32 // chunk]
    results, grown = worker("far", library, codes, numel, blocks, group())
    assert [first for first, *_ in results] == [block * chunk for block in blocks]
    for first, before, after in results:
        launch(make_plan([before], [8.0], [group()], [0]), "reference")
        for ours, truth in zip(after, before, strict=True):
            assert same_bits(ours, truth), f"from element {first}"
    assert grown < 2**27, "memory far from these blocks was touched"


# Each dtype in each place; the rest of the products is slow.
SOME = {(0, 0, 0), (1, 1, 0), (1, 1, 1), (2, 2, 2), (0, 1, 2), (1, 2, 0), (2, 0, 1), (3, 3, 3)}
every_dtype_set = pytest.mark.parametrize(
    "codes",
    [
        pytest.param(codes, id=dtypes_id(codes), marks=[] if codes in SOME else pytest.mark.slow)
        for codes in DTYPE_SETS
    ],
)


def check_factor(worker, library, codes) -> None:
    """A factor on the device, with rows of scalars in the launch and there; and counts there."""
    generator = torch.Generator().manual_seed(8)
    for value in (0.3, math.nan):
        scaling = Scaling(torch.tensor(3.0), factor=torch.tensor(value, dtype=torch.float64))
        groups = [group(lr=0.01 * (i + 1), maximize=i % 2 == 1) for i in range(40)]
        for count, step in ((3, 8.0), (40, 8.0), (3, torch.tensor(7.0))):
            segments = [
                segment(300, codes, generator, copy.deepcopy(step), i, (i % 2,) * 4)
                for i in range(count)
            ]
            check(worker, library, segments, groups[:count], scaling)


@every_dtype_set
def test_every_size_alignment_form_and_side_gives_the_bits_of_the_reference(worker, library, codes):
    check_product(worker, library, codes)


@every_dtype_set
def test_a_factor_on_the_device_multiplies_the_gradients(worker, library, codes):
    check_factor(worker, library, codes)


@every_dtype_set
def test_a_thousand_segments_of_many_counts(worker, library, codes):
    check_many(worker, library, codes)


@every_dtype_set
def test_a_large_odd_tensor(worker, library, codes):
    generator = torch.Generator().manual_seed(2)
    large = segment(2**20 + 3, codes, generator, 8.0, 0)
    check(worker, library, [large], [group()])


@pytest.mark.parametrize("count", [1, 2, 5000])
def test_few_segments_and_more_than_there_are_rows_of_work(worker, library, count):
    check_many(worker, library, (0, 0, 0), count)


def test_more_scalars_than_fit_into_a_launch(worker, library):
    generator = torch.Generator().manual_seed(3)
    groups = [group(lr=0.01 * (i + 1)) for i in range(20)]
    segments = [segment(300, (1, 1, 0), generator, 1.0 + i % 8, i % 20) for i in range(160)]
    check(worker, library, segments, groups)


@pytest.mark.parametrize("codes", [(0, 0, 0), (1, 1, 1)], ids=dtypes_id)
def test_elements_beyond_2_to_the_31_and_32(worker, library, codes):
    check_far(worker, library, codes)


@pytest.mark.parametrize("size", [8, 4000, 4008, 48_000])
def test_an_upload_arrives_whole(worker, library, size):
    rows = torch.randint(0, 256, (size,), dtype=torch.uint8).numpy().tobytes()
    assert worker("upload", library, rows) == rows


def test_a_launch_restores_the_current_device(worker, library):
    assert worker("on_device", library, 1) == (1, 0, "")
    _, current, error = worker("on_device", library, 5)
    assert (current, error) == (0, "cudaSetDevice: invalid device")


# What a step uploads and launches if little has changed since the last one


def steps_of_a_thousand(worker, library, moved: bool) -> list[tuple[int, int]]:
    """Two steps, held to the reference; (launches, bytes uploaded) of each."""
    generator = torch.Generator().manual_seed(6)
    sizes = [i % 71 for i in range(999)] + [20_000]
    params, *grads = ([torch.randn(n, generator=generator) for n in sizes] for _ in range(3))
    grads = grads if moved else grads[:1] * 2
    ours, states, seen = worker("steps", library, params, grads, group())
    truth = [p.requires_grad_() for p in params]
    optimizer = RAdam(truth, **group(), backend="reference")
    for some in grads:
        for p, grad in zip(truth, some, strict=True):
            p.grad = grad
        optimizer.step()
    for p, a, state in zip(truth, ours, states, strict=True):
        assert same_bits(a, p)
        assert all(same_bits(state[key], value) for key, value in optimizer.state[p].items())
    return seen


def test_gradients_that_moved_are_all_that_is_uploaded(worker, library):
    first, second = steps_of_a_thousand(worker, library, moved=True)
    assert first[1] >= 1000 * 8 * (len(cpu.segment_fields) + 1), "the first uploads the rows, too"
    launches, uploaded = second
    assert 8000 <= uploaded <= 8500
    assert launches <= 3


def test_where_nothing_moved_a_step_is_one_launch(worker, library):
    _, second = steps_of_a_thousand(worker, library, moved=False)
    assert second == (1, 0)


# Counts on the device


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("codes", [(0, 0, 0), (1, 1, 0), (3, 3, 3)], ids=dtypes_id)
def test_counts_on_the_device_advance_there(worker, library, codes, dtype):
    generator = torch.Generator().manual_seed(4)
    groups = [
        group(lr=torch.tensor(0.02)),
        group(weight_decay=0.1, lr=torch.tensor(0.03, dtype=torch.float64)),
        group(degenerated_to_sgd=False, lr=0.5),
        group(rectification="exact", rho_threshold=4.0, maximize=True),
    ]
    counts = (0, 4, 5, 6, 1000, 2**24)
    scale, found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    factor = torch.tensor(0.3, dtype=torch.float64)
    for scaling in (Scaling(), Scaling(scale, found_inf), Scaling(scale, found_inf, factor)):
        segments = [
            segment(300, codes, generator, torch.tensor(float(n), dtype=dtype), i)
            for n, i in itertools.product(counts, range(len(groups)))
        ]
        check(worker, library, segments, groups, scaling)
        assert segments[0].step == 1
        stuck = 2**24 if dtype == torch.float32 else 2**24 + 1
        assert segments[-1].step == stuck, "as torch's counts do"


@pytest.mark.parametrize("found_inf", [1.0, 2.0, float("nan")])
def test_found_inf_skips_and_does_not_count(worker, library, found_inf):
    generator = torch.Generator().manual_seed(5)
    segments = [segment(300, (0, 0, 0), generator, torch.tensor(7.0), 0) for _ in range(3)]
    before = [[t.clone() for t in s.tensors] for s in segments]
    factor = torch.tensor(math.nan, dtype=torch.float64)
    scaling = Scaling(torch.tensor(2.0), torch.tensor(found_inf), factor)
    check(worker, library, segments, [group()], scaling)
    for s, old in zip(segments, before, strict=True):
        assert s.step == 7
        assert all(same_bits(a, b) for a, b in zip(s.tensors, old, strict=True))


# The formats for low memory

# Around vectors, blocks, what a warp steps of them, and chunks.
FORMAT_SIZES = (1, 7, 8, 15, 16, 17, 127, 128, 129, 511, 512, 513, 4095, 4096, 4097, 4751, 8330)
# The upper half of the index is zero, changes within a block, a chunk or never, or is not zero.
FIRST_INDICES = (0, 3, 2**32 - 4096, 2**32 - 4096 * 2 - 1, 2**32 - 5, 2**32, 5 * 2**32 + 77, 2**47)
STREAMS = ("param", "grad", "exp_avg", "exp_avg_sq", "remainder", "exp_avg_exponent",
           "exp_avg_sq_exponent")  # fmt: skip
ROW = StepScalars(
    grad_scale=0.5, weight_decay=0.0, decay=0.99, one_minus_beta1=0.1, beta2=0.999,
    one_minus_beta2=0.001, eps=1e-8, step_size=1e-2, action=Action.RECTIFIED,
    key_low=float(0x9E3779B9), key_high=float(0xFFFFFFFF),
)  # fmt: skip
ROWS = [
    ROW,
    ROW._replace(weight_decay=0.1, decay=1.0),
    ROW._replace(action=Action.MOMENTUM),
    ROW._replace(action=Action.HOLD, key_low=0.0, key_high=0.0),
    ROW._replace(action=Action.SKIP),
    ROW._replace(weight_decay=0.1, action=Action.HOLD, key_high=3.0),
]


def low_memory_streams(size: int, codes, generator: torch.Generator, wild: bool) -> list[Any]:
    """Tensors of the formats; if `wild` of any bits, and else such that steps stay finite."""

    def integers(low: int, high: int, dtype: torch.dtype, count: int = size) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator).to(dtype)

    def numbers(dtype: torch.dtype) -> Tensor:
        if wild:
            bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
            made = integers(-(2**31), 2**31, bits)
            made[::11] = torch.iinfo(bits).max  # NaN, of which a carry makes -0
            made = made.view(dtype)
            for i, value in enumerate((0.0, -0.0, torch.inf, -torch.inf)):
                made[i + 1 :: 11] = value
            return made
        return torch.randn(size, generator=generator).to(dtype)

    param, grad, state = (torch.bfloat16 if code >= len(DTYPES) else DTYPES[code] for code in codes)
    streams: list[Tensor | None] = [numbers(param), numbers(grad)]
    exponents: list[Tensor | None] = [None, None]
    for i, least in enumerate((16, 32)):
        if FORMAT_NAMES[codes[2]] == "block8":
            streams.append(integers(0, 256, torch.uint8))
            end = 256 if wild else 140
            many = formats.blocks(size)
            exponents[i] = made = integers(least if wild else 110, end, torch.uint8, many)
            if wild:
                made[i::3] = 255
        else:
            moment = numbers(state)
            streams.append(moment.abs() if i and not wild else moment)
    dtype = {"master24": torch.int8, "master32": torch.int16}.get(FORMAT_NAMES[codes[0]])
    streams.append(integers(-(2**15), 2**15, dtype) if dtype else None)
    return [*streams, *exponents]


def low_memory_segments(codes, *, first_indices=FIRST_INDICES) -> list[LowMemorySegment]:
    """Every size, at several alignments and indices, by every row of scalars."""
    generator = torch.Generator().manual_seed(9)
    segments = []
    for size, row in itertools.product(FORMAT_SIZES, range(len(ROWS))):
        i = len(segments)
        streams = low_memory_streams(size, codes, generator, wild=i % 5 == 4)
        # All streams at their vectors, one stream elsewhere, or all by as many elements.
        alone = tuple(i // 4 % 16 + 1 if i // 4 % 5 == k else 0 for k in range(5))
        offsets = ((0,) * 5, alone, (0,) * 5, (i // 4 % 16,) * 5)[i % 4] + (i % 3, i % 2)
        index = first_indices[i // 3 % len(first_indices)]
        segments.append(
            LowMemorySegment(streams, offsets, index, 0x1234567887654321 * i % 2**64, row)
        )
    return segments


def comparable(streams: list[Tensor | None]) -> list[Tensor]:
    """The streams, but without the codes of blocks that are NaN, whose signs are anything."""
    streams = list(streams)
    for moment, exponent in ((2, 5), (3, 6)):
        if streams[exponent] is not None:
            each = streams[exponent].repeat_interleave(formats.BLOCK)[: len(streams[moment])]
            streams[moment] = torch.where(each == 255, 0, streams[moment])
    return [stream for stream in streams if stream is not None]


def check_low_memory(worker, library, codes, segments=None, rows=ROWS) -> None:
    """Steps copies of the segments with the emulated kernel and with the reference."""
    segments = segments or low_memory_segments(codes)
    results = worker("low_memory_step", library, codes, segments, rows)
    for s, (ours, whole) in zip(segments, results, strict=True):
        param, grad, exp_avg, exp_avg_sq, *more = s.streams
        extra = formats.LowMemory(*more, s.first_index, s.key)
        low_memory_update_(param, grad, exp_avg, exp_avg_sq, extra, rows[s.row], codes)
        what = f"{len(param)} elements, {s.first_index=}, {s.offsets=}, {rows[s.row]}"
        assert whole, f"in front of {what}"
        there = [name for name, one in zip(STREAMS, s.streams, strict=True) if one is not None]
        for name, a, b in zip(there, comparable(ours), comparable(s.streams), strict=True):
            equal = same_bits(a, b) if a.is_floating_point() else torch.equal(a, b)
            assert equal, f"{name} of {what}: {(a != b).nonzero().flatten().tolist()[:20]}"


every_low_memory_set = pytest.mark.parametrize("codes", LOW_MEMORY_SETS, ids=dtypes_id)


@every_low_memory_set
def test_every_size_alignment_index_and_action_of_a_format(worker, library, codes):
    check_low_memory(worker, library, codes)


@every_low_memory_set
def test_a_large_odd_tensor_of_a_format(worker, library, codes):
    generator = torch.Generator().manual_seed(10)
    streams = low_memory_streams(2**20 + 3, codes, generator, wild=False)
    large = LowMemorySegment(streams, (0,) * 7, 2**32 - 2**19 - 1, 7, 0)
    check_low_memory(worker, library, codes, [large])


@pytest.mark.parametrize("codes", [(5, 1, 7)], ids=dtypes_id)
def test_more_scalars_of_a_format_than_fit_into_a_launch(worker, library, codes):
    rows = [ROW._replace(step_size=i / 1000, key_low=float(2**32 - 1 - i)) for i in range(40)]
    generator = torch.Generator().manual_seed(11)
    segments = [
        LowMemorySegment(low_memory_streams(300, codes, generator, wild=False), (0,) * 7, 0, i, i)
        for i in range(40)
    ]
    check_low_memory(worker, library, codes, segments, rows)


# The gradient norm


def check_norm(worker, library, dtype: torch.dtype) -> None:
    """Every case and norm, at every alignment; blocks in any order give the same bits."""
    code = DTYPES.index(dtype)
    chunk = worker("norm_chunk", library, code)
    for i, (name, tensors) in enumerate(norms.cases(dtype, chunk)):
        offset = i % (16 // dtype.itemsize)
        arguments = (library, tensors, norms.NORMS)
        aligned = worker("power_sums", *arguments, 0, False)
        moved = worker("power_sums", *arguments, offset, True)
        for norm_type, ours, other in zip(norms.NORMS, aligned, moved, strict=True):
            try:
                norms.assert_close(ours, tensors, norm_type, norms.CUDA_ERROR)
                assert str(ours) == str(other), "in another order"  # NaN equals NaN there
            except AssertionError as error:
                raise AssertionError(f"{dtype}, {name}, norm {norm_type}: {error}") from None


def check_norm_far(worker, library) -> None:
    """A block beyond element 2^32."""
    numel, block = 2**32 + 5, 2**32 // 8192
    values, ours = worker("norm_far", library, numel, block)
    norms.assert_close(ours, [values], 2.0, norms.CUDA_ERROR)


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
def test_the_norm_of_every_kind_of_gradients(worker, library, dtype):
    check_norm(worker, library, dtype)


@every_dtype
@pytest.mark.parametrize("norm_type", norms.NORMS)
def test_the_norm_of_a_large_odd_gradient(worker, library, dtype, norm_type):
    large = [torch.randn(2**20 + 3, generator=torch.Generator().manual_seed(7)).to(dtype)]
    [ours] = worker("power_sums", library, large, [norm_type], 0, False)
    # The roundings of so many threads nearly cancel.
    norms.assert_close(ours, large, norm_type, 3e-8)


def test_the_norm_beyond_element_2_to_the_32(worker, library):
    check_norm_far(worker, library)


def test_the_norm_of_unchanged_gradients_uploads_nothing(worker, library):
    sizes = [i % 71 for i in range(1000)]
    first, second, moved = worker("norm_uploads", library, sizes)
    assert first[1] >= 1000 * 16
    assert second == (2, 0)
    assert 16_000 <= moved[1] <= 16_100


@pytest.mark.parametrize("norm_type", [0.0, 3.0, -math.inf, math.nan])
def test_other_norms_are_refused(worker, library, norm_type):
    with pytest.raises(AssertionError, match="norm_type: expected 1, 2 or inf"):
        raise AssertionError(worker("norm_error", library, norm_type))


# Faults in the kernels that these checks must find

CHECKS: tuple[Callable, ...] = (
    lambda *fixtures: check_product(*fixtures, (0, 0, 0)),
    lambda *fixtures: check_many(*fixtures, (0, 0, 0), 5000),
    check_far,
    lambda *fixtures: test_found_inf_skips_and_does_not_count(*fixtures, 1.0),
    lambda *fixtures: check_factor(*fixtures, (0, 0, 0)),
)
LOW_MEMORY_CHECKS: tuple[Callable, ...] = (
    lambda *fixtures: check_low_memory(*fixtures, (5, 0, 7)),
    lambda *fixtures: check_low_memory(*fixtures, (4, 0, 4)),
)
NORM_CHECKS: tuple[Callable, ...] = (
    lambda *fixtures: check_norm(*fixtures, torch.float32),
    check_norm_far,
)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory, compiled) -> dict[str, str]:
    """The module of each fault, and of none."""

    def make(stem: str, changes: list[tuple[str, str]], folder: Path) -> str:
        headers = ("cuda/launch.h", "cuda/step_kernel.h", "cuda/formats_cuda.h", "core/formats.h")
        names = [f"cuda/{stem}.cu", *headers]
        files = {name: (CSRC / name).read_text() for name in names}
        for old, new in changes:
            count = sum(text.count(old) for text in files.values())
            assert count == 1, f"{old!r} is not in the kernel: update this test"
            files = {name: text.replace(old, new) for name, text in files.items()}
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        changed = compile_kernels(folder / "cuda" / f"{stem}.cu", folder, folder)
        return link((compiled | {stem: changed}).values(), folder)

    made = {"none": ("step_cuda", [SMALLER])}
    made |= {name: ("step_cuda", [change, SMALLER]) for name, change in WRONG_STEP.items()}
    made["none of a format"] = ("low_memory_cuda", [SMALLER])
    for name, change in WRONG_LOW_MEMORY.items():
        made[name] = ("low_memory_cuda", [change, SMALLER])
    made |= {name: ("norm_cuda", [change]) for name, change in WRONG_NORM.items()}
    with ThreadPoolExecutor(2) as pool:
        folders = [tmp_path_factory.mktemp("faulty") for _ in made]
        libraries = pool.map(lambda what, folder: make(*what, folder), made.values(), folders)
        return dict(zip(made, libraries, strict=True))


def caught(worker, library, checks: tuple[Callable, ...]) -> bool:
    for check in checks:
        try:
            check(worker, library)
        except (AssertionError, Crashed):
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("fault", WRONG_STEP)
def test_a_fault_in_the_kernel_is_caught(worker, faulty, fault):
    assert caught(worker, faulty[fault], CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("fault", WRONG_LOW_MEMORY)
def test_a_fault_in_the_kernel_of_a_format_is_caught(worker, faulty, fault):
    assert caught(worker, faulty[fault], LOW_MEMORY_CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("fault", WRONG_NORM)
def test_a_fault_in_the_kernel_of_the_norm_is_caught(worker, faulty, fault):
    assert caught(worker, faulty[fault], NORM_CHECKS)


@pytest.mark.slow
def test_without_a_fault_nothing_is_caught(worker, faulty):
    assert not caught(worker, faulty["none"], CHECKS + NORM_CHECKS)
    assert not caught(worker, faulty["none of a format"], LOW_MEMORY_CHECKS)
