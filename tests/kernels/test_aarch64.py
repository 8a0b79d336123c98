"""The CPU kernels, compiled for aarch64 and run by an emulator, give the bits of the reference.

CMake compiles them with what CMakeLists.txt says. aarch64/driver.cpp steps copies of what a test
has in memory, so that the tests of this machine's kernels are those of the emulated ones.
"""

import ctypes
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from radam_kernels import formats
from radam_kernels.modules import DTYPES, FORMAT_NAMES
from tests.helpers import same_bits
from tests.kernels import norms, test_backends, test_formats
from tests.kernels.stepping import FIELDS, NUMEL, Codes, Kernel

ROOT = Path(__file__).parents[2]
COMPILER = "aarch64-linux-gnu-g++"
# Programs, and the packages of Debian that have them.
PROGRAMS = {
    COMPILER: "g++-aarch64-linux-gnu",
    "qemu-aarch64-static": "qemu-user-static",
    "cmake": "cmake",
    "ninja": "ninja-build",
}
INCLUDE = sysconfig.get_path("include")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

Run = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    """The folder of a build for aarch64, where nothing is built yet."""
    if missing := [package for name, package in PROGRAMS.items() if not shutil.which(name)]:
        pytest.skip(f"needs {', '.join(missing)} (packages of Debian)")
    folder = tmp_path_factory.mktemp("aarch64")
    # CMake wants to run the Python of the target. `env` as its emulator runs this one, whose
    # headers serve as well.
    options = {
        "RADAM_CUDA": "OFF",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "CMAKE_COMPILE_WARNING_AS_ERROR": "ON",
        "CMAKE_CROSSCOMPILING_EMULATOR": "env",
        "Python_EXECUTABLE": sys.executable,
        "Python_INCLUDE_DIR": INCLUDE,
    }
    command = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja"]
    subprocess.run([*command, *(f"-D{k}={v}" for k, v in options.items())], check=True)
    return folder


def make(build: Path, target: str) -> None:
    subprocess.run(["cmake", "--build", build, "--target", target, "--parallel", "2"], check=True)


@pytest.fixture(scope="module")
def run(build) -> Run:
    """Answers requests to the driver."""
    make(build, "step_cpu_baseline")
    objects = (build / "CMakeFiles" / "step_cpu_baseline.dir").rglob("*.o")
    sources = [ROOT / "tests/kernels/aarch64/driver.cpp", ROOT / "csrc/cpu/launch_cpu.cpp"]
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-static"]
    driver = build / "driver"
    command = [COMPILER, *options, "-I", ROOT / "csrc", *sources, *objects, "-o", driver]
    subprocess.run(command, check=True)

    def run(requests: bytes) -> bytes:
        command = ["qemu-aarch64-static", driver]
        return subprocess.run(command, input=requests, check=True, stdout=subprocess.PIPE).stdout

    return run


def request(norm: int, codes: Codes, rows: Iterable[int], memory: np.ndarray) -> bytes:
    """`struct Request` of the driver."""
    threads, address = 3, memory.ctypes.data
    return struct.pack("<10q", norm, *codes, *rows, threads, address, memory.nbytes)


def memory_of(rows: np.ndarray, grads: np.ndarray, low_memory: np.ndarray, codes: Codes):
    """The bytes from the first that the tables point to until the last."""
    param, grad, state = (FORMAT_NAMES[code] for code in codes)
    numel = rows[:, NUMEL]
    sizes = {name: numel * test_formats.storage(name).itemsize for name in (param, grad, state)}
    streams = [(grads, sizes[grad])]
    for name in ("param", "exp_avg", "exp_avg_sq"):
        streams.append((rows[:, FIELDS.index(name)], sizes[param if name == "param" else state]))
    if len(low_memory):
        remainder, *exponents = low_memory.astype(np.int64).T[:3]
        if param.startswith("master"):
            dtype = formats.REMAINDERS[int(param.removeprefix("master"))]
            streams.append((remainder, numel * dtype.itemsize))
        if state == "block8":
            streams += [(exponent, formats.blocks(numel)) for exponent in exponents]
    begin = min(int(at[size > 0].min()) for at, size in streams)
    end = max(int((at + size).max()) for at, size in streams)
    return np.ctypeslib.as_array((ctypes.c_uint8 * (end - begin)).from_address(begin))


@pytest.fixture
def kernels(run) -> list[Kernel]:
    """The emulated kernel, to step what is in the memory of this process."""

    def launch(rows, grads, low_memory, codes, scalars):
        memory = memory_of(rows, grads, low_memory, codes)
        head = request(-1, codes, map(len, (scalars, rows, low_memory)), memory)
        tables = (scalars, rows, grads, low_memory, memory)
        answer = run(head + b"".join(table.tobytes() for table in tables))
        memory[:] = np.frombuffer(answer, np.uint8)

    return [Kernel("aarch64", "cpu", launch)]


def by_check(*checks: Callable[..., None]) -> pytest.MarkDecorator:
    names = [check.__name__.removeprefix("test_") for check in checks]
    return pytest.mark.parametrize("check", checks, ids=names)


@by_check(
    test_backends.test_every_size_form_and_action_in_one_table,
    test_backends.test_any_bits,
    test_backends.test_streams_start_anywhere,
    test_backends.test_what_lies_halfway_is_rounded_to_even,
    test_backends.test_nan_stays_nan_whatever_its_payload,
)
@test_backends.by_dtypes
def test_dtypes(kernels, check, dtypes):
    check(kernels, dtypes)


@test_backends.by_one_dtype
def test_every_combination_of_special_values(kernels, dtypes):
    test_backends.test_every_combination_of_special_values(kernels, dtypes)


@by_check(
    test_backends.test_each_16_bit_value_is_read_exactly,
    test_backends.test_each_16_bit_value_is_written_exactly,
    test_backends.test_16_bit_results_round_to_nearest_even,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_elements(kernels, check, dtype):
    check(kernels, dtype)


@by_check(
    test_formats.test_every_size_form_and_action_in_one_table,
    test_formats.test_any_bits,
    test_formats.test_streams_start_anywhere,
    test_formats.test_negative_second_moments,
    test_formats.test_indices_near_and_beyond_32_bits,
)
@test_formats.by_codes
def test_formats_for_low_memory(kernels, check, codes):
    check(kernels, codes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(run, dtype):
    """They have the bits of this machine's."""
    tensors = [tensor for _, case in norms.cases(dtype, 1024) for tensor in case]
    tensors.append(torch.randn(2**17 + 3, generator=torch.Generator().manual_seed(7)).to(dtype))
    codes = (0, DTYPES.index(dtype), 0)
    requests, expected = [], []
    for tensor in tensors:
        bucket, memory = norms.Gradients([tensor]).bucket, tensor.view(torch.uint8).numpy()
        for i, norm_type in enumerate(norms.NORMS):
            requests += [request(i, codes, (0, 0, 0), memory), memory.tobytes()]
            expected.append(bucket.power_sum(norm_type, threads=1))
    got = torch.frombuffer(bytearray(run(b"".join(requests))), dtype=torch.float64)
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        tensor, norm_type = tensors[i // len(norms.NORMS)], norms.NORMS[i % len(norms.NORMS)]
        same = same_bits(ours, torch.tensor(theirs, dtype=torch.float64))
        assert same, f"norm {norm_type} of {tensor}: {ours.item()!r}, not {theirs!r}"


def test_the_whole_module_compiles_without_a_warning(build):
    command = [COMPILER, "-E", f"-I{INCLUDE}", "-include", "Python.h", "-x", "c++", "/dev/null"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("the headers of this Python are only for its own machine")
    make(build, "_cpu")
