"""Results in files: what they were measured on, and a row for each case and optimizer."""

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from radam_kernels.fingerprint import measured_fingerprint
from radam_kernels.modules import cpu, load_optional

from .optimizers import OPTIMIZERS, version_of
from .timing import DEVICE_FAILED, OUT_OF_TIME, Row

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
FILE = "results.json"
SCHEMA = 2
ALWAYS = ("case", "kind", "optimizer", "status", "ms", "extra_bytes")  # columns, though empty


def results_folder(device_name: str) -> Path:
    """bench/results/<device>, in letters that any file system takes."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def facts(device: torch.device) -> dict[str, Any]:
    """What a measurement is made on: device, versions, commit and sources."""
    packages = ("triton", *(row.package for row in OPTIMIZERS if row.package))
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
            **{package: version_of(package) for package in packages},
            "cuda runtime of torch": torch.version.cuda,
            "cuda runtime of the kernels": _runtime(),
            "nvcc": _answer(["nvcc", "--version"], r"release \S+ V(\S+)"),
        },
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        # A tree that came without its history is given its commit.
        "commit": os.environ.get("RADAM_COMMIT")
        or _answer(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], r"(\S+)")
        or "unknown",
        "sources": measured_fingerprint(ROOT),
    }


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or "cpu"


def insert(text: str, name: str, part: str) -> str:
    """The text with `part` between its lines `<!-- name:begin -->` and `<!-- name:end -->`."""
    between = rf"(?s)(?<=<!-- {name}:begin -->\n).*?(?=<!-- {name}:end -->)"
    text, count = re.subn(between, lambda _: part + "\n", text)
    if count != 1:
        raise ValueError(f"expected the markers of {name!r} once in the page, found {count}")
    return text


def frame(results: dict[str, Any]) -> pd.DataFrame:
    """The rows as one tidy table."""
    table = pd.DataFrame(results["rows"])
    return table.assign(**{key: None for key in ALWAYS if key not in table})


def write(file: Path, data: dict[str, Any]) -> None:
    """Writes JSON, all of it or nothing: a run that is cut off leaves a whole file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    new.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(new, file)


def kept(file: Path, now: dict[str, Any]) -> list[Row]:
    """The rows that a file has of the same device, versions and sources.

    Without the cases in which one lacked time, or the device failed.
    """
    try:
        old = json.loads(file.read_text())
    except (OSError, ValueError):
        return []
    if any(old.get(key) != now[key] for key in ("schema", "device", "cpu", "versions", "sources")):
        return []
    lacking = {
        row["case"]
        for row in old["rows"]
        if row["reason"] == OUT_OF_TIME or DEVICE_FAILED in row["reason"]
    }
    return [row for row in old["rows"] if row["case"] not in lacking]


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


def _answer(command: list[str], pattern: str) -> str | None:
    """What a tool says, or None where it is missing or says something else."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found[1] if (found := re.search(pattern, said)) else None


def _runtime() -> str | None:
    if not (cuda := load_optional("_cuda")):
        return None
    number = cuda.runtime_version()
    return f"{number // 1000}.{number % 1000 // 10}"
