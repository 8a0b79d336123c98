"""What speed and equal bits depend on, read from the machine code of the kernels.

No GPU is needed: the installed `_cuda` is read, and Triton compiles for GPUs that are not there.
`python -m bench.gpu.machine_code` prints the same facts as a table.
"""

import re
from collections import Counter
from itertools import product

import pytest

from bench.gpu import machine_code
from bench.gpu.machine_code import GPUS, NAMES, SIZES, Kernel
from bench.gpu.triton_compile import NORM_SETS, SETS, TARGETS, Codes, Compiled, compile_all
from radam_kernels.backends import triton_
from radam_kernels.modules import DTYPES, load
from tests.helpers import DTYPE_SETS, LOW_MEMORY_SETS
from tests.kernels.norms import NORMS

CUDA_SETS = [*DTYPE_SETS, *LOW_MEMORY_SETS]
BLOCK8 = NAMES.index("block8")
CUDA_ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
FUSED_OR_ROUGH = ("fma.", "mad.f", "mad.rn.f", ".approx", ".ftz", "div.full", "rcp.", "rsqrt.")

# Twice what Little's law asks for: threads that compute and store load nothing meanwhile. The
# compute units of a B200 need half as much again as those of an H200, and get a smaller margin.
MARGIN = dict.fromkeys(GPUS, 2.0) | {"sm_100": 1.5}
BLOCK8_MARGIN = 1.25  # a thread has one part of a block
# Instructions for an element of block8, on an H200: more than some sets' memory traffic pays for.
BLOCK8_INSTRUCTIONS = 120


def name(codes: Codes) -> str:
    return "-".join(NAMES[code] for code in codes)


@pytest.fixture(scope="session", autouse=True)
def _tools() -> None:
    if not machine_code.cuobjdump():
        pytest.skip("no cuobjdump on PATH, and none beside Triton")


@pytest.fixture(scope="session")
def cuda_module() -> list[Kernel]:
    if not machine_code.cuda_module():
        pytest.skip("_cuda was not built")
    toolkit = load("_cuda").runtime_version() // 1000
    if machine_code.release() < toolkit:
        pytest.skip(f"cuobjdump {machine_code.release()} can't read what CUDA {toolkit} built")
    file = machine_code.cuda_module()
    built = set(machine_code.cuda_architectures()) & set(CUDA_ARCHITECTURES)
    return [k for arch in built for k in machine_code.read_sass(file, arch, "cuda")]


@pytest.fixture(scope="session")
def cuda_kernels(cuda_module) -> dict[tuple[str, Codes], Kernel]:
    return {(k.arch, k.codes): k for k in cuda_module if k.norm is None}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Codes], Compiled]:
    pytest.importorskip("triton", reason="triton is not installed")
    if not triton_.COMPILES_EXACTLY:
        pytest.skip("this Triton flushes subnormals, and is refused")
    every = compile_all(tmp_path_factory.mktemp("triton"))
    return {(c.arch, c.codes): c for c in every}


@pytest.fixture(scope="session")
def triton_kernels(compiled) -> dict[tuple[str, Codes], Kernel]:
    return {key: machine_code.read_triton(made) for key, made in compiled.items()}


def case(backend: str, arch: str, codes: Codes) -> object:
    """A parameter of `kernel`; compiling Triton's takes long."""
    marks = [pytest.mark.slow] if backend == "triton" else []
    return pytest.param((backend, arch, codes), id=f"{backend}-{arch}-{name(codes)}", marks=marks)


CASES = [case("cuda", *c) for c in product(CUDA_ARCHITECTURES, CUDA_SETS)]
# Of AMD's code the reader follows one path, which ends where exponents of block8 are stored.
CASES += [
    case("triton", arch, codes)
    for arch, codes in product(TARGETS, SETS)
    if not (arch == "gfx942" and BLOCK8 in codes)
]


def only(arch: str) -> pytest.MarkDecorator:
    cases = [case for case in CASES if case.values[0][1] == arch]
    return pytest.mark.parametrize("kernel", cases, indirect=True)


@pytest.fixture(params=CASES)
def kernel(request) -> Kernel:
    backend, *case = request.param
    kernels = request.getfixturevalue(f"{backend}_kernels")
    if backend == "cuda" and case[0] not in {arch for arch, _ in kernels}:
        pytest.skip(f"_cuda was built without {case[0]} (RADAM_CUDA_ARCHS)")
    return kernels[tuple(case)]


@pytest.fixture(params=product(TARGETS, SETS), ids=lambda case: f"{case[0]}-{name(case[1])}")
def from_triton(request, compiled) -> Compiled:
    return compiled[request.param]


def test_a_thread_loads_all_of_its_bytes_as_vectors_before_it_stores(kernel):
    """The widest stream by 16 bytes, in every dtype; a narrower one by 8 or more."""
    for widths, moved in (
        (kernel.load_widths, kernel.read),
        (kernel.store_widths, kernel.written),
    ):
        assert min(widths, default=0) >= 8, Counter(widths)
        # A step that is skipped in part may need its stores once more, on a path of their own.
        assert sum(widths) >= kernel.elements * moved
    wide = max(SIZES[code] for code in kernel.codes)
    assert kernel.load_widths.count(16) * 16 >= kernel.elements * wide
    assert kernel.elements == int(kernel.elements)
    # AMD's have more threads in flight, with half as many elements each.
    fewer = kernel.arch == "gfx942" or BLOCK8 in kernel.codes
    assert sum(kernel.load_widths) >= (50 if fewer else 100)


def test_nothing_spills_and_no_local_memory_is_used(kernel):
    assert (kernel.stack, kernel.local) == (0, 0)
    if kernel.backend == "cuda":
        assert kernel.registers <= 128


def test_registers_leave_room_for_loads_in_flight(kernel):
    margin = BLOCK8_MARGIN if BLOCK8 in kernel.codes else MARGIN[kernel.arch]
    needs = margin * GPUS[kernel.arch].needs_in_flight
    assert kernel.in_flight >= needs, f"{kernel.registers=}, {kernel.blocks=}"


@only("sm_90")  # where the copy bandwidth was measured
def test_instructions_fit_into_the_time_of_the_memory_traffic(kernel):
    affordable = machine_code.affordable(kernel.read + kernel.written)
    ceiling = max(affordable, BLOCK8_INSTRUCTIONS) if BLOCK8 in kernel.codes else affordable
    assert kernel.instructions <= ceiling


@pytest.fixture(scope="session")
def embedded_ptx() -> dict[Codes, str]:
    if not machine_code.cuda_module():
        pytest.skip("_cuda was not built")
    ptx = machine_code.embedded_ptx()
    if not ptx:
        pytest.skip("_cuda was built without PTX (RADAM_CUDA_ARCHS)")
    return ptx


def ptx_instructions(ptx: str) -> Counter[str]:
    """How often each instruction occurs, without its predicate."""
    found = re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z][a-z0-9_.:]+)[ ;]", ptx, re.MULTILINE)
    return Counter(found)


def check_ptx(ptx: str, codes: Codes) -> None:
    counts = ptx_instructions(ptx)
    width = "f64" if codes == (3, 3, 3) else "f32"
    assert counts[f"div.rn.{width}"] == counts[f"sqrt.rn.{width}"] > 0
    names = " ".join(counts)
    assert [bad for bad in FUSED_OR_ROUGH if bad in names] == []


@pytest.mark.parametrize("codes", CUDA_SETS, ids=name)
def test_cuda_ptx_rounds_each_operation(embedded_ptx, codes):
    check_ptx(embedded_ptx[codes], codes)
    # Without a rounding of its own, ptxas may fuse an operation with the next.
    free = re.findall(
        r"(?:add|sub|mul)\.f(?:32|64)", " ".join(ptx_instructions(embedded_ptx[codes]))
    )
    assert free == []


@pytest.mark.slow
def test_triton_ptx_rounds_each_operation(from_triton):
    assert from_triton.options["enable_fp_fusion"] is False  # ptxas is told so too
    if "ptx" in from_triton.files:
        check_ptx(from_triton.text("ptx"), from_triton.codes)


@only("gfx942")
def test_triton_on_amd_keeps_subnormals_and_divides_exactly(kernel, compiled):
    text = compiled["gfx942", kernel.codes].text("amdgcn")
    assert re.findall(r"\.amdhsa_float_denorm_mode_\w+ (\d)", text) == ["3", "3"]
    counts = Counter(one.name for one in kernel.main)
    width = "f64" if kernel.codes == (3, 3, 3) else "f32"
    # The steps of an IEEE division; an approximate one would be a reciprocal and a product.
    assert counts[f"v_div_fixup_{width}"] == kernel.elements
    assert counts[f"v_div_fmas_{width}"] == kernel.elements
    assert counts[f"v_div_scale_{width}"] == 2 * kernel.elements


@pytest.mark.slow
def test_triton_narrows_scalars_once(from_triton):
    if "ptx" in from_triton.files:
        narrowed = ptx_instructions(from_triton.text("ptx"))["cvt.rn.f32.f64"]
    else:
        narrowed = len(re.findall(r"\tv_cvt_f32_f64", from_triton.text("amdgcn")))
    assert narrowed == (0 if from_triton.codes == (3, 3, 3) else 8)


NORM_CASES = [
    *(("cuda", *case) for case in product(CUDA_ARCHITECTURES, range(len(DTYPES)), NORMS)),
    *(("triton", arch, code, 2.0) for arch, (code,) in product(TARGETS, NORM_SETS)),
]


@pytest.fixture(
    params=[
        pytest.param(
            case,
            id=f"{case[0]}-{case[1]}-{NAMES[case[2]]}-{case[3]:g}",
            marks=[pytest.mark.slow] if case[0] == "triton" else [],
        )
        for case in NORM_CASES
    ]
)
def norm_kernel(request) -> Kernel:
    backend, arch, code, norm = request.param
    if backend == "triton":
        return request.getfixturevalue("triton_kernels")[arch, (code,)]
    kernels = [k for k in request.getfixturevalue("cuda_module") if k.arch == arch]
    if not kernels:
        pytest.skip(f"_cuda was built without {arch} (RADAM_CUDA_ARCHS)")
    [kernel] = [k for k in kernels if (k.codes, k.norm) == ((code,), norm)]
    return kernel


def test_a_thread_loads_its_gradients_by_16_bytes_before_it_uses_them(norm_kernel):
    assert set(norm_kernel.load_widths) == {16}
    assert sum(norm_kernel.load_widths) >= (32 if norm_kernel.arch == "gfx942" else 64)
    assert (norm_kernel.stack, norm_kernel.local) == (0, 0)
    needs = MARGIN[norm_kernel.arch] * GPUS[norm_kernel.arch].needs_in_flight
    assert norm_kernel.in_flight >= needs, f"{norm_kernel.registers=}, {norm_kernel.blocks=}"
    if norm_kernel.arch == "sm_90":
        assert norm_kernel.instructions <= machine_code.affordable(norm_kernel.read)


def test_every_kernel_of_the_module_is_checked(cuda_kernels):
    for arch in {arch for arch, _ in cuda_kernels}:
        assert {codes for a, codes in cuda_kernels if a == arch} == set(CUDA_SETS)
