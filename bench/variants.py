"""Variants of the GPU kernels for bench/gpu_tune.py: lists of substitutions in today's sources.

A CUDA variant is built in a copy of the tree by the same CMakeLists.txt; a Triton variant is a copy
of the kernel's module. What they are for: how many bytes are in flight, and where they are cached.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from .folders import ROOT

CUDA_SOURCE = Path("csrc/cuda/step_cuda.cu")
TRITON_SOURCE = Path("radam_kernels/backends/triton_kernel.py")
TODAY, TRITON_TODAY = "today", "triton: today"

Change = tuple[str, str]  # old text, where " ... " stands for anything, and the new text


class Variant(NamedTuple):
    name: str
    changes: tuple[Change, ...] = ()
    triton: bool = False

    @property
    def source(self) -> Path:
        return TRITON_SOURCE if self.triton else CUDA_SOURCE


def substitute(text: str, changes: Iterable[Change]) -> str:
    """The text after the changes, in turn; ValueError unless each old text is there just once."""
    for old, new in changes:
        pattern = ".*?".join(map(re.escape, old.split(" ... ")))
        found = re.findall(pattern, text, re.DOTALL)
        if len(found) != 1:
            raise ValueError(f"expected once in the source, found {len(found)} times: {old!r}")
        text = text.replace(found[0], new)
    return text


def build(variant: Variant, folder: Path, arch: str, seconds: float) -> Path:
    """The `_cuda` module of a variant, for one architecture; RuntimeError if it does not compile.

    Args:
        folder: empty, or not there yet.
        arch: as RADAM_CUDA_ARCHS, such as 90-real.
        seconds: that it may take.
    """
    tree, made = folder / "tree", folder / "build"
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    (tree / "radam_kernels").mkdir()
    for name in ("CMakeLists.txt", "radam_kernels/fingerprint.py"):
        shutil.copy(ROOT / name, tree / name)
    source = tree / CUDA_SOURCE
    source.write_text(substitute(source.read_text(), (*variant.changes, FEW_DTYPES)))
    options = (
        "CMAKE_BUILD_TYPE=Release",
        f"RADAM_CUDA_ARCHS={arch}",
        f"Python_EXECUTABLE={sys.executable}",
    )
    configure = ["cmake", "-S", tree, "-B", made, "-G", "Ninja", *(f"-D{o}" for o in options)]
    command = ["cmake", "--build", made, "--target", "_cuda"]
    with (folder / "log").open("w+") as log:
        for words in (configure, command):
            done = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, timeout=seconds)
            if done.returncode:
                log.seek(0)
                said = re.findall(r".*(?:error|Error|FAILED).*", log.read()) or ["no word of why"]
                raise RuntimeError(f"it does not build: {said[0][:300]}")
    return next(made.glob("_cuda.*"))


def load_cuda(variant: Variant, file: Path) -> ModuleType:
    """Under a name of its own, by which pybind11 knows modules."""
    return _load(f"{re.sub('[^a-z0-9]+', '_', variant.name)}._cuda", file)


def load_triton(variant: Variant, folder: Path) -> ModuleType:
    """The kernel's module with the changes; Triton reads the source of a function from its file."""
    file = folder / f"triton_kernel_{re.sub('[^a-z0-9]+', '_', variant.name)}.py"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(substitute((ROOT / TRITON_SOURCE).read_text(), variant.changes))
    return _load(f"radam_kernels.backends.{file.stem}", file)


def _load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# Only what is measured, for the compiler's sake.
FEW_DTYPES = (
    "  visit_dtypes(step.dtypes, [&]",
    """\
  const auto visit_tuned = [](const DTypeSet& dtypes, const auto& visit) {
    const Element<kFloat32> wide;
    const Element<kBFloat16> narrow;
    if (dtypes == DTypeSet{kFloat32, kFloat32, kFloat32}) return visit(wide, wide, wide);
    if (dtypes == DTypeSet{kBFloat16, kBFloat16, kFloat32}) return visit(narrow, narrow, wide);
    if (dtypes == DTypeSet{kBFloat16, kBFloat16, kBFloat16}) return visit(narrow, narrow, narrow);
    throw std::runtime_error("a dtype set that is not tuned");
  };
  visit_tuned(step.dtypes, [&]""",
)
LOOP = "#pragma unroll 1\n    for (int i = threadIdx.x * kN; ... store(exp_avg_sqs + i, v);\n    }"
LOAD = "pack.words[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);"
STORE = "__stcs(reinterpret_cast<uint4*>(to) + i, pack.words[i]);"


def shape(threads: int, vectors: int) -> tuple[Change, ...]:
    """Threads of a block, and vectors that each steps."""
    today = (("int kThreads = 256;", 256, threads), ("int kVectors = 4;", 4, vectors))
    return tuple((old, old.replace(str(a), str(b))) for old, a, b in today if a != b)


def blocks(least: int) -> Change:
    """Registers for so many resident blocks."""
    bounds = "__launch_bounds__(kThreads{})\n    radam_step_kernel("
    return bounds.format(", kBlocks<P, G, S>"), bounds.format(f", {least}")


def unrolled(by: int) -> Change:
    """All loads of several vectors before the first use."""
    return (
        LOOP,
        f"""\
    const auto steps = [&](int i, auto unroll) {{
      constexpr int kU = decltype(unroll)::value;
      Pack<P, kN> p[kU];
      Pack<G, kN> g[kU];
      Pack<S, kN> m[kU], v[kU];
#pragma unroll
      for (int u = 0, at = i; u < kU; ++u, at += kThreads * kN) {{
        p[u] = load<P, kN>(params + at);
        g[u] = load<G, kN>(grads + at);
        m[u] = load<S, kN>(exp_avgs + at);
        v[u] = load<S, kN>(exp_avg_sqs + at);
      }}
#pragma unroll
      for (int u = 0, at = i; u < kU; ++u, at += kThreads * kN) {{
#pragma unroll
        for (int j = 0; j < kN; ++j) {{
          step_element(p[u].x[j], g[u].x[j], m[u].x[j], v[u].x[j], s, l2, action);
        }}
        store(params + at, p[u]);
        store(exp_avgs + at, m[u]);
        store(exp_avg_sqs + at, v[u]);
      }}
    }};
    int i = threadIdx.x * kN;
#pragma unroll 1
    for (; i + {by - 1} * kThreads * kN < done; i += {by} * kThreads * kN) {{
      steps(i, std::integral_constant<int, {by}>{{}});
    }}
#pragma unroll 1
    for (; i < done; i += kThreads * kN) steps(i, std::integral_constant<int, 1>{{}});""",
    )


# The next vector's loads before this one's use, so that no thread is ever without loads.
AHEAD = (
    LOOP,
    """\
    Pack<P, kN> p = {}, p_ = {};
    Pack<G, kN> g = {}, g_ = {};
    Pack<S, kN> m = {}, v = {}, m_ = {}, v_ = {};
    const auto fetch = [&](int at) {
      if (at >= done) return;
      p_ = load<P, kN>(params + at);
      g_ = load<G, kN>(grads + at);
      m_ = load<S, kN>(exp_avgs + at);
      v_ = load<S, kN>(exp_avg_sqs + at);
    };
    fetch(threadIdx.x * kN);
#pragma unroll 1
    for (int i = threadIdx.x * kN; i < done; i += kThreads * kN) {
      p = p_, g = g_, m = m_, v = v_;
      fetch(i + kThreads * kN);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        step_element(p.x[j], g.x[j], m.x[j], v.x[j], s, l2, action);
      }
      store(params + i, p);
      store(exp_avgs + i, m);
      store(exp_avg_sqs + i, v);
    }""",
)
# 16 bytes of the widest stream and 8 of a narrower one: neighbours' accesses are neighbours too.
WIDEST = (
    ("(sizeof(P) < sizeof(G) ? ... ));", "(sizeof(P) < sizeof(S) ? sizeof(S) : sizeof(P));"),
    (
        "static constexpr int kWords = N * sizeof(T) / 16;",
        "using Word = std::conditional_t<N * sizeof(T) % 16 == 0, uint4, uint2>;\n"
        "  static constexpr int kWords = N * sizeof(T) / sizeof(Word);",
    ),
    ("uint4 words[kWords];", "Word words[kWords];"),
    (LOAD, LOAD.replace("const uint4", "const typename Pack<T, N>::Word")),
    (STORE, STORE.replace("uint4", "typename Pack<T, N>::Word")),
)  # fmt: skip


def loads(how: str) -> Change:
    """Loads by an intrinsic, such as __ldcg; plain ones by none."""
    return LOAD, LOAD.replace("__ldcs(reinterpret", f"{how or '*'}(reinterpret")


def stores(how: str) -> Change:
    to = "reinterpret_cast<uint4*>(to)"
    return STORE, f"{how}({to} + i, pack.words[i]);" if how else f"{to}[i] = pack.words[i];"


def loads_ptx(modifiers: str) -> Change:
    """Loads with hints that have no intrinsic."""
    return (
        LOAD,
        f"""\
const size_t at = __cvta_generic_to_global(reinterpret_cast<const uint4*>(from) + i);
    uint4& w = pack.words[i];
    asm("ld.global.{modifiers}.v4.u32 {{%0, %1, %2, %3}}, [%4];"
        : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
        : "l"(at));""",
    )


def grads(how: str) -> Change:
    """Of the gradients alone, which are only read."""
    return (
        "const auto g = load<G, kN>(grads + i);",
        f"""\
Pack<G, kN> g;
#pragma unroll
      for (int j = 0; j < g.kWords; ++j) {{
        g.words[j] = {how}(reinterpret_cast<const uint4*>(grads + i) + j);
      }}""",
    )


def triton(chunk: int, warps: int) -> tuple[Change, ...]:
    today = (("CHUNK = 4096 ", 4096, chunk), ("num_warps=8", 8, warps))
    return tuple((old, old.replace(str(a), str(b))) for old, a, b in today if a != b)


TRITON_STREAMED: tuple[Change, ...] = (
    *((f"tl.load({x}_ptr, mask)", f'tl.load({x}_ptr, mask, eviction_policy="evict_first")')
      for x in "pgmv"),
    *((f"_narrow({x}, {kind}), mask)", f'_narrow({x}, {kind}), mask, cache_modifier=".cs")')
      for x, kind in (("p", "PARAM"), ("m", "STATE"), ("v", "STATE"))),
)  # fmt: skip

SHAPES = [(128, 2), (128, 4), (128, 8), (256, 1), (256, 2), (256, 8), (512, 1), (512, 2), (512, 4)]
TRITONS = [(1024, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 4), (4096, 16), (8192, 8)]
VARIANTS = [
    Variant(TODAY),
    Variant("today, again"),  # what differs by no more than these two does not differ
    *(Variant(f"{t} threads x {v}", shape(t, v)) for t, v in SHAPES),
    Variant("unroll 2", (unrolled(2),)),
    Variant("unroll 2, 128 threads x 8", (*shape(128, 8), unrolled(2))),
    Variant("loads ahead", (AHEAD,)),
    Variant("loads ahead, 256 threads x 8", (*shape(256, 8), AHEAD)),
    Variant("5 blocks", (blocks(5),)),
    Variant("6 blocks", (blocks(6),)),
    Variant("plain", (loads(""), stores(""))),
    Variant("plain loads", (loads(""),)),
    Variant("plain stores", (stores(""),)),
    Variant("loads past L1", (loads("__ldcg"),)),
    Variant("last use", (loads("__ldlu"),)),
    Variant("no L1", (loads_ptx("L1::no_allocate"),)),
    Variant("no L1, 256 B of L2", (loads_ptx("L1::no_allocate.L2::256B"),)),
    Variant("gradients read-only", (grads("__ldg"),)),
    Variant("16 bytes of the widest", WIDEST),
    Variant("16 bytes of the widest, unroll 2", (*WIDEST, unrolled(2))),
    Variant(TRITON_TODAY, (), True),
    *(Variant(f"triton: {c} by {w} warps", triton(c, w), True) for c, w in TRITONS),
    Variant("triton: streamed", TRITON_STREAMED, True),
    Variant("triton: streamed, 2048 by 8 warps", (*TRITON_STREAMED, *triton(2048, 8)), True),
]
