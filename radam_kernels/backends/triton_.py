"""The Triton kernel: CUDA and ROCm GPUs, and any machine under TRITON_INTERPRET=1."""

import torch

from .device_tables import device_tables, upload_pinned

_INTERPRETER = "TRITON_INTERPRET=1, set before Python starts, runs the kernel on the CPU, slowly"

try:
    import triton

    from .triton_kernel import CHUNK, INTERPRETED, launch_
except ImportError as error:
    INTERPRETED = COMPILES_EXACTLY = False
    _missing = f"Triton can't be imported ({error}); pip install triton"
else:
    _missing = None
    COMPILES_EXACTLY = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)


def why_not(device_type: str, capturable: bool = False) -> str | None:
    if _missing:
        return _missing
    if INTERPRETED:
        return None if device_type == "cpu" else "TRITON_INTERPRET=1: only CPU tensors are stepped"
    if not COMPILES_EXACTLY:
        return (
            f"Triton {triton.__version__} compiles division and square root so that subnormals are "
            "flushed to zero; 3.6 and later do not"
        )
    if device_type != "cuda":
        return f"Triton steps GPU tensors only; {_INTERPRETER}"
    if capturable:
        return "the Triton kernel does not count steps on the GPU, as capturable=True needs"
    return None if torch.cuda.is_available() else f"torch finds no GPU; {_INTERPRETER}"


def step_(bucket, table, groups, scaling) -> None:
    if INTERPRETED:
        _step(bucket, table, groups, scaling, torch.device("cpu"), 0)
        return
    device = torch.device("cuda", bucket.device[1])
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        _step(bucket, table, groups, scaling, device, stream)


def _step(bucket, table, groups, scaling, device: torch.device, stream: int) -> None:
    tables = device_tables(bucket, table, stream, upload_pinned(device))
    rows = bucket.segment_rows
    segments, work = tables.rows("segments", rows), tables.work(rows, CHUNK)
    if bucket.capturable:
        bucket.advance(*scaling.numbers())
        scalars = tables.rows("scalars", bucket.scalar_rows)
    else:
        scalars = tables.rows("scalars", table.scalar_rows(groups))
    launch_(segments, work, scalars, tables.run, tables.blocks, bucket.dtypes)
