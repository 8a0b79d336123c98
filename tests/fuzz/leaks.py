"""Takes many steps with edits, errors, copies and checkpoints, and measures what they leave behind.

`python -m tests.fuzz.leaks BACKEND STEPS`
"""

import copy
import ctypes
import gc
import pickle
import sys
from collections.abc import Callable
from itertools import cycle, islice

import torch
from torch.nn import Parameter

from radam_kernels import RAdam, flatten_, radam_
from tests.helpers import give_gradients, params_of, randn, saved


class _Mallinfo2(ctypes.Structure):
    """glibc's struct: the fifth field is hblkhd, the eighth uordblks."""

    _fields_ = [("fields", ctypes.c_size_t * 10)]


def in_use() -> tuple[int, int]:
    """Objects of Python's allocator, and bytes of malloc (0 if this libc does not tell)."""
    gc.collect()
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:  # before glibc 2.33
        return sys.getallocatedblocks(), 0
    mallinfo2.restype = _Mallinfo2
    fields = mallinfo2().fields
    return sys.getallocatedblocks(), fields[4] + fields[7]


def make(backend: str) -> RAdam:
    groups = [
        {"params": [Parameter(randn(65, seed=i)) for i in range(3)]},
        {
            "params": [Parameter(randn(3, 65, dtype=torch.bfloat16))],
            "master_weights": 24,
            "state_dtype": "block8",
        },
        {"params": [Parameter(torch.stack([randn(65)] * 2, -1)[:, 0])]},
    ]
    return RAdam(groups, lr=0.1, backend=backend)


def fails(call: Callable[[], object]) -> None:
    try:
        call()
    except (KeyError, RuntimeError, ValueError):
        return
    raise AssertionError("this was to fail")


def bad_option(o: RAdam) -> None:
    o.param_groups[0]["betas"] = (1.0, 0.9)
    fails(o.step)
    o.param_groups[0]["betas"] = (0.9, 0.999)


def bad_gradient(o: RAdam) -> None:
    params_of(o)[1].grad.data = torch.ones(7)
    fails(o.step)


def bad_state(o: RAdam) -> None:
    p, q = params_of(o)[:2]
    o.state[p]["exp_avg"] = o.state[q]["exp_avg"]
    fails(o.step)
    o.state.clear()
    fails(lambda: o.load_state_dict({**o.state_dict(), "state": {0: {"step": 1.0}}}))


def bad_closure(o: RAdam) -> None:
    fails(lambda: o.step(lambda: {}["no key"]))


def options(o: RAdam) -> None:
    o.param_groups[0] = {**o.param_groups[0], "lr": torch.tensor(0.05), "betas": [0.8, 0.99]}


def state(o: RAdam) -> None:
    p, q = params_of(o)[:2]
    o.state.pop(p)
    o.state[q] = {key: value.clone() for key, value in reversed(o.state[q].items())}


def params(o: RAdam) -> None:
    old = params_of(o)[0]
    o.param_groups[0]["params"][0] = Parameter(old.detach().clone())
    o.state.pop(old)
    o.add_param_group({"params": [p := Parameter(torch.ones(5))]})
    p.grad = torch.ones(5)
    o.step()
    o.state.pop(o.param_groups.pop()["params"][0])


def load(o: RAdam) -> None:
    o.load_state_dict(copy.deepcopy(o.state_dict()))
    o.load_state_dict(saved(o.state_dict()))


def copies(o: RAdam) -> None:
    for other in (copy.deepcopy(o), pickle.loads(pickle.dumps(o))):
        give_gradients(other)
        other.step()


def clip(o: RAdam) -> None:
    o.clip_grad_norm_(0.1)


def backward(o: RAdam) -> None:
    handle = o.step_in_backward()
    for _ in range(2):
        o.zero_grad()
        torch.stack([p.float().sum() for p in params_of(o)]).sum().backward()
        o.step()
    handle.remove()
    give_gradients(o)


def functions(o: RAdam) -> None:
    tensors = [randn(9) for _ in range(4)]
    radam_(*tensors, step=7, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8)
    flatten_([Parameter(torch.ones(3)), Parameter(torch.ones(4))])
    list(o.master_params())


EDITS = [
    bad_option, bad_gradient, bad_state, bad_closure, options, state, params, load, copies, clip,
    backward, functions,
]  # fmt: skip


def take(optimizer: RAdam, steps: int) -> None:
    for number, edit in enumerate(islice(cycle(EDITS), steps)):
        give_gradients(optimizer, number % 50)
        optimizer.step()
        edit(optimizer)


def growth(backend: str, steps: int) -> tuple[int, int]:
    """By how much that in use has grown over so many steps."""
    optimizer = make(backend)
    take(optimizer, 50 * len(EDITS))
    before = in_use()
    take(optimizer, steps // len(EDITS) * len(EDITS))
    after = in_use()
    return after[0] - before[0], after[1] - before[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(*growth(sys.argv[1], int(sys.argv[2])))
