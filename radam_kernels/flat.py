"""Flat buffers: one allocation for many tensors, which are views into it, aligned to 256 bytes."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .modules import cpu
from .sharding import belongs_to_fsdp1

_ALIGNMENT = 256  # bytes: no shared cache line on any device


def trained_params(groups: list[dict[str, Any]]) -> list[Tensor]:
    """The parameters of `groups` that need a gradient."""
    return [param for group in groups for param in group["params"] if param.requires_grad]


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills one block of memory: contiguous, up to a permutation."""
    return cpu.is_dense(tensor)


def zeros_like(
    tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], devices: Sequence[torch.device]
) -> list[Tensor]:
    """Zeros with the shape and strides of each dense tensor: views into one buffer for each dtype
    and device."""
    kinds: dict[tuple, list[int]] = {}
    for i, kind in enumerate(zip(dtypes, devices, strict=True)):
        kinds.setdefault(kind, []).append(i)
    results: list[Tensor] = list(tensors)
    for kind, members in kinds.items():
        _, views = _views([tensors[i] for i in members], *kind)
        for i, view in zip(members, views, strict=True):
            results[i] = view
    return results


@torch.no_grad()
def flatten_(params: Iterable[Tensor]) -> list[Tensor]:
    """Moves parameters into one flat buffer for each dtype and device.

    Each parameter stays the same object, with the same values, shape and strides, but its memory
    becomes a part of the buffer, aligned to 256 bytes, in the given order. A parameter given more
    than once (tied weights) is moved once. Parameters that an earlier call has put into one buffer,
    the same ones in the same order, stay there.

    A buffer is useful for other operations: a collective, a copy to the host, a norm. A step is as
    fast without it. Costs: views made earlier (`p.data[0]`, `p.view(-1)`) keep the old memory, so
    flatten before you make any; saving or pickling a single parameter writes the whole buffer;
    `model.to()` or `.half()` allocates separate memory for each parameter again.

    Args:
        params: dense tensors of any dtype and device.

    Returns:
        The buffers, each of one dimension, in the order of the first parameter of each.

    Raises:
        ValueError: a parameter is not dense, is sharded or wraps other tensors, or is a part of a
            larger storage, which other tensors may use. Nothing is moved then.
    """
    groups: dict[tuple, list[Tensor]] = {}
    unique = list(dict.fromkeys(params))
    for i, param in enumerate(unique):
        _check(param, i)
        groups.setdefault((param.dtype, param.device), []).append(param)
    flat = {kind: _buffer_of(members) for kind, members in groups.items()}
    owners: dict[int, int] = {}
    for i, param in enumerate(unique):
        if flat[param.dtype, param.device] is None:
            _check_storage(param, i)
        if param.numel() and (first := owners.setdefault(param.data_ptr(), i)) != i:
            raise ValueError(f"flatten: params {first} and {i} share their memory")
    buffers = []
    for kind, members in groups.items():
        buffer = flat[kind]
        if buffer is None:
            buffer, views = _views(members, *kind)
            for param, view in zip(members, views, strict=True):
                param.data = view.copy_(param)
        buffers.append(buffer)
    return buffers


def _check(param: Tensor, i: int) -> None:
    if is_lazy(param):
        raise ValueError(f"flatten: param {i} is not initialized yet; run a forward pass first")
    what = f"flatten: param {i} of shape {tuple(param.shape)}"
    if hasattr(param, "to_local") or belongs_to_fsdp1(param):
        # Independent of the local shard: if only some ranks raised, the others would hang.
        raise ValueError(
            f"{what} is sharded, and its memory belongs to FSDP or its DTensor; leave flatten out"
        )
    if is_traceable_wrapper_subclass(param):
        raise ValueError(
            f"{what} is a {type(param).__name__}, which wraps other tensors and has no memory of "
            "its own to move; leave it out"
        )
    if param.is_nested:
        raise ValueError(f"flatten: param {i} is nested; leave it out")
    if param.is_meta:
        raise ValueError(
            f"{what} is on meta and has no memory; call to_empty() on its module first"
        )
    if not is_dense(param):
        raise ValueError(
            f"{what} and strides {param.stride()} is not dense; replace its data by a contiguous "
            "copy first"
        )


def _check_storage(param: Tensor, i: int) -> None:
    storage = param.untyped_storage().nbytes()
    if param.numel() and storage != param.numel() * param.element_size():
        raise ValueError(
            f"flatten: param {i} of shape {tuple(param.shape)} and strides {param.stride()} is a "
            f"view into a larger storage ({storage} bytes), which other tensors may use; give it "
            "memory of its own (`p.data = p.data.clone()`) or leave it out"
        )


def _offsets(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[int], int]:
    """The offset of each tensor in a buffer, and the size of the buffer; in elements."""
    unit = _ALIGNMENT // dtype.itemsize
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += -(-tensor.numel() // unit) * unit
    return offsets, end


def _buffer_of(params: list[Tensor]) -> Tensor | None:
    """The buffer that already holds these parameters in this order; None if there is none."""
    first = params[0]
    offsets, end = _offsets(params, first.dtype)
    begin, storage = first.storage_offset(), first.untyped_storage()
    if first.data_ptr() % _ALIGNMENT or storage.nbytes() < (begin + end) * first.element_size():
        return None
    for param, offset in zip(params, offsets, strict=True):
        same = param.untyped_storage().data_ptr() == storage.data_ptr()
        if not same or param.storage_offset() != begin + offset:
            return None
    return first.data.as_strided((end,), (1,), begin) if end else None


def _views(
    tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """A new buffer of zeros, and views into it with the shapes and strides of the tensors."""
    offsets, end = _offsets(tensors, dtype)
    unit = _ALIGNMENT // dtype.itemsize
    room = torch.zeros(end + unit, dtype=dtype, device=device)
    skip = -room.data_ptr() % _ALIGNMENT // dtype.itemsize  # torch aligns to 64 bytes on the CPU
    return room[skip : skip + end], [
        room.as_strided(tensor.shape, tensor.stride(), skip + offset)
        for tensor, offset in zip(tensors, offsets, strict=True)
    ]
