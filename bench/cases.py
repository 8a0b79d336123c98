"""What is measured, in one list: parameters, and how a step finds the memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor
from torch.nn import Parameter

from .models import MODELS, Shape

NEW, COLD, CLIPPED = ", gradients new", ", caches cold", ", norm and step"  # in names
TRANSFORMER, CONVNET = "training a transformer", "training a convnet"
_QUICK, _FULL, _GPU = frozenset({"quick", "full"}), frozenset({"full"}), frozenset({"gpu"})


@dataclass(frozen=True)
class Case:
    """One set of parameters.

    Attributes:
        kind: "step" times steps alone, "training" steps within training (bench/training.py),
            "memory" is the peak of a step (bench/memory.py).
        new_gradients: other tensors at every step, as after zero_grad(set_to_none=True).
        cold: caches are swept before every step. On a GPU they always are.
        grad_dtype: of gradients that differ from their parameters.
        sharded: parameters are DTensors.
        max_norm: each step is timed with the clipping of all gradients to this norm.
        sets: those of "quick", "full" and "gpu" that the case belongs to.
    """

    name: str
    dtype: torch.dtype = torch.float32
    shapes: Sequence[Shape] = ()
    kind: str = "step"
    new_gradients: bool = False
    cold: bool = False
    grad_dtype: torch.dtype | None = None
    sharded: bool = False
    max_norm: float | None = None
    sets: frozenset[str] = _FULL

    @property
    def elements(self) -> int:
        return sum(map(prod, self.shapes))

    def moved(self, traffic: Callable[[int], int]) -> int:
        """Bytes for each element, of a step that moves so many where gradients are as wide."""
        grad = self.grad_dtype or self.dtype
        return traffic(self.dtype.itemsize) - self.dtype.itemsize + grad.itemsize

    def make(self, device: torch.device) -> list[Tensor]:
        """Parameters with gradients, random: zeros can run faster than real data."""
        params = []
        for shape in self.shapes:
            values = torch.randn(shape, dtype=self.dtype, device=device)
            param = Parameter(_shard(values) if self.sharded else values)
            if self.grad_dtype:
                param.grad_dtype = None  # any
            param.grad = _placed(torch.randn_like(values, dtype=self.grad_dtype), param)
            params.append(param)
        return params

    def tiny(self) -> "Case":
        """The same name with a few elements, to try the code."""
        shapes = [tuple(min(n, 40) for n in shape) for shape in self.shapes[:3]]
        return replace(self, shapes=shapes)


def renew_gradients(params: Sequence[Tensor]) -> None:
    """As zero_grad and a backward pass do: the old one lives until the new one exists.

    As FSDP2 makes them: to_local() runs torch operations that evict the optimizer's data.
    """
    for param in params:
        param.grad = _placed(local(param.grad).clone(), param)


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that is here; any other tensor itself."""
    return tensor._local_tensor if hasattr(tensor, "to_local") else tensor


def size(power: int, dtype: str = "float32") -> str:
    return f"2^{power} {dtype}"


def small(tensors: int, dtype: str = "float32") -> str:
    return f"{tensors:,} tensor{'s' * (tensors > 1)} of 64 {dtype}"


def model(name: str, dtype: str = "float32") -> str:
    return f"{name} {dtype}"


# What FSDP2's CPUOffloadPolicy hands to an optimizer: new float32 gradients on the host that a
# device wrote, so that no cache has them. FSDP2 casts to the parameter's dtype on the device,
# before the copy, whatever MixedPrecisionPolicy.reduce_dtype says (foreach_reduce in
# torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py).
OFFLOAD = "CPU offload, GPT-2 124M float32"
# An engine of one's own can send half the bytes: float32 parameters then have bfloat16 gradients.
OFFLOAD_HALF = OFFLOAD + ", bfloat16 gradients"


def one(power: int, dtype: str, sets: frozenset[str]) -> Case:
    return Case(size(power, dtype), getattr(torch, dtype), [(1 << power,)], sets=sets)


def many(tensors: int, sets: frozenset[str] = _QUICK) -> Case:
    return Case(small(tensors), shapes=[(64,)] * tensors, sets=sets)


def of_model(name: str, dtype: str, sets: frozenset[str]) -> Case:
    return Case(model(name, dtype), getattr(torch, dtype), MODELS[name].shapes(), sets=sets)


def renewed(case: Case, sets: frozenset[str]) -> Case:
    return replace(case, name=case.name + NEW, new_gradients=True, sets=sets)


def cold(case: Case, sets: frozenset[str]) -> Case:
    return replace(case, name=case.name + COLD, cold=True, sets=sets)


def clipped(case: Case, sets: frozenset[str]) -> Case:
    """By torch's clip_grad_norm_, or ours; random gradients have a larger norm."""
    return replace(case, name=case.name + CLIPPED, max_norm=1.0, sets=sets)


def all_cases() -> list[Case]:
    """All of them, the most telling first: a GPU is lent for minutes."""
    thousand = many(1000, _QUICK | _GPU)
    offload = cold(renewed(of_model("GPT-2 124M", "float32", _FULL), _FULL), _FULL)
    resnet, gpt2, llama = (
        of_model(name, "float32", sets | _GPU)
        for name, sets in {"ResNet-50": _QUICK, "GPT-2 124M": _FULL, "Llama 3.2 1B": _FULL}.items()
    )
    return [
        one(26, "float32", _QUICK | _GPU),
        one(28, "float32", _FULL | _GPU),
        one(26, "bfloat16", _QUICK | _GPU),
        one(28, "bfloat16", _FULL | _GPU),
        *(Case(name, kind="training", sets=_QUICK | _GPU) for name in (TRANSFORMER, CONVNET)),
        *(thousand, renewed(thousand, _QUICK | _GPU), cold(renewed(thousand, _QUICK), _QUICK)),
        *(resnet, gpt2, llama),
        *(renewed(case, _GPU) for case in (resnet, gpt2, llama)),
        of_model("ResNet-50", "bfloat16", _FULL | _GPU),
        of_model("GPT-2 124M", "bfloat16", _FULL | _GPU),
        of_model("Llama 3.2 1B", "bfloat16", _GPU),
        one(20, "float32", _QUICK | _GPU),
        one(20, "bfloat16", _FULL | _GPU),
        *(one(30, dtype, _GPU) for dtype in ("float32", "bfloat16")),
        *(one(power, "float32", _QUICK | _GPU) for power in (10, 12, 14, 16, 18, 22, 24)),
        *(one(power, "bfloat16", _GPU) for power in (10, 12, 14, 16, 18, 22, 24)),
        *(many(tensors) for tensors in (1, 10, 100, 10_000)),
        of_model("ViT-B/16", "float32", _FULL),
        of_model("BERT-base", "float32", _FULL),
        replace(offload, name=OFFLOAD),
        *(
            [replace(offload, name=OFFLOAD_HALF, grad_dtype=torch.bfloat16)]
            if hasattr(torch.Tensor, "grad_dtype")  # torch 2.10
            else []
        ),
        *(case for tensors in (30, 300, 1000) for case in _sharded(tensors)),
        clipped(one(26, "float32", _FULL), _QUICK | _GPU),
        *(clipped(case, _FULL | _GPU) for case in (thousand, gpt2)),
        *(clipped(case, _FULL) for case in _sharded(300)),
        one(22, "float64", _FULL),
        # What malloc keeps of blocks below 32 MB, which it need not map, is chance.
        *(_memory(one(power, "float32", _QUICK)) for power in (24, 25)),
        *(_memory(many(tensors)) for tensors in (1000, 10_000)),
    ]


def select(which: str) -> list[Case]:
    """The cases of a set."""
    return [case for case in all_cases() if which in case.sets]


def sharded(tensors: int) -> str:
    return f"{tensors:,} DTensors of 64 float32"


def _sharded(tensors: int) -> tuple[Case, Case]:
    case = Case(sharded(tensors), shapes=[(64,)] * tensors, sharded=True)
    return case, renewed(case, _FULL)


def _memory(case: Case) -> Case:
    return replace(case, name=f"memory, {case.name}", kind="memory")


def _shard(values: Tensor) -> Tensor:
    """A DTensor on a mesh of this process alone, which has all of it."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Shard

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.device_mesh.init_device_mesh(values.device.type, (1,))
    return DTensor.from_local(values, mesh, [Shard(0)])


def _placed(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient as FSDP2 hands it over: with the spec object of its parameter."""
    if not hasattr(param, "to_local"):
        return grad
    from torch.distributed.tensor import DTensor

    return DTensor(grad, param._spec, requires_grad=False)
