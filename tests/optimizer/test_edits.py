"""Whatever is done to a tensor between steps, the next step sees."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from radam_kernels import RAdam, radam_
from tests.helpers import same_bits

SHAPE = (16, 16)


def other(t: Tensor) -> Tensor:
    """Other values, of the kind that a step count or a second moment may have."""
    return torch.full_like(t, 4.0) if t.ndim == 0 else t.detach().flip(0).clone()


def replace(t: Tensor) -> None:
    t.data = other(t)


def set_(t: Tensor) -> None:
    with torch.no_grad():
        t.set_(other(t))


def resize_storage(t: Tensor) -> None:
    if not t.untyped_storage().resizable():
        pytest.skip("the moments' storages can't be resized")
    t.untyped_storage().resize_(1 << 16)
    t.data.copy_(other(t))


def transpose_layout(t: Tensor) -> None:
    if t.ndim == 2:
        t.data = other(t).T.contiguous().T


def swap(t: Tensor) -> None:
    twin = other(t)
    if isinstance(t, Parameter):
        twin = Parameter(twin)
        twin.grad = t.grad
    try:
        torch.utils.swap_tensors(t, twin)
    except RuntimeError as error:
        pytest.skip(f"torch does not swap this one: {error}")


EDITS = {
    "nothing": lambda t: None,
    "replaced": replace,
    "set": set_,
    "shared": lambda t: t.detach().share_memory_(),
    "its storage resized": resize_storage,
    "laid out otherwise": transpose_layout,
    "swapped": swap,
    "written": lambda t: t.data.copy_(other(t)),
}
STREAMS = ("param", "grad", "exp_avg", "exp_avg_sq", "step")


def make(shape=SHAPE) -> RAdam:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator)) for _ in range(3)]
    for p in params:
        p.grad = torch.randn(shape, generator=generator)
    optimizer = RAdam(params, lr=0.1)
    for _ in range(7):
        optimizer.step()
    return optimizer


def stream(optimizer: RAdam, name: str) -> Tensor:
    p = optimizer.param_groups[0]["params"][1]
    return {"param": p, "grad": p.grad}.get(name, optimizer.state[p].get(name))


def check_step(optimizer: RAdam) -> None:
    """A step is what a function without memory makes of the tensors as they are now."""
    params = optimizer.param_groups[0]["params"]
    for p in params:
        state = optimizer.state[p]
        state["expected"] = [
            t.detach().clone() for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
        ]
        # The function wants one layout; values are what counts.
        state["expected"] = [t.contiguous() for t in state["expected"]]
        step = int(state["step"]) + 1
        radam_(
            *state["expected"], step=step, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8,
            backend="reference",
        )  # fmt: skip
        state["expected_step"] = step
    expected = {p: (optimizer.state[p].pop("expected"), optimizer.state[p].pop("expected_step"))
                for p in params}  # fmt: skip
    optimizer.step()
    for p in params:
        (param, _, exp_avg, exp_avg_sq), step = expected[p]
        state = optimizer.state[p]
        assert same_bits(p, param)
        assert same_bits(state["exp_avg"], exp_avg)
        assert same_bits(state["exp_avg_sq"], exp_avg_sq)
        assert state["step"] == step


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_between_steps_is_seen(edit, name):
    optimizer = make()
    check_step(optimizer)
    t = stream(optimizer, name)
    EDITS[edit](t)
    del t
    for _ in range(3):
        check_step(optimizer)


@pytest.mark.parametrize("name", ["param", "grad"])  # those that torch can clone so
def test_a_lazy_clone_keeps_its_values(name):
    if not hasattr(torch, "_lazy_clone"):
        pytest.skip("this torch has no lazy clones")
    optimizer = make()
    with torch.no_grad():
        clone = torch._lazy_clone(stream(optimizer, name))
    kept = clone.detach().tolist()  # reading it copies nothing
    for _ in range(2):
        check_step(optimizer)
    assert clone.tolist() == kept


def test_gradients_made_anew_are_seen_wherever_they_are():
    optimizer = make()
    for i in range(10):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = None
            p.grad = torch.full_like(p, float(i))  # mostly where the last one was
        check_step(optimizer)


@pytest.mark.parametrize("shape", [SHAPE, (1, 4, 1, 4, 4, 4, 1)], ids=["2-D", "7-D"])
@pytest.mark.parametrize("edit", ["moved", "transposed", "both"])
@pytest.mark.parametrize("name", STREAMS[:-1])
def test_an_edit_that_keeps_the_storage_is_seen(name, edit, shape):
    optimizer = make(shape)
    t = stream(optimizer, name)
    room = torch.cat([t.detach().flatten(), other(t).flatten()])
    t.data = room[: t.numel()].view(shape)
    check_step(optimizer)
    if edit != "transposed":
        t.data = room[t.numel() :].view(shape)
    if edit in ("transposed", "both"):
        t.data = t.data.transpose(*((0, 1) if len(shape) == 2 else (3, 4)))
    del t
    for _ in range(2):
        check_step(optimizer)


def test_a_first_step_within_a_mode_of_torch_does_no_harm():
    code = """
import radam_kernels, torch, torch._dynamo  # which torch 2.6 can not import within the mode
from torch._subclasses import FakeTensorMode
with torch.device("meta"), FakeTensorMode():
    p = torch.nn.Parameter(torch.ones(5)); p.grad = torch.ones(5)
    radam_kernels.RAdam([p]).step()
p = torch.nn.Parameter(torch.ones(5)); p.grad = torch.ones(5)
optimizer = radam_kernels.RAdam([p], lr=0.1)
for _ in range(3):
    optimizer.step()
assert abs(p.detach() - 0.7).max() < 1e-6, p
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_that_take_the_first_step_at_once_do_not_wait_for_each_other():
    code = """
import sys, threading, torch
from radam_kernels import RAdam
sys.setswitchinterval(1e-6)  # another thread runs wherever Python code does
params = [torch.nn.Parameter(torch.zeros(200)) for _ in range(20)]
for p in params:
    p.grad = torch.ones(200)
optimizer = RAdam(params)
threads = [threading.Thread(target=optimizer.step) for _ in range(4)]
for t in threads:
    t.start()
for t in threads:
    t.join()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
