"""The limit of a CPU: the loop goes where a step goes, on its threads, and only when it can."""

import pytest
import torch

from bench import stream
from radam_kernels.modules import cpu

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
KINDS = {
    "float32": (torch.float32, torch.float32),
    "bfloat16, 22 bytes": (torch.bfloat16, torch.float32),
    "bfloat16, 14 bytes": (torch.bfloat16, torch.bfloat16),
    "float64": (torch.float64, torch.float64),
}
BYTES = {"float32": 28, "bfloat16, 22 bytes": 22, "bfloat16, 14 bytes": 14, "float64": 56}
needs_compiler = pytest.mark.skipif(
    bool(stream.why_not()), reason=str(stream.why_not()).partition("\n")[0]
)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def streams(kind, sizes=(5, 40_001, 1, 64, 8193)):
    """p, g, m and v of random bits, a list of each."""

    def some(dtype, size):
        wide = torch.randint(-(1 << 62), 1 << 62, (size,))
        return wide.to(BITS[dtype.itemsize]).view(dtype)

    return [[some(dtype, size) for size in sizes] for dtype in (kind[0], kind[0], kind[1], kind[1])]


def bits(tensor):
    return tensor.view(BITS[tensor.element_size()])


@needs_compiler
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", KINDS)
def test_the_loop_changes_every_element_of_three_streams_once_and_no_gradient(name):
    lists = streams(KINDS[name])
    before = [[bits(t).clone() for t in tensors] for tensors in lists]
    loop = stream.Stream(*lists)
    assert loop.bytes == BYTES[name] * sum(t.numel() for t in lists[0])
    loop(mask=(1 << 64) - 1)
    for i, grad in enumerate(before[1]):
        assert torch.equal(bits(lists[1][i]), grad)
        unsigned = grad.long() & 0xFFFF if grad.dtype == torch.int16 else grad
        for tensors, old in zip(lists[::2] + lists[3:], before[::2] + before[3:], strict=True):
            expected = (old[i].long() + unsigned.long()).to(old[i].dtype)
            assert torch.equal(bits(tensors[i]), expected)


@needs_compiler
@pytest.mark.parametrize("name", KINDS)
def test_the_loop_leaves_tensors_in_use_as_they_were(name):
    lists = streams(KINDS[name])
    before = [[bits(t).clone() for t in tensors] for tensors in lists]
    stream.Stream(*lists)()
    for tensors, olds in zip(lists, before, strict=True):
        assert all(torch.equal(bits(t), old) for t, old in zip(tensors, olds, strict=True))


@needs_compiler
def test_the_loop_runs_on_the_threads_of_the_optimizer():
    assert stream.threads_from() == cpu.threads_from()
    assert stream.threads() == torch.get_num_threads()


@needs_compiler
def test_divisions_have_a_ceiling():
    assert stream.divisions(torch.float32) > stream.divisions(torch.float64) > 1e6


def test_the_loop_is_compiled_as_the_kernel_is_and_without_sanitizers(tmp_path):
    words = stream.command("g++", tmp_path / "stream.so")
    assert not [word for word in words if "sanitize" in word or word in ("-O0", "-O1", "-g")]
    assert {"-O3", "-ffp-contract=off"} <= set(words)
    assert [w for w in words if w.startswith("-march")] == [
        f"-march={name}" for name in cpu.instruction_sets[:1] if name != "baseline"
    ]


@needs_compiler
def test_tensors_that_no_step_has_are_refused():
    p, g, m, v = (lists[0] for lists in streams(KINDS["float32"], sizes=(64,)))
    for rows in (
        ([p], [g], [m], [v.double()]),
        ([p], [g], [m], [v[:9]]),
        ([p[::2]], [g[::2]], [m[::2]], [v[::2]]),
        ([], [], [], []),
    ):
        with pytest.raises(ValueError, match="expected"):
            stream.Stream(*rows)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_there_is_a_reason_and_no_limit(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(stream.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(stream, "_library", stream._library.__wrapped__)
    monkeypatch.setattr(stream, "why_not", stream.why_not.__wrapped__)
    assert compiler in stream.why_not()
    with pytest.raises(RuntimeError, match="no streaming loop"):
        stream.divisions(torch.float32)
