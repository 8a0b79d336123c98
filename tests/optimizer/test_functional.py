"""The step as a function on raw tensors."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import radam_kernels
from radam_kernels import radam_
from tests.helpers import USUAL, same_bits

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def streams(shape=(5,), dtype=F32, seed=0):
    """(param, grad, exp_avg, exp_avg_sq) that fit each other."""
    torch.manual_seed(seed)
    p, g, m, v = (torch.randn(shape).to(dtype) for _ in range(4))
    return p, g, m, v.abs().to(dtype)


def clone(tensors):
    return [t.clone() for t in tensors]


def optimized(params, grads, steps: int, **options):
    """What the optimizer makes of them: (params, exp_avgs, exp_avg_sqs)."""
    params = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = radam_kernels.RAdam(params, **options)
    for t in range(steps):
        for p, g in zip(params, grads, strict=True):
            p.grad = g * (t + 1)
        optimizer.step()
    state = [optimizer.state[p] for p in params]
    return (
        [p.detach() for p in params],
        [s["exp_avg"] for s in state],
        [s["exp_avg_sq"] for s in state],
    )


def stepped(params, grads, steps: int, **options):
    params = clone(params)
    real = {torch.complex64: torch.complex64, F64: F64}
    moments = [
        [torch.zeros_like(p, dtype=real.get(p.dtype, F32)) for p in params] for _ in range(2)
    ]
    for t in range(steps):
        radam_(params, [g * (t + 1) for g in grads], *moments, step=t + 1, **options)
    return params, *moments


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(weight_decay=0.1),
        dict(weight_decay=0.1, decoupled_weight_decay=True, maximize=True),
        dict(rho_threshold=4.0, degenerated_to_sgd=False),
        dict(rectification="exact"),
    ],
    ids=str,
)
def test_it_makes_the_steps_that_the_optimizer_makes(options):
    dtypes = (F32, F64, BF16, F16, torch.complex64)
    params = [torch.randn(3, 4).to(dtype).t() for dtype in dtypes]
    params += [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(())]
    params += [torch.randn(0), torch.randn(257)]
    grads = [torch.empty_like(p).copy_(torch.randn(p.shape)) for p in params]
    betas = (USUAL["beta1"], USUAL["beta2"])
    wanted = optimized(params, grads, 8, lr=0.01, betas=betas, eps=1e-8, **options)
    for got, want in zip(stepped(params, grads, 8, **USUAL, **options), wanted, strict=True):
        for a, b in zip(got, want, strict=True):
            assert same_bits(a, b)


def test_its_defaults_are_those_of_the_optimizer():
    ours = inspect.signature(radam_).parameters
    theirs = inspect.signature(radam_kernels.RAdam).parameters
    for name in ours.keys() & theirs.keys() - {"params", "lr", "eps"}:
        assert ours[name].default == theirs[name].default, name


def test_a_tensor_is_a_list_of_one():
    one, several = streams(), streams()
    radam_(*one, step=3, **USUAL)
    radam_(*([t] for t in several), step=3, **USUAL)
    assert all(map(same_bits, one, several))


@settings(max_examples=60, deadline=None)
@given(
    wanted=st.lists(
        st.tuples(
            st.sampled_from([(), (0,), (1,), (5,), (3, 4), (2, 0, 3), (17, 31)]),
            st.sampled_from([F32, BF16, F16]),
            st.sampled_from([F32, BF16, F16]),
            st.sampled_from([F32, BF16, F16]),
            st.booleans(),
        ),
        max_size=8,
    ),
    step=st.integers(1, 12),
)
def test_any_list_equals_the_reference_one_by_one(wanted, step):
    torch.manual_seed(0)
    sets = []
    for shape, param, grad, state, double in wanted:
        dtypes = (F64,) * 4 if double else (param, grad, state, state)
        sets.append([torch.rand(shape).to(t) for t in dtypes])
    alone = [clone(s) for s in sets]
    radam_(*(list(x) for x in zip(*sets, strict=True)) if sets else ([],) * 4, step=step, **USUAL)
    for s in alone:
        radam_(*s, step=step, **USUAL, backend="reference")
    for got, want in zip(sets, alone, strict=True):
        assert all(map(same_bits, got, want))


def test_the_step_count_decides_as_in_the_optimizer():
    # rho_t passes 5 at step 6 with beta2 = .999.
    for t, moves in ((1, False), (5, False), (6, True), (10**6, True)):
        p, g, m, v = streams()
        before, moment = p.clone(), m.clone()
        radam_(p, g, m, v, step=t, **USUAL, degenerated_to_sgd=False)
        assert torch.equal(p, before) != moves
        assert not torch.equal(m, moment)


def test_grad_scale_multiplies_the_gradients():
    scaled, plain = streams(), streams()
    scaled[1].mul_(1024)
    radam_(*scaled, step=8, **USUAL, grad_scale=1 / 1024)
    radam_(*plain, step=8, **USUAL)
    assert all(same_bits(a, b) for a, b in zip(scaled[::2], plain[::2], strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_grad_scale_may_be_a_tensor(backend, dtype):
    numbers, tensors = streams(), streams()
    scale = torch.tensor(0.3, dtype=dtype)
    radam_(*numbers, step=8, **USUAL, grad_scale=float(scale))
    radam_(*tensors, step=8, **USUAL, grad_scale=scale, backend=backend)
    assert all(map(same_bits, tensors, numbers))


@pytest.mark.parametrize("bad", [torch.ones(2), torch.tensor(1j)])
def test_a_grad_scale_that_is_no_number_is_refused(bad):
    tensors = streams()
    before = [t.clone() for t in tensors]
    with pytest.raises(ValueError, match="grad_scale: expected a number or a real tensor of one"):
        radam_(*tensors, step=8, **USUAL, grad_scale=bad)
    assert all(map(torch.equal, tensors, before))


def test_lr_may_be_a_tensor():
    a, b = streams(), streams()
    radam_(*a, step=8, **{**USUAL, "lr": torch.tensor(0.25)})
    radam_(*b, step=8, **{**USUAL, "lr": 0.25})
    assert all(map(same_bits, a, b))


def test_autograd_notices_the_writes():
    p, g, m, v = streams()
    p.requires_grad_()
    loss = (p * p).sum()
    versions = [t._version for t in (p, g, m, v)]
    radam_(p, g, m, v, step=1, **USUAL)
    assert [t._version - before for t, before in zip((p, g, m, v), versions, strict=True)] == [
        1, 0, 1, 1,
    ]  # fmt: skip
    assert p.requires_grad
    assert p.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autograd_notices_writes_to_complex_tensors():
    p, g, m, v = streams(dtype=torch.complex64)
    versions = [t._version for t in (p, m, v)]
    radam_(p, g, m, v, step=1, **USUAL)
    assert [t._version - before for t, before in zip((p, m, v), versions, strict=True)] == [1] * 3


def test_it_works_in_inference_mode():
    with torch.inference_mode():
        p, g, m, v = streams()
        before = p.clone()
        radam_(p, g, m, v, step=1, **USUAL)
        assert not torch.equal(p, before)


def test_gradients_may_be_the_parameters_themselves():
    p, _, m, v = streams()
    q, n, w = clone((p, m, v))
    radam_(p, p, m, v, step=8, **USUAL)
    radam_(q, q.clone(), n, w, step=8, **USUAL)
    assert all(map(same_bits, (p, m, v), (q, n, w)))


def test_gradients_may_be_read_several_times():
    first, second = streams(seed=1), streams(seed=2)
    shared = first[1]
    sets = [first, (second[0], shared, *second[2:])]
    alone = [clone(s) for s in sets]
    radam_(*(list(x) for x in zip(*sets, strict=True)), step=8, **USUAL)
    for s in alone:
        radam_(*s, step=8, **USUAL)
    assert all(
        same_bits(a, b) for x, y in zip(sets, alone, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_parts_of_one_buffer_can_be_stepped():
    whole = streams((100,))
    parts = clone(whole)
    radam_(*whole, step=8, **USUAL)
    radam_(*(list(t.split(33)) for t in parts), step=8, **USUAL)
    assert all(map(same_bits, whole, parts))


def test_nothing_to_step_is_no_error():
    radam_([], [], [], [], step=1, **USUAL)


def replaced(i: int, make):
    """A good set whose i-th tensor is another one."""

    def build():
        tensors = list(streams())
        tensors[i] = make(tensors)
        return [[t] for t in tensors]

    return build


REFUSED = {
    "a shape": (replaced(1, lambda _: torch.zeros(4)), "shape"),
    "a shape of as many elements": (replaced(1, lambda _: torch.zeros(5, 1)), "shape"),
    "an integer parameter": (replaced(0, lambda _: torch.zeros(5, dtype=torch.int32)), "float32"),
    "a double parameter": (replaced(0, lambda _: torch.zeros(5, dtype=F64)), "float64 goes with"),
    "a double gradient": (replaced(1, lambda _: torch.zeros(5, dtype=F64)), "float64 goes with"),
    "a complex gradient": (replaced(1, lambda _: torch.zeros(5, dtype=torch.complex64)), "complex"),
    "moments of two dtypes": (replaced(3, lambda _: torch.zeros(5, dtype=BF16)), "differ in dtype"),
    "a strided parameter": (replaced(0, lambda _: torch.zeros(10)[::2]), "not dense"),
    "an expanded parameter": (replaced(0, lambda _: torch.zeros(1).expand(5)), "not dense"),
    "a strided gradient": (replaced(1, lambda _: torch.zeros(10)[::2]), "strides"),
    "a sparse gradient": (replaced(1, lambda _: torch.zeros(5).to_sparse()), "no memory"),
    "a meta moment": (replaced(2, lambda _: torch.zeros(5, device="meta")), "exp_avg has no"),
    "one tensor twice": (replaced(2, lambda x: x[0]), r"params\[1\] shares memory"),
    "both moments the same": (replaced(3, lambda x: x[2]), r"params\[1\] shares memory"),
    "the parameter in another dtype": (
        replaced(1, lambda x: x[0].view(BF16)[:5]),
        r"grad of params\[1\] shares memory with param",
    ),
    "a gradient that is written": (replaced(1, lambda x: x[3]), r"grad of params\[1\] shares"),
    "lists of two lengths": (lambda: [[*x, torch.zeros(5)] for x in streams((1, 5))[:1]]
        + [[x] for x in streams()[1:]], r"\[2, 1, 1, 1\]|\[3, 2, 2, 2\]"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("what", REFUSED)
def test_tensors_that_do_not_fit_are_refused_and_nothing_changed(what, backend):
    build, reason = REFUSED[what]
    lists = [[good, *bad] for good, bad in zip(streams(seed=3), build(), strict=True)]
    kept = [[t if t.is_sparse or t.is_meta else t.clone() for t in x] for x in lists]
    versions = [[t._version for t in x] for x in lists]
    with pytest.raises(ValueError, match=reason):
        radam_(*lists, step=8, **USUAL, backend=backend)
    for x, before in zip(lists, kept, strict=True):
        for a, b in zip(x, before, strict=True):
            assert a.is_sparse or a.is_meta or torch.equal(a, b)
    assert [[t._version for t in x] for x in lists] == versions


def test_a_refusal_tells_which_tensors_and_what_they_were():
    p, g, m, v = streams((2, 3))
    with pytest.raises(
        ValueError, match=r"tensors 1: .*grad float16 \(6,\) on cpu, exp_avg float32 \(2, 3\)"
    ):
        radam_([p, p], [g, g.half().view(6)], [m, m], [v, v], step=1, **USUAL)


def test_overlapping_parts_are_refused():
    p, g, m, v = streams((10,))
    with pytest.raises(
        ValueError, match=r"param of params\[0\] shares memory with param of params\[1\]"
    ):
        radam_([p[:6], p[5:]], [g[:6], g[4:9]], [m[:6], torch.zeros(5)], [v[:6], torch.zeros(5)],
               step=1, **USUAL)  # fmt: skip


@pytest.mark.parametrize(
    "bad",
    [
        dict(step=0),
        dict(step=-1),
        dict(step=1.5),
        dict(step=float("nan")),
        dict(beta1=1.0),
        dict(beta1=-0.1),
        dict(beta2=1.0),
        dict(beta2=float("nan")),
        dict(eps=-1.0),
        dict(rho_threshold=3.0),
        dict(rectification="none"),
        dict(backend="gpu"),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_hyperparameters_out_of_range_are_refused_and_nothing_changed(bad, backend):
    tensors = streams()
    before = clone(tensors)
    with pytest.raises(ValueError, match=next(iter(bad))):
        radam_(*tensors, **{**USUAL, "step": 8, "backend": backend, **bad})
    assert all(map(torch.equal, tensors, before))


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("name", ["lr", "weight_decay", "eps", "grad_scale"])
@pytest.mark.parametrize(
    "backend", [n for n, why in radam_kernels.available_backends().items() if not why]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_scalar_of_minus_zero_keeps_its_sign(backend, name, dtype):
    def stepped(backend: str) -> list[torch.Tensor]:
        start = [torch.tensor([-0.0, 0.0, 1.0, -1.0] * 20, dtype=dtype) for _ in range(4)]
        start[3] = start[3].square()
        options = {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.0} | {name: -0.0}
        for step in (1, 8):
            radam_(*start, step=step, beta1=0.9, beta2=0.999, backend=backend, **options)
        return start

    for ours, truth in zip(stepped(backend), stepped("reference"), strict=True):
        assert same_bits(ours, truth)
