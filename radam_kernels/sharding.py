"""DTensors: their local parts, and tensors that are placed in another way than their parameter.

Everything here that communicates is a collective: all ranks of the mesh must call it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

FULLY_SHARDS_ON_CPU = TorchVersion(torch.__version__) >= "2.7"  # torch's fully_shard does


def is_sharded(tensor: Any) -> TypeIs[DTensor]:
    """Whether a tensor is a DTensor, whatever its placements. torch.distributed may be missing."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The local tensor of a DTensor; any other tensor unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def belongs_to_fsdp1(param: Tensor) -> bool:
    """Whether a plain tensor is a shard of FullyShardedDataParallel (FSDP1)."""
    return getattr(param, "_fsdp_flattened", False)


def same_placement(tensor: Tensor, owner: Tensor) -> bool:
    """Whether a tensor is a DTensor with the mesh, placements and shard order of `owner`, or plain
    as `owner` is."""
    if not is_sharded(owner):
        return not is_sharded(tensor)
    return (
        is_sharded(tensor)
        and tensor.device_mesh == owner.device_mesh
        and tensor.placements == owner.placements
        and shard_order(tensor) == shard_order(owner)
    )


def shard_order(tensor: DTensor) -> object:
    """The shard order of a DTensor; None in older versions of torch."""
    return getattr(tensor._spec, "shard_order", None)


def _class_of(owner: DTensor) -> type[DTensor]:
    """The class of a parameter's data, which a subclass of Parameter is not."""
    return cast("type[DTensor]", type(owner.data))


def wrap_local(moment: Tensor, owner: Tensor) -> Tensor:
    """A local moment as a DTensor if its parameter is one, with the parameter's own spec object.

    A shared spec makes the comparison at each step cheap. It includes the dtype, so moments of
    another dtype than the parameter's get a new spec.
    """
    if not is_sharded(owner):
        return moment
    cls = _class_of(owner)
    if moment.dtype == owner.dtype and hasattr(owner, "_spec"):
        return cls(moment, owner._spec, requires_grad=False)
    return cls.from_local(
        moment,
        owner.device_mesh,
        owner.placements,
        run_check=False,
        shape=owner.shape,
        stride=owner.stride(),
    )


def shard_of(owner: DTensor) -> tuple[int, int]:
    """Which elements of the whole parameter a rank has: (index of its first element, shard).

    With the placements Shard(0) and Replicate, a contiguous parameter's shard is one run of the
    whole, and the shard is 0. For others the index is 0, and the shard is a number from 1 that only
    replicas share.
    """
    mesh = owner.device_mesh
    coordinate = mesh.get_coordinate()
    dims = [i for i, placement in enumerate(owner.placements) if not placement.is_replicate()]
    if not dims or coordinate is None:
        return 0, 0
    if _has_row_shards(owner, dims):
        rows, first = owner.shape[0], 0
        for dim in dims:
            chunk = -(-rows // mesh.size(dim))
            begin = min(coordinate[dim] * chunk, rows)
            first, rows = first + begin, min(chunk, rows - begin)
        return first * owner.shape[1:].numel(), 0
    number = 0
    for dim in dims:
        number = number * mesh.size(dim) + coordinate[dim]
    return 0, 1 + number


def _has_row_shards(owner: DTensor, dims: list[int]) -> bool:
    from torch.distributed.tensor import Shard

    def is_by_rows(placement: object) -> bool:
        # A subclass, such as torch's _StridedShard, has rows of several places.
        return type(placement) is Shard and placement.dim == 0

    orders = (entry.mesh_dims for entry in getattr(owner._spec, "shard_order", None) or ())
    return (
        all(is_by_rows(owner.placements[i]) for i in dims)
        and all(tuple(sorted(order)) == tuple(order) for order in orders)
        and owner.is_contiguous()
        and owner.to_local().is_contiguous()
    )


def redistributed(moment: Tensor, owner: Tensor, what: object) -> Tensor:
    """A moment, which has its parameter's global shape, placed as the parameter is.

    A plain moment of a DTensor parameter is the full tensor, the same on every rank.

    Args:
        what: names the moment in errors.

    Raises:
        ValueError: the moment's mesh lacks ranks of the parameter's mesh, or the local parts differ
            in shape.
    """
    if same_placement(moment, owner):
        return moment
    if not is_sharded(owner):
        return moment.full_tensor() if is_sharded(moment) else moment
    mesh = owner.device_mesh
    if is_sharded(moment) and moment.device_mesh != mesh:
        if not {*mesh.mesh.flatten().tolist()} <= {*moment.device_mesh.mesh.flatten().tolist()}:
            raise ValueError(
                f"{what}: it is placed on {moment.device_mesh}, which lacks ranks of its "
                f"parameter's {mesh}; load with torch.distributed.checkpoint, which reshards"
            )
        moment = moment.full_tensor()
    if not is_sharded(moment):
        from torch.distributed.tensor import Replicate

        moment = moment.to(local(owner).device)
        everywhere = [Replicate()] * mesh.ndim
        moment = _class_of(owner).from_local(moment, mesh, everywhere, run_check=False)
    if moment.placements != owner.placements:
        moment = moment.redistribute(placements=owner.placements)
    if not same_placement(moment, owner):
        raise ValueError(f"{what}: its shards are in another order than its parameter's")
    check_local_shape(moment, owner, "", what)
    return wrap_local(moment.to_local(), owner)


def check_local_shape(tensor: Tensor, owner: Tensor, of: str, name: object) -> None:
    """Raises ValueError, about `of` and `name`, for a DTensor placed as its parameter is, if its
    local part is not what the placement says."""
    part, expected = local(tensor).shape, local(owner).shape
    if part != expected:
        raise ValueError(
            f"{of}{name}: its local part has shape {tuple(part)}, its parameter's "
            f"{tuple(expected)}; give DTensor.from_local the part that the placement says"
        )


def redistributed_gradients(grads: Sequence[Tensor], owners: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of DTensor parameters, placed as these are; any other gradient unchanged.

    Sums over ranks that are pending (Partial, as tensor parallelism leaves them) are computed
    together: one all-reduce for all gradients of a mesh and dtype.
    """
    placed = list(grads)
    together: dict[tuple, list[tuple[int, DTensor]]] = {}
    for i, (grad, owner) in enumerate(zip(grads, owners, strict=True)):
        if is_sharded(owner) and is_sharded(grad) and (pending := _pending_sums(grad)):
            kind = (grad.device_mesh, pending, grad.dtype, local(grad).device)
            together.setdefault(kind, []).append((i, grad))
    for (mesh, pending, *_), members in together.items():
        reduced = _reduced([grad for _, grad in members], mesh, pending)
        for (i, _), grad in zip(members, reduced, strict=True):
            placed[i] = grad
    for i, (grad, owner) in enumerate(zip(placed, owners, strict=True)):
        if is_sharded(owner) and is_sharded(grad) and grad.placements != owner.placements:
            placed[i] = grad.redistribute(placements=owner.placements)
    return placed


def _pending_sums(grad: DTensor) -> tuple[tuple[int, str], ...]:
    """(mesh dimension, "sum" or "avg") of each sum over ranks that is pending."""
    from torch.distributed.tensor import Partial

    if grad.device_mesh.get_coordinate() is None:  # this rank is not on the mesh
        return ()
    return tuple(
        (dim, placement.reduce_op)
        for dim, placement in enumerate(grad.placements)
        if type(placement) is Partial and placement.reduce_op in ("sum", "avg")
    )


def _reduced(
    grads: Sequence[DTensor], mesh: DeviceMesh, pending: tuple[tuple[int, str], ...]
) -> list[DTensor]:
    """Copies of DTensors whose pending sums have been computed, with one all-reduce for each mesh
    dimension."""
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate

    parts = [local(grad) for grad in grads]
    flat = torch.cat([part.reshape(-1) for part in parts])
    for dim, op in pending:
        dist.all_reduce(flat, group=mesh.get_group(dim))
        if op == "avg":  # gloo has sums only
            flat /= mesh.size(dim)
    sums = flat.split([part.numel() for part in parts])
    dims = {dim for dim, _ in pending}
    return [
        type(grad).from_local(
            total.view(part.shape),
            mesh,
            [Replicate() if i in dims else p for i, p in enumerate(grad.placements)],
            run_check=False,
            shape=grad.shape,
            stride=grad.stride(),
        )
        for grad, part, total in zip(grads, parts, sums, strict=True)
    ]
