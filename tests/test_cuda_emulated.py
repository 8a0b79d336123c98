"""The CUDA source, compiled as plain C++ and run on the CPU, gives the bits of the reference."""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from radam_kernels import launch, radam_
from radam_kernels.backends.device_tables import device_tables
from radam_kernels.modules import DTYPES, cpu

FOLDER = Path(__file__).parent / "cuda_emulation"
DTYPE_SETS = [
    codes for codes in itertools.product(range(len(DTYPES)), repeat=3) if cpu.supported(*codes)
]
SIZES = (0, 1, 3, 4, 5, 255, 256, 257, 5000)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulated kernel with")
    library = tmp_path_factory.mktemp("emulation") / "emulated.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing"]
    flags += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-Wno-unknown-pragmas"]
    source = str(FOLDER / "emulation.cpp")
    subprocess.run([compiler, *flags, f"-I{FOLDER}", source, "-o", str(library)], check=True)
    found = ctypes.CDLL(str(library))
    found.emulated_chunk.restype = ctypes.c_int64
    return found


@pytest.fixture
def step(emulated, monkeypatch):
    """radam_ with the emulated kernel in the place of every backend."""

    def step_(bucket, table, groups):
        chunk = emulated.emulated_chunk(*bucket.dtypes)
        tables = device_tables(bucket, table, chunk, torch.device("cpu"), 0)
        address, count = table.scalars(groups)
        pointer, long = ctypes.c_void_p, ctypes.c_int64
        failed = emulated.emulated_step(
            pointer(tables.segments.data_ptr()),
            pointer(tables.work.data_ptr()),
            long(len(tables.work)),
            *bucket.dtypes,
            pointer(address),
            long(count),
            pointer(address if count > 32 else None),
            1,  # a device that is not the current one
        )
        assert not failed
        assert emulated.emulated_current_device() == 0

    def step(*tensors, **options):
        with monkeypatch.context() as patch:
            patch.setattr(launch, "resolve", lambda name, device_type: step_)
            radam_(*tensors, **options)

    return step


def make(sizes, dtypes, *, offset=0, seed=0):
    """Params, grads, exp_avgs and exp_avg_sqs inside larger buffers full of a guard value."""
    generator = torch.Generator().manual_seed(seed)
    lists, buffers = [], []
    for stream, dtype in enumerate((dtypes[0], dtypes[1], dtypes[2], dtypes[2])):
        lists.append([])
        for size in sizes:
            buffer = torch.full((size + offset + 16,), 777.0, dtype=DTYPES[dtype])
            inside = buffer[offset : offset + size]
            values = torch.randn(size, generator=generator, dtype=torch.float64)
            inside.copy_(values.square() if stream == 3 else values)
            lists[-1].append(inside)
            buffers.append((buffer, offset, size))
    return lists, buffers


def options(step, **more):
    return dict(step=step, lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8) | more


def names(codes):
    return "-".join(str(DTYPES[c]).removeprefix("torch.") for c in codes)


@pytest.mark.parametrize("dtypes", DTYPE_SETS, ids=names)
@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1}], ids=["plain", "l2"])
def test_every_dtype_set_gives_the_bits_of_the_reference(step, same_bits, dtypes, decay):
    for t in (1, 8):  # below and above the threshold
        ours, buffers = make(SIZES, dtypes)
        truth, _ = make(SIZES, dtypes)
        step(*ours, **options(t, **decay))
        radam_(*truth, **options(t, **decay), backend="reference")
        for a, b in zip(itertools.chain(*ours), itertools.chain(*truth), strict=True):
            assert same_bits(a, b)
        for buffer, offset, size in buffers:
            assert (buffer[:offset] == 777).all()
            assert (buffer[offset + size :] == 777).all()


@pytest.mark.parametrize("offset", range(1, 9))
@pytest.mark.parametrize("dtypes", [(0, 0, 0), (1, 1, 0), (3, 3, 3)], ids=names)
def test_segments_may_start_anywhere(step, same_bits, dtypes, offset):
    ours, buffers = make((5, 257, 5000), dtypes, offset=offset)
    truth, _ = make((5, 257, 5000), dtypes, offset=offset)
    more = {"decoupled_weight_decay": True, "weight_decay": 0.1, "maximize": True}
    step(*ours, **options(7, **more))
    radam_(*truth, **options(7, **more), backend="reference")
    for a, b in zip(itertools.chain(*ours), itertools.chain(*truth), strict=True):
        assert same_bits(a, b)
    for buffer, before, size in buffers:
        assert (buffer[:before] == 777).all()
        assert (buffer[before + size :] == 777).all()


def test_below_the_threshold_the_parameter_can_be_left_alone(step, same_bits):
    ours, _ = make(SIZES, (0, 0, 0))
    before = [p.clone() for p in ours[0]]
    step(*ours, **options(1, degenerated_to_sgd=False))
    assert all(same_bits(a, b) for a, b in zip(ours[0], before, strict=True))


def test_a_thousand_segments_and_a_large_one_in_one_launch(step, same_bits):
    sizes = [64] * 1000 + [2**17 + 3]
    ours, _ = make(sizes, (0, 0, 0))
    truth, _ = make(sizes, (0, 0, 0))
    step(*ours, **options(9))
    radam_(*truth, **options(9), backend="reference")
    for a, b in zip(itertools.chain(*ours), itertools.chain(*truth), strict=True):
        assert same_bits(a, b)


def test_a_device_that_is_not_there_is_an_error(emulated):
    nothing = [ctypes.c_void_p(8), ctypes.c_void_p(8), ctypes.c_int64(1), 0, 0, 0]
    nothing += [ctypes.c_void_p(8), ctypes.c_int64(0), None]
    assert emulated.emulated_step(*nothing, 5) == 1  # there is no such device
    assert emulated.emulated_current_device() == 0
