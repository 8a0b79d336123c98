"""Reports which backends work here and why others do not, and tests those that do."""

import argparse
import platform
import sysconfig
import time
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from . import available_backends
from .backends import BackendName, resolve, why_not
from .backends.cuda import NOT_BUILT, dotted, old_driver
from .backends.devices import DEVICE_TYPES, is_available
from .functional import COMPILES_VIEWS, radam_
from .modules import cpu, load_optional
from .sharding import FULLY_SHARDS_ON_CPU

# Elements for the test of speed: more than caches hold, but few for slow backends such as Triton's
# interpreter.
_SIZES = {"gpu": 1 << 26, "cpu": 1 << 24}
_SMALL = 1 << 16
_BYTES = 28  # memory traffic of a float32 parameter: four reads and three writes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The doctor has no options."""


def main(args: argparse.Namespace) -> int:
    """Prints the report; returns 0 if every backend that works here gives the reference's bits."""
    for name, text in _facts().items():
        print(f"{name:14}{text}")
    print()
    healthy = True
    for name, reason in available_backends().items():
        if reason:
            print(f"{name:14}no: {reason}")
            continue
        for device_type in _available():
            if not why_not(name, device_type):
                verdict, good = _test(name, device_type)
                healthy &= good
                print(f"{name:14}works on {device_type}: {verdict}")
    taken = " and ".join(f"the {_auto_backend(d)} backend on {d}" for d in _available())
    if healthy:
        print(f"\nAll is well: RAdam takes {taken}.")
    else:
        print("\nNot well: a backend gives wrong bits, see above; choose another (backend=...).")
    return 0 if healthy else 1


def _available() -> list[str]:
    return [row.name for row in DEVICE_TYPES if is_available(row.name)]


def _facts() -> dict[str, str]:
    cuda = load_optional("_cuda")
    # The import refuses to run without the GIL.
    build = ", free-threaded, with the GIL" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    facts = {
        "radam_kernels": f"{_version('radam_kernels')}, sources {cpu.fingerprint}",
        "python": f"{platform.python_version()}{build} on {platform.platform()}",
        "torch": f"{torch.__version__}; tensors are read through {cpu.tensors_read_by()}",
        "triton": _version("triton"),
        "cpu": f"{', '.join(cpu.instruction_sets)}; {torch.get_num_threads()} threads from "
        f"{cpu.threads_from()}",
        "cuda": f"_cuda is not built: {NOT_BUILT[cpu.cuda_built]}"
        if torch.version.cuda
        else "_cuda is not built, and this torch has no CUDA to run it",
    }
    if lacks := _lacks():
        facts["torch lacks"] = lacks
    if cuda:
        runtime, driver = cuda.runtime_version(), cuda.driver_version()
        facts["cuda"] = f"_cuda for {cuda.architectures}, runtime {dotted(runtime)}, " + (
            f"driver for {dotted(driver)}" if driver else "no driver"
        )
        if reason := old_driver(cuda):
            facts["cuda"] += f"; {reason}"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            facts[f"gpu {i}"] = torch.cuda.get_device_name(i)
    return facts


def _lacks() -> str:
    """What this version of torch lacks that later ones have."""
    version = TorchVersion(torch.__version__)
    lacking = {
        "a fast way to read tensors, for steps of many small ones": cpu.tensors_read_by()
        == "Python",
        "fully_shard on the CPU": not FULLY_SHARDS_ON_CPU,
        "gradients of another dtype than their parameter (grad_dtype)": version < "2.10",
        "compiled radam_ of tensors in flat buffers, which is refused": not COMPILES_VIEWS,
    }
    return "; ".join(what for what, is_lacking in lacking.items() if is_lacking)


def _test(name: BackendName, device_type: str) -> tuple[str, bool]:
    """Compares a backend's bits on a device with the reference's, and measures its speed.

    Returns a line for the report, and whether the bits are right.
    """
    size = 5000
    results = []
    backends: tuple[BackendName, ...] = (name, "reference")
    for backend in backends:
        tensors = _tensors(size, device_type)
        for step in (5, 6):  # below and above the threshold
            _step(tensors, step, backend)
        results.append(tensors)
    if not all(torch.equal(ours, truth) for ours, truth in zip(*results, strict=True)):
        return "WRONG: its bits differ from the reference's; please report this", False
    slow = name == "reference" or (name == "triton" and device_type == "cpu")
    size = _SMALL if slow else _SIZES["cpu" if device_type == "cpu" else "gpu"]
    seconds = _time(_tensors(size, device_type), name, device_type)
    return (
        f"same bits as the reference; {size} float32 parameters in {1e3 * seconds:.2f} ms, "
        f"{_BYTES * size / seconds / 1e9:.1f} GB/s",
        True,
    )


def _tensors(size: int, device_type: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    param, grad = (torch.randn(size, generator=generator) for _ in range(2))
    tensors = [param, grad, torch.zeros(size), torch.zeros(size)]
    return [t.to(device_type) for t in tensors]


def _step(tensors: list[Tensor], step: int, backend: BackendName) -> None:
    radam_(*tensors, step=step, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, backend=backend)


def _time(tensors: list[Tensor], backend: BackendName, device_type: str) -> float:
    """Median seconds per step, measured for about half a second."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 4 or time.perf_counter() - begin < 0.5:
        before = time.perf_counter()
        _step(tensors, 10, backend)
        if device_type != "cpu":
            torch.get_device_module(device_type).synchronize()
        times.append(time.perf_counter() - before)
    return sorted(times[1:])[len(times) // 2 - 1]


def _auto_backend(device_type: str) -> str:
    return resolve("auto", device_type).__name__.rpartition(".")[2].strip("_")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
