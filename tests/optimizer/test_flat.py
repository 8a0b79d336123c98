"""Flat buffers: zeros_like, flatten_ and RAdam(flatten=True)."""

import copy
import gc
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import radam_kernels
from radam_kernels import flat

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

TEMPLATES = {
    "vector": lambda: torch.ones(1000),
    "scalar": lambda: torch.ones(()),
    "empty": lambda: torch.ones(3, 0, 2),
    "odd": lambda: torch.ones(7, 11),
    "channels_last": lambda: torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.ones(3, 4, 5).permute(2, 0, 1),
    "size one": lambda: torch.ones(1, 5, 1),
    "complex": lambda: torch.ones(3, 4, dtype=torch.complex64),
    "bfloat16": lambda: torch.ones(5, dtype=BF16),
    "float64": lambda: torch.ones(6, dtype=F64),
}


def templates() -> list[torch.Tensor]:
    return [make() for make in TEMPLATES.values()]


def span(tensors) -> int:
    """Bytes from the start of the first of them to the end of the last."""
    ends = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel()]
    return max(end for _, end in ends) - min(begin for begin, _ in ends)


# zeros_like


def zeros_like(like, dtypes) -> list[torch.Tensor]:
    return flat.zeros_like(like, dtypes, [t.device for t in like])


def test_zeros_have_the_shape_strides_and_dtype_asked_for():
    like = templates()
    dtypes = [F32 if t.dtype == BF16 else t.dtype for t in like]
    zeros = zeros_like(like, dtypes)
    for z, t, dtype in zip(zeros, like, dtypes, strict=True):
        assert z.shape == t.shape
        assert z.dtype == dtype
        assert torch.empty_like(z).stride() == torch.empty_like(t).stride()
        assert [s for n, s in zip(z.shape, z.stride(), strict=True) if n != 1] == [
            s for n, s in zip(t.shape, t.stride(), strict=True) if n != 1
        ]
        assert not z.any()
        assert not z.requires_grad


def test_zeros_of_one_dtype_lie_in_one_allocation():
    like = [torch.ones(n) for n in (1, 64, 65, 0, 3)] + [torch.ones(2, dtype=F64)] * 2
    dtypes = [F32, F32, BF16, F32, F32, F64, F64]
    zeros = zeros_like(like, dtypes)
    # On multiples of 256 bytes, close after each other, in order.
    f32 = [z for z in zeros if z.dtype == F32 and z.numel()]
    assert [b.data_ptr() - a.data_ptr() for a, b in pairwise(f32)] == [256, 256]
    assert zeros[6].data_ptr() - zeros[5].data_ptr() == 256
    assert span(f32) == 2 * 256 + 3 * 4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from([F32, F64, BF16, F16])), max_size=9))
def test_zeros_never_overlap(wanted):
    like = [torch.empty(n) for n, _ in wanted]
    zeros = zeros_like(like, [dtype for _, dtype in wanted])
    places = sorted((z.data_ptr(), z.nbytes) for z in zeros if z.numel())
    for (a, nbytes), (b, _) in pairwise(places):
        assert a + nbytes <= b
    for i, z in enumerate(zeros):
        z.fill_(i + 1)
    assert all((z == i + 1).all() for i, z in enumerate(zeros))


def test_each_of_the_zeros_starts_on_256_bytes_of_its_allocation():
    assert all(z.data_ptr() % 256 == 0 for z in zeros_like([torch.ones(5)] * 9, [F32] * 9))


def test_no_zeros_at_all():
    assert zeros_like([], []) == []


@pytest.mark.parametrize("name", TEMPLATES)
def test_dense_tensors_are_recognised(name):
    assert flat.is_dense(TEMPLATES[name]())


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(4, 6)[:, :3], torch.ones(9)[::2], torch.ones(3, 1).expand(3, 4)],
    ids=["narrowed", "strided", "expanded"],
)
def test_tensors_with_gaps_or_shared_elements_are_recognised(tensor):
    assert not flat.is_dense(tensor)


# flatten_


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(t.copy_(torch.randn(t.shape))) for t in templates()]


def test_flattened_parameters_keep_everything_but_their_address():
    params = parameters()
    before = [(id(p), p.detach().clone(), p.shape, p.stride(), p.dtype) for p in params]
    params[0].grad = grad = torch.ones(1000)
    buffers = radam_kernels.flatten_(params)
    for p, (identity, value, shape, stride, dtype) in zip(params, before, strict=True):
        assert id(p) == identity
        assert isinstance(p, torch.nn.Parameter)
        assert p.is_leaf
        assert p.requires_grad
        assert torch.equal(p, value)
        assert (p.shape, p.stride(), p.dtype) == (shape, stride, dtype)
    assert params[0].grad is grad
    assert {b.dtype for b in buffers} == {F32, F64, BF16, torch.complex64}
    assert len(buffers) == 4


def test_flattened_parameters_are_views_of_the_buffer_in_order():
    params = [torch.nn.Parameter(torch.full((n,), float(n))) for n in (5, 64, 65, 3)]
    [buffer] = radam_kernels.flatten_(params)
    offsets = [p.data_ptr() - buffer.data_ptr() for p in params]
    assert offsets == [0, 256, 512, 1024]
    buffer.fill_(7)
    assert all((p == 7).all() for p in params)
    with torch.no_grad():
        params[1][0] = 9
    assert buffer[64] == 9
    assert {p.untyped_storage().data_ptr() for p in params} == {buffer.untyped_storage().data_ptr()}


def test_a_model_can_be_flattened_again_and_so_can_its_copy():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))
    before = [p.detach().clone() for p in model.parameters()]
    radam_kernels.flatten_(model.parameters())
    copied = copy.deepcopy(model)
    radam_kernels.RAdam(model.parameters(), flatten=True)
    radam_kernels.RAdam(copied.parameters(), flatten=True)
    for found in (model, copied):
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), before, strict=True))


def test_the_old_memory_of_flattened_parameters_is_freed():
    param = torch.nn.Parameter(torch.ones(10))
    old = weakref.ref(param.untyped_storage())
    radam_kernels.flatten_([param])
    gc.collect()
    assert old() is None


def test_tied_weights_are_flattened_once():
    param, other = torch.nn.Parameter(torch.ones(64)), torch.nn.Parameter(torch.ones(64))
    [buffer] = radam_kernels.flatten_([param, other, param])
    assert buffer.numel() == 128


def test_a_model_trains_on_after_flattening():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 1)
    )
    x = torch.randn(2, 2, 4, 4)
    loss = model(x).sum()
    expected = model(x)
    radam_kernels.flatten_(model.parameters())
    loss.backward()  # a graph from before
    assert torch.equal(model(x), expected)
    assert all(p.grad.shape == p.shape for p in model.parameters())
    state = model.state_dict()
    model.load_state_dict({k: torch.zeros_like(v) for k, v in state.items()})
    assert not model(x).any()


def test_flattening_in_inference_mode_returns_the_buffers_too():
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=F64))]
    with torch.inference_mode():
        assert len(radam_kernels.flatten_(params)) == 2


def test_nothing_and_empty_tensors_can_be_flattened():
    assert radam_kernels.flatten_([]) == []
    [buffer] = radam_kernels.flatten_([torch.nn.Parameter(torch.ones(0))])
    assert buffer.numel() == 0


def twins() -> list[torch.nn.Parameter]:
    memory = torch.ones(6)
    return [torch.nn.Parameter(memory), torch.nn.Parameter(memory.view(2, 3))]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lambda: [torch.nn.Parameter(torch.ones(4, 6)[:, :3])], "param 1 .*not dense"),
        (lambda: [torch.nn.Parameter(torch.ones(3, 1).expand(3, 4))], "param 1 .*not dense"),
        (lambda: [torch.nn.Parameter(torch.ones(9)[3:])], "param 1 .*larger storage.*36 bytes"),
        (lambda: [torch.ones(3, device="meta")], "param 1 "),
        (lambda: [torch.ones(3).to_sparse()], "param 1 "),
        (twins, "params 1 and 2 share"),
    ],
    ids=["strided", "expanded", "part", "meta", "sparse", "twins"],
)
def test_what_cannot_be_flattened_is_refused_and_nothing_moved(bad, reason):
    params = [torch.nn.Parameter(torch.ones(5)), *bad()]
    places = [p.data_ptr() for p in params if p.layout == torch.strided and not p.is_meta]
    with pytest.raises(ValueError, match=f"flatten: {reason}"):
        radam_kernels.flatten_(params)
    after = [p.data_ptr() for p in params if p.layout == torch.strided and not p.is_meta]
    assert after == places


def step(optimizer, params) -> None:
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_an_optimizer_flattens_its_groups_into_one_buffer_and_later_ones_too():
    first, second, late = (torch.nn.Parameter(torch.ones(64)) for _ in range(3))
    groups = [{"params": [first]}, {"params": [second], "lr": 0.1}]
    optimizer = radam_kernels.RAdam(groups, flatten=True)
    assert second.data_ptr() - first.data_ptr() == 256
    optimizer.add_param_group({"params": [late]})
    assert late.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
    plain = [torch.nn.Parameter(torch.ones(64)) for _ in range(3)]
    groups = [{"params": [plain[0]]}, {"params": [plain[1]], "lr": 0.1}, {"params": [plain[2]]}]
    other = radam_kernels.RAdam(groups)
    for _ in range(8):
        step(optimizer, (first, second, late))
        step(other, plain)
    for a, b in zip((first, second, late), plain, strict=True):
        assert torch.equal(a, b)


def test_an_optimizer_that_cannot_flatten_refuses_and_leaves_everything():
    good, bad = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(9)[3:])
    place = good.data_ptr()
    with pytest.raises(ValueError, match="flatten: param 1"):
        radam_kernels.RAdam([good, bad], flatten=True)
    assert good.data_ptr() == place

    optimizer = radam_kernels.RAdam([good], flatten=True)
    place = good.data_ptr()
    other = torch.nn.Parameter(torch.ones(4))
    places = good.data_ptr(), other.data_ptr()
    with pytest.raises(ValueError, match="flatten: param 1"):
        optimizer.add_param_group({"params": [other, bad]})
    assert (good.data_ptr(), other.data_ptr()) == places
    assert len(optimizer.param_groups) == 1
    step(optimizer, [good])


def test_tensors_of_very_many_dimensions_are_not_taken_for_dense():
    assert not flat.is_dense(torch.zeros([1] * 150 + [2, 3]).transpose(-1, -2))


def test_frozen_parameters_stay_where_they_are():
    """The LoRA pattern: most parameters are frozen, and large."""
    frozen = torch.nn.Parameter(torch.ones(1000), requires_grad=False)
    trained = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    place = frozen.data_ptr()
    optimizer = radam_kernels.RAdam([frozen, *trained], flatten=True)
    assert frozen.data_ptr() == place
    assert trained[1].data_ptr() - trained[0].data_ptr() == 256
    step(optimizer, trained)
    assert optimizer.state[trained[0]]["exp_avg"].untyped_storage().nbytes() < 4000


def test_a_second_optimizer_finds_its_parameters_flat_already():
    params = [torch.nn.Parameter(torch.ones(n)) for n in (5, 70)]
    radam_kernels.RAdam(params, flatten=True)
    places = [p.data_ptr() for p in params]
    step(radam_kernels.RAdam(params, flatten=True), params)
    assert [p.data_ptr() for p in params] == places
    with pytest.raises(ValueError, match="larger storage"):
        radam_kernels.flatten_(params[::-1])


class _Sharded(torch.nn.Parameter):
    _fsdp_flattened = True  # what FSDP1 marks the parameters of every rank with


@pytest.mark.parametrize("numel", [0, 5])
def test_parameters_of_fsdp1_are_refused_on_every_rank_alike(numel):
    with pytest.raises(ValueError, match=r"param 0 .* is sharded"):
        radam_kernels.RAdam([_Sharded(torch.ones(numel))], flatten=True)


def test_the_true_reason_is_given_for_what_has_no_memory_of_its_own():
    with pytest.raises(ValueError, match=r"on meta and has no memory; call to_empty\(\)"):
        radam_kernels.flatten_([torch.nn.Parameter(torch.ones(3, device="meta"))])


def test_a_model_that_is_cast_is_not_flat_any_more_and_steps_on():
    model = torch.nn.Linear(5, 3)
    optimizer = radam_kernels.RAdam(model.parameters(), flatten=True)
    step(optimizer, [*model.parameters()])
    model.double()
    step(optimizer, [*model.parameters()])
    assert optimizer.state[model.weight]["exp_avg"].dtype == torch.float64
    assert optimizer.state[model.weight]["step"] == 2


def test_the_optimizer_shows_what_belongs_to_no_group():
    optimizer = radam_kernels.RAdam([torch.nn.Parameter(torch.ones(3))], backend="cpu")
    assert "backend: cpu\nflatten: False\namp_scaling: True" in repr(optimizer)
    own = {"backend", "flatten", "amp_scaling"}
    assert not own & {*optimizer.defaults, *optimizer.param_groups[0]}


def test_a_group_that_cannot_be_flattened_is_not_added():
    optimizer = radam_kernels.RAdam([torch.nn.Parameter(torch.ones(3))], flatten=True)
    with pytest.raises(ValueError, match="not initialized yet"):
        optimizer.add_param_group({"params": [*torch.nn.LazyLinear(3).parameters()]})
    assert len(optimizer.param_groups) == 1
