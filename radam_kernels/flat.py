"""Flat buffers: one allocation for many tensors, each in it a view that starts on 256 bytes."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .modules import cpu

# The fields of a table's rows, all int64; the struct Segment in csrc/step.h has them in this order.
SEGMENT_FIELDS = ("param", "grad", "exp_avg", "exp_avg_sq", "numel", "scalars")

_ALIGNMENT = 256  # bytes: a cache line on any device, and torch's own allocators' promise


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills one block of memory: any permutation of a contiguous one."""
    return cpu.is_dense(tensor)


def zeros_like(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Zeros with the shape, strides and device of each tensor, in one allocation for each dtype.

    Each result owns just its own part of that memory, as far as `untyped_storage()` tells: saving,
    pickling or copying one does not drag the others along. The memory goes when the last one does.

    Args:
        tensors: dense tensors; a result has the strides of its tensor.
        dtypes: the dtype of each result.
    """
    chunks: dict[tuple, list[int]] = {}
    for i, (tensor, dtype) in enumerate(zip(tensors, dtypes, strict=True)):
        chunks.setdefault((tensor.device, dtype), []).append(i)
    results: list[Tensor] = [torch.empty(0)] * len(tensors)
    for (device, dtype), members in chunks.items():
        _, views = _views([tensors[i] for i in members], dtype, device)
        for i, view in zip(members, views, strict=True):
            results[i] = view
    return results


@torch.no_grad()
def flatten_(params: Iterable[Tensor]) -> list[Tensor]:
    """Moves parameters into one flat buffer for each dtype and device; returns the buffers.

    Each parameter stays the same object, with the same values, shape and strides; its memory is a
    part of the buffer from now on, starting on a multiple of 256 bytes, in the order given. A
    parameter given several times (tied weights) is moved once. Views of a parameter made before
    (`p.data[0]`, `p.view(-1)`) go on showing the old memory: flatten before making any. Saving or
    copying one parameter does not drag the others along, as with `zeros_like`.

    Args:
        params: dense tensors of any dtype and device.

    Raises:
        ValueError: a parameter is not dense, or is itself part of a larger storage, so that
            others may look at its memory. Nothing is moved then.
    """
    unique = list(dict.fromkeys(params))
    groups: dict[tuple, list[Tensor]] = {}
    for i, param in enumerate(unique):
        if not is_dense(param):
            raise ValueError(
                f"flatten: param {i} of shape {tuple(param.shape)} and strides {param.stride()} is "
                "not dense; replace its data by a contiguous copy first"
            )
        storage = param.untyped_storage().nbytes()
        if storage != param.numel() * param.element_size():
            raise ValueError(
                f"flatten: param {i} of shape {tuple(param.shape)} is a view into a larger storage "
                f"({storage} bytes), which moving it would tear apart; give it memory of its own "
                "(`p.data = p.data.clone()`) or leave it out"
            )
        groups.setdefault((param.device, param.dtype), []).append(param)
    owners: dict[int, int] = {}
    for i, param in enumerate(unique):
        if param.numel() and (first := owners.setdefault(param.data_ptr(), i)) != i:
            raise ValueError(f"flatten: params {first} and {i} share their memory")
    buffers = []
    for (device, dtype), members in groups.items():
        buffer, views = _views(members, dtype, device)
        buffers.append(buffer)
        for param, view in zip(members, views, strict=True):
            param.data = view.copy_(param)
    return buffers


def _views(
    tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """One new buffer of zeros, and parts of it laid out like the tensors."""
    size = torch.empty((), dtype=dtype).element_size()
    unit = _ALIGNMENT // size
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += -(-tensor.numel() // unit) * unit
    room = torch.zeros(end + unit, dtype=dtype, device=device)
    skip = -room.data_ptr() % _ALIGNMENT // size  # torch aligns to 64 bytes on the CPU
    buffer = room[skip : skip + end]
    return buffer, [
        _own(buffer.as_strided(tensor.shape, tensor.stride(), skip + offset))
        for tensor, offset in zip(tensors, offsets, strict=True)
    ]


def _own(view: Tensor) -> Tensor:
    """The view as a tensor whose storage is just its own memory, which it keeps alive."""
    if not view.numel():  # no address to own
        return torch.empty_like(view)
    # By a capsule: Tensor.__dlpack__ refuses GPUs that are not the current one.
    owned = torch.from_dlpack(torch.utils.dlpack.to_dlpack(view))
    # torch 2.6 forgets the strides of dimensions of size one, which tell memory formats apart.
    return owned if owned.stride() == view.stride() else owned.as_strided(view.shape, view.stride())
