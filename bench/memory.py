"""What is left out, and the word for it: what is not here, takes too long, or does not fit."""

from pathlib import Path

import torch

from .cases import Case
from .contenders import REFERENCE, Contender

PART = 0.8  # of what is free
COMPILED_TENSORS = 200  # compiling a step of more takes many minutes


def left_out(case: Case, contender: Contender, device: torch.device, held: int = 0) -> str | None:
    """Why a contender can't be measured beside `held` bytes of the case; None if it can."""
    if contender.compiled and len(case.shapes) > COMPILED_TENSORS:
        return f"compiling takes too long for {len(case.shapes)} tensors"
    return contender.absent or no_room(case, contender, device, held)


def no_room(case: Case, contender: Contender, device: torch.device, held: int = 0) -> str | None:
    """Why the case does not fit beside `held` bytes of it that are there; None if it does."""
    needed, free = needs(case, contender, device) - held, PART * available(device)
    if needed <= free:
        return None
    return f"memory: {case.name} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB may be taken"


def needs(case: Case, contender: Contender, device: torch.device) -> int:
    """Bytes, at most: the streams, what a GPU's limit copies, and temporaries."""
    size = case.dtype.itemsize
    wide = max(4, size)
    streams = 2 * size + 2 * wide
    limit = contender.bytes if device.type == "cuda" else 0
    # torch's fused steps and ours take nothing more; a flat buffer is one more of parameters.
    temporaries = size if contender.flat else 0 if _in_place(contender) else 3 * wide
    return case.elements * (streams + limit + temporaries)


def available(device: torch.device) -> int:
    """Bytes that are free, within the process's control group too, as far as Linux tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        info = Path("/proc/meminfo").read_text()
    except OSError:
        return 8 << 30
    free = 1024 * int(info.partition("MemAvailable:")[2].split()[0])
    group = Path("/sys/fs/cgroup")
    try:
        most, now = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        return min(free, int(most) - int(now))
    except (OSError, ValueError):  # no group, or one without a limit
        return free


def _in_place(contender: Contender) -> bool:
    name = contender.name
    ours = name.startswith("radam_kernels") and name != REFERENCE
    return ours or "fused" in name or contender.make is None
