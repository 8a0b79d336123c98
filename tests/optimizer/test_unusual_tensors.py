"""Tensors whose memory does not hold their values, or that have none: stepped as torch does, or
refused before anything is written."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import Parameter

from radam_kernels import RAdam, radam_
from tests.helpers import STATE, USUAL, TorchRAdam, randn


def assert_as_torch(start: list[Tensor], grads, steps: int = 8) -> None:
    """Both optimizers give the same parameters; `grads(i)` makes the gradients of step i."""
    results = []
    for cls in (RAdam, TorchRAdam):
        params = [Parameter(t.clone()) for t in start]
        for p, t in zip(params, start, strict=True):
            p.data = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t)
        optimizer = cls(params, lr=0.1)
        for i in range(steps):
            for p, g in zip(params, grads(i), strict=True):
                p.grad = g
            optimizer.step()
        results.append([p.detach() for p in params])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


def negated(n: int) -> Tensor:
    """-1, -2, ... as a dense view of memory that holds 1, 2, ..."""
    return torch._neg_view(torch.arange(1.0, n + 1))


def imaginary(n: int) -> Tensor:
    """1, 2, ... as the imaginary part of a conjugate, squeezed into a dense view."""
    z = torch.complex(torch.arange(1.0, n + 1), torch.full((n,), -2.0))
    return z.conj().imag.as_strided((n,), (1,), 0)


# Lazily negated and conjugated views


@pytest.mark.parametrize("make", [negated, imaginary])
@pytest.mark.parametrize("n", [1, 8, 1000])
def test_negated_gradients_have_their_own_sign(make, n):
    assert make(n).is_neg()
    assert_as_torch([torch.ones(n)], lambda i: [make(n)])


def test_gradients_that_are_negated_now_and_then_have_their_own_sign():
    assert_as_torch(
        [torch.ones(8)] * 20,
        lambda i: [negated(8) if (i + k) % 3 else -negated(8) for k in range(20)],
    )


@pytest.mark.parametrize("lazy", [torch.conj, lambda z: torch._neg_view(z.conj())])
def test_conjugated_gradients_of_complex_parameters(lazy):
    """torch refuses them, unless they are resolved."""
    z = torch.complex(torch.arange(1.0, 9), torch.full((8,), 3.0))
    results = []
    for resolve in (lambda g: g, lambda g: g.resolve_conj().resolve_neg()):
        p = Parameter(z.clone())
        optimizer = RAdam([p], lr=0.1)
        for i in range(8):
            p.grad = resolve(lazy(z * (i + 1)))
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32], ids=["conjugated", "negated"])
@pytest.mark.parametrize("size", [9, 1])
def test_lazily_conjugated_and_negated_gradients(dtype, size):
    p, q = (Parameter(0.01 * randn(size, dtype=dtype)) for _ in range(2))
    lazy, resolved = RAdam([p], lr=0.1), RAdam([q], lr=0.1)
    for step in range(1, 8):
        # The imaginary part of a conjugate is a real tensor, with the wrong signs in memory.
        g = randn(size, dtype=torch.complex64, seed=step).conj()
        p.grad = g if dtype.is_complex else g.imag
        assert p.grad.is_conj() or p.grad.is_neg()
        q.grad = p.grad.resolve_conj().resolve_neg()
        lazy.step()
        resolved.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32], ids=["conjugated", "negated"])
@pytest.mark.parametrize("size", [9, 1])
def test_lazily_conjugated_and_negated_parameters(dtype, size):
    conjugated = randn(size, dtype=torch.complex64).conj()
    p = Parameter(conjugated if dtype.is_complex else conjugated.imag)
    q = Parameter(p.detach().resolve_conj().resolve_neg().contiguous())
    lazy, resolved = RAdam([p], lr=0.1, weight_decay=0.1), RAdam([q], lr=0.1, weight_decay=0.1)
    for step in range(1, 8):
        p.grad = q.grad = randn(*q.shape, dtype=q.dtype, seed=step)
        lazy.step()
        resolved.step()
    assert p.is_conj() or p.is_neg()
    assert torch.equal(p, q)


def test_a_negated_gradient_of_one_element_is_read_with_its_sign():
    # z.conj().imag is lazily negated; on numpy's memory it can start on 16 bytes.
    room = np.zeros(16, np.float32)
    skip = (3 - room.ctypes.data // 4) % 4
    z = torch.view_as_complex(torch.from_numpy(room[skip : skip + 2]).reshape(1, 2))
    z.fill_(1 + 2j)
    steps = []
    for cls in (RAdam, TorchRAdam):
        p = Parameter(torch.zeros(1))
        p.grad = z.conj().imag
        assert p.grad.is_neg()
        assert p.grad.data_ptr() % 16 == 0
        optimizer = cls([p], lr=0.1)
        for _ in range(3):
            optimizer.step()
        steps.append(p.item())
    assert steps[0] == pytest.approx(steps[1])


@pytest.mark.parametrize("where", ["param", "exp_avg", "exp_avg_sq"])
def test_negated_parameters_and_moments_hold_their_own_values(where):
    results = []
    for cls in (RAdam, TorchRAdam):
        p = Parameter(torch.arange(1.0, 9))
        optimizer = cls([p], lr=0.1)
        for i in range(10):
            if i == 7 and where == "param":
                p.data = torch._neg_view(-p.data)
            elif i == 7:
                state = optimizer.state[p]
                state[where] = torch._neg_view(-state[where])
            p.grad = torch.ones(8) * (i + 1)
            optimizer.step()
        results.append((p.detach().clone(), *(optimizer.state[p][k].clone() for k in STATE)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("negative", [negated(8), imaginary(1)], ids=["8", "1"])
@pytest.mark.parametrize("index", range(4))
def test_the_function_refuses_negated_tensors(index, negative):
    tensors = [torch.ones_like(negative) for _ in range(4)]
    tensors[index] = negative
    before = [t.clone() for t in tensors]
    with pytest.raises(ValueError, match=r"negated view .*call resolve_neg\(\)"):
        radam_(*tensors, step=1, **USUAL)
    assert all(map(torch.equal, tensors, before))


# Storages that were freed or shrunk


def freed(offset: int, left: int) -> Tensor:
    flat = torch.ones(offset + 1000)
    view = flat[offset:]
    flat.untyped_storage().resize_(4 * left)
    return view


@pytest.mark.parametrize(("offset", "left"), [(0, 0), (16, 0), (16, 500), (10**7, 0)])
@pytest.mark.parametrize("where", ["param", "grad", "exp_avg", "exp_avg_sq"])
def test_a_storage_that_was_freed_or_shrunk_is_refused(where, offset, left):
    if where == "grad" and left:
        pytest.skip("only read, as torch does; looking would cost as much as all other checks")
    p, q = Parameter(torch.ones(1000)), Parameter(torch.ones(5))
    optimizer = RAdam([q, p])
    p.grad, q.grad = torch.ones(1000), torch.ones(5)
    optimizer.step()
    before = q.detach().clone()
    if where == "param":
        p.data = freed(offset, left)
    elif where == "grad":
        p.grad = freed(offset, left)
    else:
        optimizer.state[p][where] = freed(offset, left)
    with pytest.raises(ValueError, match=r"param 1 of group 0.* (bytes|freed or shrunk)"):
        optimizer.step()
    assert torch.equal(q, before)
    assert optimizer.state[q]["step"] == 1


def test_a_storage_that_is_resized_back_is_stepped_again():
    flat = torch.ones(32)
    p = Parameter(flat[16:])
    optimizer = RAdam([p])
    p.grad = torch.ones(16)
    optimizer.step()
    flat.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="resize it back"):
        optimizer.step()
    flat.untyped_storage().resize_(128)
    flat.fill_(1.0)
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


def test_a_freed_step_count_is_refused():
    p = Parameter(torch.ones(4))
    optimizer = RAdam([p])
    p.grad = torch.ones(4)
    optimizer.step()
    counts = torch.ones(8)
    optimizer.state[p]["step"] = counts[3]
    counts.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="step"):
        optimizer.step()


@pytest.mark.parametrize("where", ["exp_avg", "exp_avg_sq", "param", "another step"])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_count_inside_other_memory_is_refused(where, capturable):
    p, q = Parameter(torch.ones(4)), Parameter(torch.ones(4))
    optimizer = RAdam([p, q], capturable=capturable)
    p.grad, q.grad = torch.ones(4), torch.ones(4)
    optimizer.step()
    state, other = optimizer.state[p], optimizer.state[q]
    if where == "another step":
        state["step"] = other["step"]
    else:
        memory = p.data if where == "param" else state[where]
        memory[2] = 3.0
        state["step"] = memory[2]
    before = [t.clone() for t in (p, q, *state.values(), *other.values())]
    with pytest.raises(ValueError, match=r"step of .* shares memory|shares memory with step of"):
        optimizer.step()
    assert all(map(torch.equal, before, (p, q, *state.values(), *other.values())))


# Gradients and parameters without memory of their own


def test_zero_tensors_are_gradients_of_zeros():
    def grads(i: int) -> list[Tensor]:
        return [torch._efficientzerotensor(8), torch._efficientzerotensor(2, 4)]

    assert_as_torch([torch.ones(8), torch.ones(4, 2).t()], grads)


class Quantized(Tensor):
    """A trainable weight of int8 and a scale, as torchao's: no memory of its own."""

    @staticmethod
    def __new__(cls, data, scale):
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype, device=data.device)

    def __init__(self, data, scale):
        self.data_, self.scale = data, scale

    def __tensor_flatten__(self):
        return ["data_", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["data_"], inner["scale"])

    writable = True

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.clone.default, aten.alias.default):
            return cls(args[0].data_.clone(), args[0].scale.clone())
        if func is aten.copy_.default and isinstance(args[0], cls) and cls.writable:
            scale = args[1].abs().max() / 127
            args[0].data_.copy_((args[1] / scale).round())
            args[0].scale.fill_(scale)
            return args[0]
        if func is aten.copy_.default and not isinstance(args[0], cls):
            return args[0].copy_(args[1].data_ * args[1].scale)
        raise NotImplementedError(f"Quantized has no {func}")


def quantized() -> Parameter:
    return Parameter(Quantized(torch.arange(-4, 4, dtype=torch.int8) * 30, torch.tensor(0.01)))


def test_a_weight_without_memory_of_its_own_is_stepped_and_written_back():
    p = quantized()
    plain = Parameter(p.data_ * p.scale)
    optimizer, theirs = RAdam([p], lr=0.3), TorchRAdam([plain], lr=0.3)
    for i in range(8):
        p.grad = torch.linspace(-1, 1, 8) * (i + 1)
        plain.grad = p.grad.clone()
        optimizer.step()
        theirs.step()
        torch.testing.assert_close(p.data_ * p.scale, plain.detach(), atol=0.1, rtol=0)
        plain.data.copy_(p.data_ * p.scale)
    for key in STATE:
        torch.testing.assert_close(optimizer.state[p][key], theirs.state[plain][key])


def test_a_class_that_cannot_be_written_is_refused_before_anything_is_changed(monkeypatch):
    monkeypatch.setattr(Quantized, "writable", False)
    p, q = quantized(), Parameter(torch.ones(3))
    p.grad, q.grad = torch.ones(8), torch.ones(3)
    optimizer = RAdam([q, p])
    with pytest.raises(
        ValueError, match=r"param 1 .*a Quantized has no memory.*train a plain copy"
    ):
        optimizer.step()
    assert torch.equal(q, torch.ones(3))
    assert not optimizer.state


# FakeTensorMode


@pytest.mark.parametrize("inside", [True, False], ids=["inside the mode", "outside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_of_fake_tensors_makes_the_state_that_torch_makes(inside, dtype, recwarn):
    def state(cls):
        with FakeTensorMode():
            model = torch.nn.Linear(4, 3, dtype=dtype)
            optimizer = cls(model.parameters())
            model(torch.ones(2, 4, dtype=dtype)).sum().backward()
            for _ in range(2 if inside else 0):
                optimizer.step()
        for _ in range(0 if inside else 2):
            optimizer.step()
        return [
            {k: (type(v), v.shape, v.dtype) for k, v in s.items()} for s in optimizer.state.values()
        ]

    assert state(RAdam) == state(TorchRAdam)


def test_real_tensors_under_the_mode_are_refused_as_by_torch():
    p = Parameter(torch.ones(4))
    optimizer = RAdam([p])
    p.grad = torch.ones(4)
    optimizer.step()
    before = p.detach().clone(), optimizer.state[p]["exp_avg"].clone()
    with (
        FakeTensorMode(),
        pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"),
    ):
        optimizer.step()
    assert torch.equal(p, before[0])
    assert torch.equal(optimizer.state[p]["exp_avg"], before[1])
    assert not isinstance(optimizer.state[p]["step"], FakeTensor)
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


def test_a_memory_tracker_sees_the_bytes_that_it_sees_with_torchs():
    tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")

    def seen(cls) -> dict:
        with FakeTensorMode():
            model = torch.nn.Linear(400, 300)
            optimizer = cls(model.parameters())
            memory = tracker.MemTracker()
            memory.track_external(model, optimizer)
            with memory:
                model(torch.ones(2, 400)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            return memory.get_tracker_snapshot("current")

    assert seen(RAdam) == seen(TorchRAdam)


class Dispatching(Tensor):
    """A class with memory of its own whose values are elsewhere."""

    @staticmethod
    def __new__(cls, elem):
        made = Tensor._make_subclass(cls, torch.full_like(elem, 99.0))
        made.elem = elem
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def inner(x):
            return x.elem if isinstance(x, cls) else x

        result = func(*map(inner, args), **{k: inner(v) for k, v in (kwargs or {}).items()})
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(result)
        if isinstance(args[0], cls) and result is args[0].elem:
            return args[0]
        return result


def test_a_class_that_defines_its_operations_is_stepped_through_them():
    results = []
    for cls in (RAdam, TorchRAdam):
        p = Parameter(Dispatching(torch.ones(4)))
        optimizer = cls([p], lr=0.1, **({} if cls is RAdam else {"foreach": False}))
        for _ in range(8):
            p.grad = torch.ones(4)
            optimizer.step()
        results.append(p.data.elem.clone())
    torch.testing.assert_close(*results)
    assert not torch.equal(results[0], torch.ones(4))


def test_a_parameter_that_is_conjugated_in_place_is_stepped_as_it_reads():
    results = []
    for resolve in (lambda z: z, lambda z: z.resolve_conj()):
        p = Parameter(torch.full((8,), 0.5 + 0.5j))
        optimizer = RAdam([p], lr=0.01)
        for i in range(9):
            if i == 6:
                p.data = resolve(p.data.conj())
            p.grad = torch.full((8,), 1.0 - 0.3j)
            optimizer.step()
        results.append(p.detach().resolve_conj())
    assert torch.equal(*results)


def test_a_lazily_negated_learning_rate_has_its_own_sign():
    lr = torch.tensor([1 - 0.1j]).conj().imag[0]
    assert lr.is_neg()
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    RAdam([p], lr=lr, capturable=True).step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))
