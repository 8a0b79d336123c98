"""The processes of the demo: one alone, or those of torchrun, which train one sharded model."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.distributed as dist

from .sharding import FULLY_SHARDS_ON_CPU

if TYPE_CHECKING:
    from .train_model import ByteModel

T = TypeVar("T")


class UserError(Exception):
    """An error that the user can fix; the message says how."""


@dataclass(frozen=True)
class Processes:
    """This process and its peers.

    Attributes:
        rank: number of this process among all.
        count: number of processes.
        local_rank: number of this process on its machine; None if torchrun did not start it. Such
            a process is alone: it has no process group, and its model is not sharded.
    """

    rank: int = 0
    count: int = 1
    local_rank: int | None = None

    @property
    def distributed(self) -> bool:
        return self.local_rank is not None

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes the results."""
        return self.rank == 0

    def agree(self, check: Callable[[], T]) -> T:
        """What `check` returns here. Raises the UserError of any process on all. Collective."""
        results: list[T] = []
        error = None
        try:
            results.append(check())
        except UserError as raised:
            error = str(raised)
        if self.distributed:
            errors: list[str | None] = [None] * self.count
            dist.all_gather_object(errors, error)
            error = next(filter(None, errors), None)
        if error is not None:
            raise UserError(error)
        return results[0]

    def from_first(self, compute: Callable[[], T]) -> T:
        """What `compute` returns on rank 0, for all. It runs nowhere else. Collective."""
        result = [self.agree(compute if self.first else lambda: None)]
        if self.distributed:
            dist.broadcast_object_list(result)
        return cast("T", result[0])

    def shard(self, model: ByteModel, device: torch.device) -> None:
        """Shards the parameters of `model.blocks` and the rest over the processes, in place."""
        if not self.distributed:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (self.count,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)


def join() -> Processes:
    """Joins the process group of torchrun, if torchrun started this process."""
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        return Processes()
    store, rank, count = next(dist.rendezvous("env://"))
    # A process that torchrun has restarted must not find what the last one stored.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
    if rank:
        # Ctrl-C ends these at once, even while they wait for a peer; rank 0 reports it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    return Processes(rank, count, int(os.environ["LOCAL_RANK"]))


def leave(processes: Processes) -> None:
    """Leaves the process group, once all are here.

    Otherwise the first to exit with an error makes torchrun end rank 0 before it has printed.
    """
    if processes.distributed:
        processes.agree(lambda: None)
        dist.destroy_process_group()


def finish(processes: Processes, code: int) -> int:
    """Ends a process of torchrun with an exit code, which is returned if there is only one process.

    A mesh and torch's default arguments keep process groups alive beyond `leave`. A thread of gloo
    that still frees a tensor while the interpreter shuts down aborts the process
    (https://github.com/pytorch/pytorch/pull/179291). So the interpreter does not shut down.
    """
    if processes.distributed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def pick_device(name: str | None, processes: Processes) -> torch.device:
    """The device `name`, if it works; by default cuda if available, otherwise cpu.

    Under torchrun the GPU whose number is the local rank.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        own = processes.local_rank
        if device.type == "cuda" and own is not None and torch.cuda.is_available():
            device = _own_gpu(device, own)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name or 'cuda'}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: expected cpu or cuda, got {name}")
    if processes.distributed:
        _require_fully_shard(device)
    return device


def _own_gpu(device: torch.device, local_rank: int) -> torch.device:
    if device.index is not None:
        raise UserError(
            f"--device {device}: under torchrun each process has a GPU of its own; "
            "give --device cuda"
        )
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise UserError(
            f"torchrun started more processes than this machine has GPUs ({gpus}); "
            f"give --nproc-per-node {gpus}, or --device cpu"
        )
    own = torch.device("cuda", local_rank)
    torch.cuda.set_device(own)
    return own


def _require_fully_shard(device: torch.device) -> None:
    if device.type == "cpu" and not FULLY_SHARDS_ON_CPU:
        raise UserError(
            f"fully_shard of torch {torch.__version__} does not run on {device.type}; "
            "upgrade torch (2.13 works), or run without torchrun"
        )
