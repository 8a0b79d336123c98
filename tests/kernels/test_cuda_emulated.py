"""The CUDA source, compiled as plain C++ and run on the CPU, gives the bits of the reference.

It runs in a process of its own under AddressSanitizer and UBSan, behind the real bindings and the
real Python of the backend; only the CUDA runtime is a stand-in. The last tests plant faults in the
kernel and see these checks find them.
"""

import itertools
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pybind11
import pytest
import torch
from torch import Tensor

from radam_kernels import RAdam
from radam_kernels.launch import launch
from radam_kernels.modules import DTYPES, cpu
from radam_kernels.scaling import Scaling
from tests.helpers import DTYPE_SETS, SIZES, dtypes_id, same_bits
from tests.kernels.cuda_emulation.worker import make_plan

FOLDER = Path(__file__).parent / "cuda_emulation"
CSRC = Path(__file__).parents[2] / "csrc"
SOURCE = CSRC / "cuda" / "step_cuda.cu"
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


def compile_kernels(source: Path, folder: Path) -> Path:
    """The object file of one step_cuda.cu."""
    compiled = folder / "step_cuda.o"
    # In this order: the includes of emulation.cpp look for step_cuda.cu beside `source` first.
    compile_(
        "-c", "-O1", "-g1", "-ffp-contract=off", "-fno-strict-aliasing", *SANITIZE,
        f"-I{source.parent}", str(FOLDER / "emulation.cpp"), "-o", str(compiled),
    )  # fmt: skip
    return compiled


def compile_bindings(folder: Path) -> Path:
    compiled = folder / "bind_cuda.o"
    define = ['-DRADAM_FINGERPRINT=""', '-DRADAM_ARCHITECTURES="emulated"']
    source = CSRC / "bind" / "bind_cuda.cpp"
    compile_("-c", "-O0", "-fvisibility=hidden", *define, str(source), "-o", str(compiled))
    return compiled


def link(kernels: Path, bindings: Path) -> str:
    """The module of both, in the folder of the kernels."""
    library = kernels.with_name("_cuda.so")
    compile_("-shared", *SANITIZE, str(kernels), str(bindings), "-o", str(library))
    return str(library)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[Path, Path]:
    """The object files of the kernels and of the bindings."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the emulated kernels with")
    folder = tmp_path_factory.mktemp("emulation")
    with ThreadPoolExecutor(2) as pool:
        kernels = pool.submit(compile_kernels, SOURCE, folder)
        bindings = pool.submit(compile_bindings, folder)
        return kernels.result(), bindings.result()


@pytest.fixture(scope="module")
def library(compiled) -> str:
    return link(*compiled)


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


@every_dtype_set
def test_every_size_alignment_form_and_side_gives_the_bits_of_the_reference(worker, library, codes):
    check_product(worker, library, codes)


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
    for scaling in (Scaling(), Scaling(torch.tensor(1024.0), torch.tensor(0.0))):
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
    scaling = Scaling(torch.tensor(2.0), torch.tensor(found_inf))
    check(worker, library, segments, [group()], scaling)
    for s, old in zip(segments, before, strict=True):
        assert s.step == 7
        assert all(same_bits(a, b) for a, b in zip(s.tensors, old, strict=True))


# Faults in the kernel that these checks must find

WRONG = {
    "a tail is never stepped": ("i < count; i += kThreads", "i < done; i += kThreads"),
    "an int32 index": (
        "const int64_t begin = chunk * kElements",
        "const int32_t begin = static_cast<int32_t>(chunk * kElements)",
    ),
    "a wrong alignment branch": ("return all % 16 == 0;", "return all % 8 == 0;"),
    "a segment one too long": (
        "left < kElements ? left : kElements",
        "left < kElements ? left + 1 : kElements",
    ),
    "a walk one too far": ("chunk >= chunks()", "chunk > chunks()"),
    "the gradient of another segment": ("arguments.grads[index]", "*arguments.grads"),
    "one moment is not stored": ("store(exp_avg_sqs + i, v[k]);", ""),
    "a count that ignores found_inf": ("a.scaling);", "{a.scaling.grad_scale, nullptr});"),
}
# Only float32, which compiles faster.
SMALLER = (
    "visit_dtypes(step.dtypes, [&]",
    """\
const auto visit_float32 = [](const DTypeSet&, const auto& visit) {
    const Element<kFloat32> only;
    visit(only, only, only);
  };
  visit_float32(step.dtypes, [&]""",
)
CHECKS: tuple[Callable, ...] = (
    lambda *fixtures: check_product(*fixtures, (0, 0, 0)),
    lambda *fixtures: check_many(*fixtures, (0, 0, 0), 5000),
    check_far,
    lambda *fixtures: test_found_inf_skips_and_does_not_count(*fixtures, 1.0),
)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory, compiled) -> dict[str, str]:
    """The module of each fault, and of none."""

    def make(change: tuple[str, str], folder: Path) -> str:
        _, bindings = compiled
        source = SOURCE.read_text()
        for old, new in (change, SMALLER):
            assert source.count(old) == 1, f"{old!r} is not in the kernel: update this test"
            source = source.replace(old, new)
        (folder / "step_cuda.cu").write_text(source)
        return link(compile_kernels(folder / "step_cuda.cu", folder), bindings)

    changes = {"none": ("namespace radam {", "namespace radam {"), **WRONG}
    folders = [tmp_path_factory.mktemp("faulty") for _ in changes]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(changes, pool.map(make, changes.values(), folders), strict=True))


def caught(worker, library) -> bool:
    for check in CHECKS:
        try:
            check(worker, library)
        except (AssertionError, Crashed):
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("fault", WRONG)
def test_a_fault_in_the_kernel_is_caught(worker, faulty, fault):
    assert caught(worker, faulty[fault])


@pytest.mark.slow
def test_without_a_fault_nothing_is_caught(worker, faulty):
    assert not caught(worker, faulty["none"])
