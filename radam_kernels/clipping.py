"""The norm of an optimizer's gradients, and the factor with which the next step clips them."""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends import BackendChoice, devices, reference, resolve
from .flat import is_dense
from .modules import DTYPES, cpu
from .repair import validate
from .sharding import belongs_to_fsdp1, is_sharded, local, redistributed_gradients

NameOf = Callable[[Tensor], str]


class Clipping:
    """Measures gradients, and keeps the factor that clips them until a step takes it.

    Attributes:
        factor: multiplies the gradients of the next step: a float64 tensor of one element on the
            device of the first gradient; None without clipping.
    """

    def __init__(self) -> None:
        self.factor: Tensor | None = None
        self._captured = False  # whether a CUDA graph computes the factor
        self._gradients = cpu.Gradients()

    @torch.no_grad()
    def measure(
        self,
        groups: list[dict[str, Any]],
        max_norm: float,
        norm_type: float,
        error_if_nonfinite: bool,
        backend: BackendChoice,
        name_of: NameOf,
    ) -> Tensor:
        """Sets `factor`, and returns the norm; see `RAdam.clip_grad_norm_`."""
        self.factor = None
        if not max_norm >= 0:
            raise ValueError(f"max_norm: expected a number >= 0, got {max_norm}")
        if not norm_type > 0:
            raise ValueError(f"norm_type: expected a number > 0 or inf, got {norm_type}")
        if torch._C._len_torch_dispatch_stack():
            from . import fake

            if fake.is_active():
                return fake.norm(groups)
        try:
            buckets = self._read(groups, name_of)
            if buckets is None:
                from . import fake

                return fake.norm(groups)
            if not buckets:
                return torch.zeros((), device="cpu")
            sums = [_power_sum(bucket, norm_type, backend) for bucket in buckets]
            wide = any(DTYPES[bucket.dtype] == torch.float64 for bucket in buckets)
            norm = _root(_total(buckets, sums, norm_type), norm_type)
        finally:
            self._gradients.release()
        if error_if_nonfinite and not math.isfinite(norm):
            raise RuntimeError(
                f"clip_grad_norm_: the norm of order {norm_type} of all gradients is "
                f"{norm.item()}; find the cause, or pass error_if_nonfinite=False"
            )
        self.factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        self._captured = devices.is_capturing(norm.device)
        return norm if wide else norm.float()

    def factor_for(self, groups: list[dict[str, Any]], name_of: NameOf) -> Tensor | None:
        """The factor, if the gradients are those that were measured; None if all are new.

        Raises RuntimeError if only some are new, or if one was changed in place.
        """
        if self.factor is None:
            return None
        if devices.is_capturing(self.factor.device) and not self._captured:
            raise RuntimeError(
                "a CUDA graph is being captured, and replays would use the factor of a "
                "clip_grad_norm_ before it: call clip_grad_norm_ within the graph"
            )
        same, replaced, changed = self._gradients.compare(groups)
        remedy = "call it again, after everything else that changes gradients"
        if changed is not None:
            raise RuntimeError(
                f"the gradient of {name_of(changed)} was changed in place after clip_grad_norm_ "
                f"(by another backward, noise?): {remedy}"
            )
        if same and replaced:
            raise RuntimeError(
                f"{replaced} of {same + replaced} gradients are new since clip_grad_norm_: {remedy}"
            )
        return None if replaced else self.factor

    def _read(
        self, groups: list[dict[str, Any]], name_of: NameOf
    ) -> list[cpu.GradientBucket] | None:
        """Buckets of all gradients, in dense memory, and without pending sums over ranks; None if
        gradients are fake."""
        replaced: dict[int, tuple[Tensor, Tensor]] = {}
        while pending := self._gradients.refresh(groups, replaced):
            from . import fake

            if fake.any_fake([owner for owner, _, _ in pending]):
                return None
            for owner, grad, reason in pending:
                name = name_of(owner)
                if id(owner) in replaced:
                    raise ValueError(f"grad of {name}: {reason}")
                validate(owner, grad, name)
                replaced[id(owner)] = (grad, _dense(local(grad)))
        buckets = self._gradients.buckets
        _refuse_flat_parameters(buckets)
        partial = [bucket for bucket in buckets if _is_partial(bucket.grads[0])]
        if not partial:
            return buckets
        owners = [owner for bucket in partial for owner in bucket.owners]
        grads = [grad for bucket in partial for grad in bucket.grads]
        for owner, grad in zip(owners, grads, strict=True):
            validate(owner, grad, name_of(owner))
        for owner, grad in zip(owners, redistributed_gradients(grads, owners), strict=True):
            replaced[id(owner)] = (grad, _dense(local(grad)))
        if pending := self._gradients.refresh(groups, replaced):
            owner, _, reason = pending[0]
            raise ValueError(f"grad of {name_of(owner)}: {reason}")
        return self._gradients.buckets


def _dense(grad: Tensor) -> Tensor:
    if type(grad) is Tensor and is_dense(grad):
        return grad
    return torch.empty(grad.shape, dtype=grad.dtype, device=grad.device).copy_(grad)


def _is_partial(grad: Tensor) -> bool:
    return is_sharded(grad) and any(placement.is_partial() for placement in grad.placements)


def _refuse_flat_parameters(buckets: list[cpu.GradientBucket]) -> None:
    """FSDP1's flat parameters are plain tensors, so their shards can't be told from whole ones."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    for bucket in buckets:
        if is_sharded(bucket.grads[0]):
            continue
        if any(map(belongs_to_fsdp1, bucket.owners)):
            raise RuntimeError(
                "parameters of FSDP1 are shards, of which each rank would compute another norm: "
                "call clip_grad_norm_() of the FSDP module, or use fully_shard() (FSDP2)"
            )


def _power_sum(bucket: cpu.GradientBucket, norm_type: float, backend: BackendChoice) -> Tensor:
    module = resolve(backend, devices.type_name(bucket.device[0]))
    known = norm_type == 2 or (norm_type in (1, math.inf) and not bucket.complex)
    return (module if known else reference).power_sum(bucket, norm_type)


def _root(total: Tensor, norm_type: float) -> Tensor:
    if norm_type in (1, math.inf):
        return total
    return total.sqrt() if norm_type == 2 else total ** (1 / norm_type)


def _total(buckets: list[cpu.GradientBucket], sums: list[Tensor], norm_type: float) -> Tensor:
    """The sum or maximum over all buckets and ranks, on the device of the first bucket."""
    largest = norm_type == math.inf
    sums = list(sums)
    shared: dict[tuple, list[int]] = {}  # by process group and device, in the order of parameters
    for i, bucket in enumerate(buckets):
        for group in _groups_that_share(bucket.grads[0]):
            shared.setdefault((group, sums[i].device), []).append(i)
    for (group, _), members in shared.items():
        reduced = _all_reduce(torch.stack([sums[i] for i in members]), group, largest)
        for i, value in zip(members, reduced.unbind(), strict=True):
            sums[i] = value
    if len(sums) == 1:
        return sums[0]
    first = sums[0].device
    # A copy to the host that is not waited for could be read too early.
    waits = first.type == "cpu"
    together = torch.stack([value.to(first, non_blocking=not waits) for value in sums])
    return together.amax() if largest else together.sum()


def _groups_that_share(grad: Tensor) -> list[Any]:
    """The process groups of the mesh dimensions over which a gradient is sharded.

    They follow from the placement only, which is the same on every rank.
    """
    if not is_sharded(grad) or grad.device_mesh.get_coordinate() is None:
        return []
    mesh = grad.device_mesh
    return [
        mesh.get_group(dim)
        for dim, placement in enumerate(grad.placements)
        if not placement.is_replicate()
    ]


def _all_reduce(values: Tensor, group: Any, largest: bool) -> Tensor:
    import torch.distributed as dist

    if not largest:
        dist.all_reduce(values, group=group)
        return values
    nan = values.isnan()  # a maximum over ranks may lose it
    both = torch.stack([values.nan_to_num(nan=0.0, posinf=math.inf), nan.to(values.dtype)])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    return torch.where(both[1] > 0, math.nan, both[0])
