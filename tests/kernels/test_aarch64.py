"""The CPU kernels, compiled for aarch64 and run by an emulator, give the bits of the reference.

CMake compiles them with what CMakeLists.txt says. The driver, which is linked to their object files,
steps copies of the memory that a test has made, so the tests are those of the kernels of this
machine.
"""

import ctypes
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from radam_kernels import formats
from radam_kernels.modules import DTYPES, FORMAT_NAMES
from tests.helpers import LOW_MEMORY_SETS, dtypes_id
from tests.kernels import norms, test_backends, test_formats
from tests.kernels.stepping import FIELDS, NUMEL, Codes, Kernel

ROOT = Path(__file__).parents[2]
COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def compile_driver(source: Path, build: Path) -> Path:
    """The driver, with the CPU kernels of a source tree."""
    # CMake asks the Python of the target for its headers. That of this machine, which `env` starts,
    # serves as well: no part of Python is compiled.
    configure = [
        "cmake", "-S", source, "-B", build, "-DRADAM_CUDA=OFF",
        "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={COMPILER}", "-DCMAKE_CROSSCOMPILING_EMULATOR=env",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}",
    ]  # fmt: skip
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    command = ["cmake", "--build", build, "--target", "step_cpu_baseline", "--parallel", "2"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    sources = [ROOT / "tests/kernels/aarch64/driver.cpp", source / "csrc/cpu/launch_cpu.cpp"]
    objects = (build / "CMakeFiles" / "step_cpu_baseline.dir").rglob("*.o")
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-static", "-I", source / "csrc"]
    driver = build / "driver"
    subprocess.run([COMPILER, *options, *sources, *objects, "-o", driver], check=True)
    return driver


Run = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Answers requests to the driver."""
    emulator = next(filter(None, map(shutil.which, EMULATORS)), None)
    needed = {"g++-aarch64-linux-gnu": shutil.which(COMPILER), "qemu-user-static": emulator}
    needed["cmake"] = shutil.which("cmake")
    if missing := [package for package, found in needed.items() if found is None]:
        pytest.skip(f"needs {' and '.join(missing)} (packages of Debian)")
    driver = compile_driver(ROOT, tmp_path_factory.mktemp("aarch64"))

    def run(requests: bytes) -> bytes:
        return subprocess.run([emulator, driver], input=requests, check=True, capture_output=True).stdout

    return run


def memory_of(rows: np.ndarray, grads: np.ndarray, low_memory: np.ndarray, codes: Codes):
    """The bytes from the first to the last that the tables point to."""
    param, grad, state = (FORMAT_NAMES[code] for code in codes)
    width = {name: test_formats.storage(name).itemsize for name in (param, grad, state)}
    numel = rows[:, NUMEL]
    moments = [rows[:, FIELDS.index(name)] for name in test_formats.MOMENTS]
    streams = [(rows[:, FIELDS.index("param")], numel * width[param]), (grads, numel * width[grad])]
    streams += [(moment, numel * width[state]) for moment in moments]
    if len(low_memory):
        bits = {"master24": 24, "master32": 32}.get(param)
        remainder = formats.REMAINDERS[bits].itemsize if bits else 0
        exponents = formats.blocks(numel) * (state == "block8")
        sizes = (numel * remainder, exponents, exponents)
        streams += zip(low_memory.astype(np.int64).T[:3], sizes, strict=True)
    begin = min(int(at[size > 0].min()) for at, size in streams if (size > 0).any())
    end = max(int((at + size).max()) for at, size in streams)
    return np.ctypeslib.as_array((ctypes.c_uint8 * (end - begin)).from_address(begin))


# As `struct Request` of the driver.
def request(norm: int, codes: Codes, tables: tuple[int, int, int], threads: int, memory) -> bytes:
    address = memory.ctypes.data
    return struct.pack("<10q", norm, *codes, *tables, threads, address, memory.nbytes)


def aarch64_kernel(run: Run, threads: int) -> Kernel:
    def launch(rows, grads, low_memory, codes, scalars):
        memory = memory_of(rows, grads, low_memory, codes)
        counts = len(scalars), len(rows), len(low_memory)
        head = request(-1, codes, counts, threads, memory)
        tables = (scalars, rows, grads, low_memory, memory)
        answer = run(head + b"".join(table.tobytes() for table in tables))
        memory[:] = np.frombuffer(answer, np.uint8)

    return Kernel(f"aarch64, {threads} threads", "cpu", launch)


@pytest.fixture
def kernels(run) -> list[Kernel]:
    return [aarch64_kernel(run, threads) for threads in (1, 3)]
