"""torch.compile and torch.export: RAdam.step is a graph break, radam_ an operator."""

import io
import shutil
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter
from torch.torch_version import TorchVersion
from torch.utils.flop_counter import FlopCounterMode

from radam_kernels import RAdam, flatten_, functional, radam_
from radam_kernels.functional import COMPILES_VIEWS
from tests.helpers import (
    STEPS,
    USUAL,
    assert_same_parameters,
    batch,
    network,
    randn,
    same_bits,
    train,
)

pytestmark = pytest.mark.usefixtures("fresh_compiler")

TORCH = TorchVersion(torch.__version__)
GIVES_REASONS = TORCH >= (2, 8)  # for graph breaks

TRACERS = ["eager", "aot_eager"]
ADAPTIVE = {key: value for key, value in USUAL.items() if key != "lr"}

Streams = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


@pytest.fixture
def fresh_compiler(request):
    if "inductor" in request.node.name and not shutil.which("g++"):
        pytest.skip("inductor finds no g++")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# The step of an optimizer.


@pytest.mark.parametrize(
    ("inside", "backend"),
    [
        ("whole step", "eager"),
        ("whole step", "aot_eager"),
        ("optimizer.step", "eager"),
        ("only the model", "aot_eager"),
    ],
)
def test_a_compiled_training_step_equals_the_eager_one(inside, backend):
    eager, model = network(dtype=torch.float64), network(dtype=torch.float64)
    expected = RAdam(eager.parameters(), lr=0.1)
    optimizer = RAdam(model.parameters(), lr=0.1)
    train(eager, expected, 12)

    def whole_step(x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    if inside == "whole step":
        compiled = torch.compile(whole_step, backend=backend)
    elif inside == "optimizer.step":
        step = torch.compile(optimizer.step, backend=backend)
    else:
        run = torch.compile(model, backend=backend)
    for i in range(12):
        if inside == "whole step":
            compiled(batch(i, torch.float64))
            continue
        optimizer.zero_grad()
        (model if inside == "optimizer.step" else run)(
            batch(i, torch.float64)
        ).square().mean().backward()
        (step if inside == "optimizer.step" else optimizer.step)()
    assert {optimizer.state[p]["step"].item() for p in model.parameters()} == {12.0}
    assert_same_parameters(model, eager, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_step_itself_is_never_traced(backend):
    """A traced step would keep the counts and scalars of the step at which it was traced."""
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    p = Parameter(torch.ones(3))
    optimizer = RAdam([p], backend=backend)
    step = torch.compile(lambda: optimizer.step(), backend=compiler)
    for _ in range(STEPS):
        p.grad = torch.ones(3)
        step()
    assert not graphs
    assert optimizer.state[p]["step"] == STEPS


def test_a_compiled_step_with_a_closure_and_a_scheduler():
    def run(compiler):
        model = network(dtype=torch.float64)
        optimizer = RAdam(model.parameters(), lr=torch.tensor(0.1))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)

        def closure():
            optimizer.zero_grad()
            loss = model(batch(0, torch.float64)).square().mean()
            loss.backward()
            return loss

        step = compiler(lambda: optimizer.step(closure))
        losses = []
        for _ in range(STEPS):
            losses.append(step().item())
            scheduler.step()
        return losses

    compiled = run(lambda f: torch.compile(f, backend="eager"))
    assert compiled == pytest.approx(run(lambda f: f), rel=1e-12)


def test_clipping_in_a_compiled_training_step_equals_the_eager_one():
    def train_with(compiled):
        model = network(dtype=torch.float64)
        optimizer = RAdam(model.parameters(), lr=0.1)

        def whole_step(x):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            norm = optimizer.clip_grad_norm_(0.01)
            optimizer.step()
            return norm

        step = compiled(whole_step)
        return model, [step(batch(i, torch.float64)).item() for i in range(8)]

    expected, norms = train_with(lambda f: f)
    model, found = train_with(lambda f: torch.compile(f, backend="eager"))
    assert min(norms) > 0.01
    assert found == pytest.approx(norms, rel=1e-12)
    assert_same_parameters(model, expected, rtol=1e-12, atol=1e-12)
    if GIVES_REASONS:
        assert any("clip_grad_norm_" in reason for reason in counters["graph_break"])


def test_a_compiled_step_breaks_the_graph_once_and_says_why():
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = RAdam([p])

    def function(x):
        y = x + 1
        optimizer.step()
        return y * 2

    explanation = torch._dynamo.explain(function)(torch.ones(3))
    assert (explanation.graph_count, explanation.graph_break_count) == (2, 1)
    [reason] = counters["graph_break"]
    assert not GIVES_REASONS or "RAdam.step runs uncompiled" in reason
    assert "file an issue" not in reason


def test_a_step_under_fullgraph_is_refused_with_what_to_do():
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = RAdam([p])
    message = r"compile the model.*radam_kernels\.radam_" if GIVES_REASONS else r"disable\(\)"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        torch.compile(optimizer.step, fullgraph=True, backend="eager")()
    assert torch.equal(p.detach(), torch.ones(3))


# The function radam_.


def streams(
    count: int = 3,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    *,
    requires_grad: bool = False,
) -> Streams:
    """(params, grads, exp_avgs, exp_avg_sqs) of the same values in every call."""
    lists = [
        [randn(3, 4, dtype=dtypes[i % len(dtypes)], seed=10 * k + i) for i in range(count)]
        for k in range(4)
    ]
    lists[0] = [param.requires_grad_(requires_grad) for param in lists[0]]
    lists[3] = [(v * v.conj()) for v in lists[3]]
    return tuple(lists)


def flat_streams() -> Streams:
    """The same, with parameters in one buffer."""
    lists = streams()
    parameters = [Parameter(param) for param in lists[0]]
    flatten_(parameters)
    return parameters, *lists[1:]


def assert_same_bits(ours: Streams, theirs: Streams) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert len(a) == len(b)
        assert all(map(same_bits, a, b))


def one_step(*lists, step=8, lr=0.01, **options) -> None:
    radam_(*lists, step=step, lr=lr, **ADAPTIVE, **options)


def without_gradients(*lists, **options) -> None:
    with torch.no_grad():
        one_step(*lists, **options)


@pytest.mark.parametrize(
    ("function", "backend"),
    [
        (one_step, "eager"),
        (one_step, "aot_eager"),
        (one_step, "inductor"),
        (without_gradients, "aot_eager"),
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        streams,
        lambda: streams(requires_grad=True),
        lambda: streams(6, (torch.bfloat16, torch.float64, torch.float16)),
        lambda: tuple([x.t() for x in tensors] for tensors in streams()),
        lambda: tuple(tensors[0] for tensors in streams()),
        flat_streams,
        lambda: ([], [], [], []),
    ],
    ids=["plain", "requires grad", "dtypes", "transposed", "tensors", "flat", "empty"],
)
def test_a_compiled_function_makes_the_bits_of_the_eager_one(function, make, backend):
    if make is flat_streams and not COMPILES_VIEWS:
        pytest.skip("this torch compiles such writes wrongly, so they are refused")
    compiled, eager = make(), make()
    torch.compile(function, fullgraph=True, backend=backend)(*compiled)
    function(*eager)
    assert_same_bits(compiled, eager)


@pytest.mark.parametrize("stream", range(4))
def test_what_torch_compiles_wrongly_is_refused(stream, monkeypatch):
    """Writes to tensors that begin within their storage; gradients are only read."""
    monkeypatch.setattr(functional, "COMPILES_VIEWS", False)
    lists = streams()
    lists[stream][1] = torch.stack([lists[stream][1]] * 2)[1]
    before = [x.clone() for tensors in lists for x in tensors]
    compiled = torch.compile(one_step, fullgraph=True, backend="aot_eager")
    if stream == 1:
        compiled(*lists)
        return
    with pytest.raises(RuntimeError, match=r"s\[1\] begins within a storage"):
        compiled(*lists)
    assert all(map(same_bits, before, (x for tensors in lists for x in tensors)))


@pytest.mark.parametrize("backend", TRACERS)  # inductor does not support complex
def test_complex_tensors_compiled(backend):
    compiled, eager = (streams(2, (torch.complex64,)) for _ in range(2))
    torch.compile(one_step, fullgraph=True, backend=backend)(*compiled)
    one_step(*eager)
    assert_same_bits(compiled, eager)


@pytest.mark.parametrize(
    ("as_tensors", "backend"),
    [(False, "eager"), (False, "aot_eager"), (False, "inductor"), (True, "aot_eager")],
)
def test_counts_rates_and_scales_do_not_compile_again(as_tensors, backend):
    counter = CompileCounterWithBackend(backend)
    step_compiled = torch.compile(one_step, fullgraph=True, backend=counter)
    compiled, eager = streams(), streams()
    for t in range(1, 13):
        numbers = {"lr": 0.1 / t, "grad_scale": 1.5**-t}
        if as_tensors:
            numbers = {key: torch.tensor(value) for key, value in numbers.items()}
        step_compiled(*compiled, step=t, **numbers)
        one_step(*eager, step=t, **numbers)
    assert_same_bits(compiled, eager)
    assert counter.frame_count <= 3  # for a constant, for variables, and once more by old versions


@pytest.mark.parametrize("backend", TRACERS)
def test_all_options_reach_the_operator(backend):
    options = dict(
        weight_decay=0.1, decoupled_weight_decay=True, maximize=True, rho_threshold=4.0,
        degenerated_to_sgd=False, rectification="exact", grad_scale=0.5, backend="reference",
    )  # fmt: skip
    compiled, eager = streams(), streams()
    torch.compile(one_step, fullgraph=True, backend=backend)(*compiled, **options)
    one_step(*eager, **options)
    assert_same_bits(compiled, eager)
    plain = streams()
    one_step(*plain)
    assert not torch.equal(plain[0][0], eager[0][0])


def test_what_is_wrong_is_refused_when_a_compiled_function_runs():
    params, grads, exp_avgs, exp_avg_sqs = streams()
    before = [x.clone() for tensors in (params, exp_avgs, exp_avg_sqs) for x in tensors]
    for lists, options, message in [
        ((params, grads[:2], exp_avgs, exp_avg_sqs), {}, "expected equally many tensors"),
        ((params, [*grads[:2], grads[2].t()], exp_avgs, exp_avg_sqs), {}, "tensors 2: .* shape"),
        ((params[:1] * 2, grads[:2], exp_avgs[:2], exp_avg_sqs[:2]), {}, r"is given twice"),
        ((params, grads, exp_avgs, exp_avgs), {}, "shares memory with exp_avg_sq"),
        ((params, grads, exp_avgs, exp_avg_sqs), dict(step=0), "step: expected a whole number"),
        ((params, grads, exp_avgs, exp_avg_sqs), dict(rho_threshold=1.0), "rho_threshold"),
        ((params, grads, exp_avgs, exp_avg_sqs), dict(grad_scale=torch.ones(2)), "grad_scale"),
        ((params, grads, exp_avgs, exp_avg_sqs), dict(backend="none"), "backend: expected"),
    ]:
        torch._dynamo.reset()
        with pytest.raises(ValueError, match=message):
            torch.compile(one_step, fullgraph=True, backend="aot_eager")(*lists, **options)
    after = [x for tensors in (params, exp_avgs, exp_avg_sqs) for x in tensors]
    assert all(map(same_bits, after, before))


@pytest.mark.parametrize("backend", [*TRACERS, "inductor"])
def test_a_compiled_function_of_gradients_and_a_step_trains(backend):
    def train_step(params, exp_avgs, exp_avg_sqs, x, step):
        (weight, bias) = params
        error = torch.tanh(x @ weight) @ bias - 1
        inner = (error[:, None] * bias) * (1 - torch.tanh(x @ weight) ** 2)
        grads = [x.t() @ inner / len(x), torch.tanh(x @ weight).t() @ error / len(x)]
        radam_(params, grads, exp_avgs, exp_avg_sqs, step=step, lr=0.1, **ADAPTIVE)
        return error.square().mean()

    def run(function):
        params = [randn(6, 8, dtype=torch.float64), randn(8, dtype=torch.float64, seed=1)]
        moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        x = batch(0, torch.float64)
        return [function(params, *moments, x, t).item() for t in range(1, 2 * STEPS)]

    losses = run(torch.compile(train_step, fullgraph=True, backend=backend))
    assert losses == pytest.approx(run(train_step), rel=1e-9)
    assert losses[-1] < 0.5 * losses[0]


def test_autograd_notices_the_writes_of_a_compiled_function():
    def function(param, *others):
        loss = (param * param).sum()
        one_step(param, *others)
        return loss

    lists = [tensors[0] for tensors in streams(requires_grad=True)]
    loss = torch.compile(function, fullgraph=True, backend="eager")(*lists)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Export, and whatever else traces.


class Training(nn.Module):
    """A linear regression that takes one step of training in each call."""

    def __init__(self, *, trains_parameter: bool, counts: bool = True) -> None:
        super().__init__()
        weight = randn(3)
        if trains_parameter:
            self.weight = Parameter(weight)
        else:
            self.register_buffer("weight", weight)
        self.register_buffer("exp_avg", torch.zeros(3))
        self.register_buffer("exp_avg_sq", torch.zeros(3))
        if counts:
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, y: Tensor, lr: Tensor, step: int | None = None) -> Tensor:
        error = x @ self.weight - y
        grad = (x.t() @ error).detach()
        if step is None:
            self.count += 1
            step = self.count.item()
        radam_(self.weight, grad, self.exp_avg, self.exp_avg_sq, step=step, lr=lr, **ADAPTIVE)
        return error.square().mean()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("form", ["as exported", "decomposed", "saved and loaded"])
@pytest.mark.parametrize("trains_parameter", [False, True])
def test_an_exported_module_trains(trains_parameter, form, strict):
    if strict and TORCH < (2, 10):
        pytest.skip("strict export of this torch refuses a module that counts")
    if trains_parameter and form == "decomposed" and TORCH < (2, 9):
        pytest.skip("this torch does not decompose what writes to parameters")
    x, y, lr = randn(8, 3, seed=1), randn(8, seed=2), torch.tensor(0.1)
    eager = Training(trains_parameter=trains_parameter)
    model = Training(trains_parameter=trains_parameter)
    program = torch.export.export(model, (x, y, lr), strict=strict)
    if form == "decomposed":
        program = program.run_decompositions()
    elif form == "saved and loaded":
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        program = torch.export.load(file)
    exported = program.module()
    with torch.no_grad():
        for _ in range(STEPS):
            torch.testing.assert_close(exported(x, y, lr), eager(x, y, lr))
    assert exported.count == STEPS
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(exported.state_dict()[name], value)


@pytest.mark.skipif(TORCH < (2, 8), reason="this torch exports no dynamic numbers")
def test_an_exported_module_takes_the_number_of_the_step():
    x, y, lr = randn(8, 3, seed=1), randn(8, seed=2), torch.tensor(0.1)
    eager, model = (Training(trains_parameter=False, counts=False) for _ in range(2))
    shapes = {"x": None, "y": None, "lr": None, "step": torch.export.Dim.DYNAMIC}
    exported = torch.export.export(model, (x, y, lr, 2), dynamic_shapes=shapes).module()
    for t in range(2, 12):
        exported(x, y, lr, t)
        eager(x, y, lr, t)
    assert same_bits(exported.get_buffer("weight"), eager.weight)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx_records_one_operator(tracing_mode):
    traced, eager = streams(), streams()
    graph = make_fx(one_step, tracing_mode=tracing_mode)(*streams())
    assert str(graph.graph).count("radam_kernels.radam_.default") == 1
    graph(*traced)
    one_step(*eager)
    assert_same_bits(traced, eager)


def test_fake_tensors_and_dispatch_modes():
    with FakeTensorMode():
        one_step(*streams())
    counted, eager = streams(requires_grad=True), streams()
    with FlopCounterMode(display=False):
        one_step(*counted)
    one_step(*eager)
    assert_same_bits(counted, eager)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_the_operator_is_registered_as_torch_wants_it(dtype, requires_grad):
    lists = streams(2, (dtype,), requires_grad=requires_grad)
    numbers = torch.tensor(0.01, dtype=torch.float64), torch.tensor(1.0)
    options = dict(
        eps=1e-8, weight_decay=0.1, decoupled_weight_decay=True, maximize=False,
        rho_threshold=5.0, degenerated_to_sgd=True, rectification="exact",
    )  # fmt: skip
    arguments = (*lists, *numbers, 8, 0.9, 0.999, "auto")
    with torch.no_grad():
        torch.library.opcheck(torch.ops.radam_kernels.radam_, arguments, options)


def test_registering_imports_no_compiler_and_survives_a_reload():
    script = """
import importlib, sys
import torch, radam_kernels
assert "torch._dynamo" not in sys.modules
importlib.reload(sys.modules["radam_kernels.functional"])
from radam_kernels.functional import radam_
streams = [torch.ones(3) for _ in range(4)]
step = torch.compile(radam_, fullgraph=True, backend="eager")
step(*streams, step=1, lr=0.5, beta1=0.9, beta2=0.999, eps=1e-8)
assert not torch.equal(streams[0], torch.ones(3))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
