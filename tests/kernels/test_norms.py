"""The norm kernels, and a factor in device memory: Triton's interpreted, and both on a GPU.

test_cuda_emulated.py runs CUDA's on the CPU, and tests/kernels/ptx executes what is compiled.
"""

import itertools
import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from radam_kernels import available_backends, radam_
from radam_kernels.backends import cuda, triton_
from radam_kernels.launch import launch
from radam_kernels.modules import DTYPES
from radam_kernels.scaling import Scaling
from tests.helpers import GPU, USUAL, same_bits
from tests.kernels import norms
from tests.kernels.cuda_emulation.worker import make_plan

MODULES = {"cuda": cuda, "triton": triton_}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Of inf * 0 and the like, where Triton is interpreted.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


@pytest.fixture(
    params=[
        pytest.param(("triton", "cpu"), id="triton, interpreted"),
        pytest.param(("triton", "cuda"), id="triton on a GPU", marks=GPU),
        pytest.param(("cuda", "cuda"), id="cuda on a GPU", marks=GPU),
    ]
)
def backend(request) -> tuple[str, str]:
    """A backend's name and the type of its device."""
    name, device = request.param
    if reason := available_backends()[name]:
        pytest.skip(reason)
    if device == "cuda" and name == "triton" and triton_.INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1")
    return name, device


def chunk_of(name: str, dtype: torch.dtype) -> int:
    module = cuda._cuda if name == "cuda" else triton_.triton_kernel
    return module.norm_chunk(DTYPES.index(dtype))


def placed(tensors: list[Tensor], device: str, offset: int = 0) -> norms.Gradients:
    """Copies on a device that start `offset` elements behind 16 bytes."""
    rooms = [torch.empty(len(t) + offset, dtype=t.dtype, device=device) for t in tensors]
    return norms.Gradients([room[offset:].copy_(t) for room, t in zip(rooms, tensors, strict=True)])


def power_sum(module: ModuleType, gradients: norms.Gradients, norm_type: float) -> float:
    result = module.power_sum(gradients.bucket, norm_type)
    assert (result.dtype, result.shape) == (torch.float64, ())
    assert result.device == gradients.tensors[0].device
    return result.item()


# Each path of the kernels; the interpreter is slow.
PATHS = [(dtype, norm) for dtype in (torch.float32, torch.float64) for norm in norms.NORMS]
PATHS += [(torch.bfloat16, 2.0), (torch.float16, 1.0), (torch.float16, math.inf)]


@pytest.mark.parametrize(("dtype", "norm_type"), PATHS, ids=str)
def test_the_norm_of_every_kind_of_gradients(backend, dtype, norm_type):
    name, device = backend
    for i, (case, tensors) in enumerate(norms.cases(dtype, chunk_of(name, dtype))):
        gradients = placed(tensors, device, i % 2 * (i % 8))
        ours = power_sum(MODULES[name], gradients, norm_type)
        try:
            norms.assert_close(ours, tensors, norm_type, norms.TRITON_ERROR)
        except AssertionError as error:
            pytest.fail(f"{case}: {error}")


@pytest.mark.parametrize("norm_type", norms.NORMS)
def test_the_norm_is_the_same_at_other_addresses(backend, norm_type):
    name, device = backend
    tensors = dict(norms.cases(torch.float32, chunk_of(name, torch.float32)))["all sizes at once"]
    found = [
        power_sum(MODULES[name], placed(tensors, device, offset), norm_type) for offset in range(4)
    ]
    assert len(set(found)) == 1


@pytest.mark.parametrize("norm_type", norms.NORMS)
def test_the_norm_of_a_large_odd_gradient(backend, norm_type):
    name, device = backend
    large = [torch.randn(2**20 + 3, generator=torch.Generator().manual_seed(7))]
    ours = power_sum(MODULES[name], placed(large, device), norm_type)
    norms.assert_close(ours, large, norm_type, 3e-8)  # the roundings of so many nearly cancel


def test_new_values_in_old_memory_and_new_memory_count(backend):
    name, device = backend
    gradients = placed([torch.ones(300), torch.ones(5)], device)
    assert power_sum(MODULES[name], gradients, 1.0) == 305
    gradients.tensors[0].fill_(2.0)
    assert power_sum(MODULES[name], gradients, 1.0) == 605
    gradients.tensors[1] = torch.full((7,), 3.0, device=device)
    assert power_sum(MODULES[name], gradients, 1.0) == 621


def streams(device: str, seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (300, 5000)
    return [[torch.rand(n, generator=generator).to(device) for n in sizes] for _ in range(4)]


@pytest.mark.parametrize("factor", [0.3, math.nan])
@pytest.mark.parametrize("maximize", [False, True])
def test_a_factor_multiplies_the_gradients(backend, factor, maximize):
    name, device = backend
    ours, truth = streams(device), streams("cpu")
    tensor = torch.tensor(factor, dtype=torch.float64, device=device)
    options = dict(USUAL, step=8, maximize=maximize)
    radam_(*ours, **options, grad_scale=tensor, backend=name)
    radam_(*truth, **options, grad_scale=factor, backend="reference")
    for a, b in zip(itertools.chain(*ours), itertools.chain(*truth), strict=True):
        assert same_bits(a.cpu(), b)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_a_factor_goes_with_counts_on_the_device(backend, found_inf):
    """And where the step is skipped, a factor of NaN changes nothing."""
    name, device = backend
    factor = math.nan if found_inf else 0.3
    group = dict(
        lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, decoupled_weight_decay=False,
        maximize=True, rho_threshold=5.0, degenerated_to_sgd=True, rectification="first_order",
    )  # fmt: skip
    results = []
    for backend_, where in ((name, device), ("reference", "cpu")):
        four = streams(where)
        scaling = Scaling(
            torch.tensor(3.0, device=where),
            torch.tensor(found_inf, device=where),
            torch.tensor(factor, dtype=torch.float64, device=where),
        )
        counts = [torch.tensor(7.0, device=where) for _ in four[0]]
        segments = list(zip(*four, strict=True))
        launch(make_plan(segments, counts, [group], [0, 0], scaling), backend_)
        assert counts == [7.0 if found_inf else 8.0] * 2
        results.append([t.cpu() for t in itertools.chain(*four)])
    ours, truth = results
    for a, b, before in zip(ours, truth, itertools.chain(*streams("cpu")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        if found_inf:
            assert same_bits(a, before)
