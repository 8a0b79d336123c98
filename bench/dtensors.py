"""Times a step of many small DTensors against the same step of plain tensors, and against torch's.

    python -m bench.dtensors [--count N] [--seconds S]

One process, one thread, gradients new at each step with the spec object of their parameter, as
FSDP2 gives them. The optimizers take turns; the row of each is the median of its steps.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import Parameter

from radam_kernels import RAdam

SIZE = 64
OURS, PLAIN = "radam_kernels, DTensors", "radam_kernels, plain tensors"
ADAM, RADAM = "torch Adam(fused), DTensors", "torch RAdam(foreach), DTensors"


def renew(params: list[Tensor]) -> None:
    """Gives every parameter a gradient that is another tensor than the last."""
    for p in params:
        p.grad = None
    for p in params:
        grad = torch.ones(SIZE)
        p.grad = DTensor(grad, p._spec, requires_grad=False) if isinstance(p, DTensor) else grad


def measure(count: int, seconds: float) -> dict[str, float]:
    """Median seconds of a step, by optimizer."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))

    def plain() -> list[Tensor]:
        return [Parameter(torch.randn(SIZE)) for _ in range(count)]

    def sharded() -> list[Tensor]:
        return [Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in plain()]

    makers: dict[str, tuple[Callable, Callable]] = {
        PLAIN: (plain, RAdam),
        OURS: (sharded, RAdam),
        ADAM: (sharded, lambda p: torch.optim.Adam(p, fused=True)),
        RADAM: (sharded, lambda p: torch.optim.RAdam(p, foreach=True)),
    }
    optimizers = {}
    for name, (make, cls) in makers.items():
        params = make()
        optimizers[name] = cls(params), params
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times[RADAM]) < 4:
        for name, (optimizer, params) in optimizers.items():
            for _ in range(3):
                renew(params)
                before = time.perf_counter()
                optimizer.step()
                times[name].append(time.perf_counter() - before)
    return {name: statistics.median(samples[3:]) for name, samples in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, nargs="*", default=[30, 300, 1000])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each count")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for count in args.count:
        found = measure(count, args.seconds)
        print(f"{count} parameters of {SIZE} float32, torch {torch.__version__}")
        for name, seconds in found.items():
            print(f"  {name:32}{1e6 * seconds:10.0f} us{seconds / found[OURS]:8.2f}x of ours")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
