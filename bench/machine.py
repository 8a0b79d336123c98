"""What a measurement was made on: device, driver, versions, commit and sources."""

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from radam_kernels.fingerprint import measured_fingerprint
from radam_kernels.modules import cpu, load_optional

from .folders import ROOT


def facts(device: torch.device) -> dict[str, Any]:
    """The head of a file of results."""
    return {
        "device": _device(device),
        "cpu": {
            "name": cpu_name(),
            "threads": torch.get_num_threads(),
            "instruction_set": cpu.instruction_sets[0],
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "torch-optimi": _version("torch-optimi"),
            "pytorch_optimizer": _version("pytorch_optimizer"),
            "cuda runtime of torch": torch.version.cuda,
            "cuda runtime of the kernels": _runtime(),
            "nvcc": _answer(["nvcc", "--version"], r"release \S+ V(\S+)"),
        },
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "sources": measured_fingerprint(ROOT),
    }


def commit() -> str:
    """Of the tree, or RADAM_COMMIT where the tree came without its history."""
    described = _answer(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], r"(\S+)")
    return os.environ.get("RADAM_COMMIT") or described or "unknown"


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "driver": _answer(query, r"(\S+)"),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "cpu")


def _answer(command: list[str], pattern: str) -> str | None:
    """What a tool says, or None where it is not there or says something else."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(pattern, said)
    return found[1] if found else None


def _runtime() -> str | None:
    if not (cuda := load_optional("_cuda")):
        return None
    number = cuda.runtime_version()
    return f"{number // 1000}.{number % 1000 // 10}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
