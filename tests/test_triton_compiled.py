"""Compiles the Triton kernel for a GPU that need not be there, and reads what came out."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

import pytest

from radam_kernels.backends import triton_

pytest.importorskip("triton", reason="triton is not installed")
if not triton_.COMPILES_EXACTLY:
    pytest.skip("this Triton flushes subnormals, and is refused", allow_module_level=True)

# Records what launch_ hands to the kernel, and compiles just that for sm_90. In a process of its
# own: where triton interprets, it compiles nothing.
SCRIPT = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from radam_kernels.backends import triton_kernel

class Recorder:
    def __getitem__(self, grid):
        return self
    def __call__(self, *args, **options):
        self.args, self.options = args, options

POINTERS = {torch.int64: "*i64", torch.int32: "*i32", torch.float64: "*fp64"}
kernel, recorder = triton_kernel.radam_step_kernel, Recorder()
triton_kernel.radam_step_kernel = recorder
tables = [
    torch.zeros(1, width, dtype=dtype)
    for width, dtype in ((6, torch.int64), (2, torch.int32), (9, torch.float64))
]
for codes in json.loads(sys.argv[1]):
    triton_kernel.launch_(*tables, codes)
    signature, constants = {}, {}
    for i, (parameter, arg) in enumerate(zip(kernel.params, recorder.args, strict=True)):
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", arg
        else:
            signature[parameter.name] = POINTERS[arg.dtype] if torch.is_tensor(arg) else repr(arg)
    compiled = triton.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", 90, 32),
        options=recorder.options,
    )
    ptx = compiled.asm["ptx"]
    print(json.dumps([signature, recorder.options, ptx]))
"""
NAMES = ("float32", "bfloat16", "float16", "float64")  # in the order of their codes
SETS = [(0, 0, 0), (3, 3, 3), (1, 0, 0), (2, 1, 2)]
WIDTHS = (4, 2, 2, 8)


@dataclass
class Compiled:
    codes: tuple[int, int, int]
    signature: dict[str, str]
    options: dict
    ptx: str

    def instructions(self) -> Counter:
        """How often each instruction occurs, predicated ones as `@ld...`."""
        found = re.findall(
            r"^\s*(@)?(?:!?%p\d+\s+)?([a-z][a-z0-9_.:]+)[ ;]", self.ptx, re.MULTILINE
        )
        return Counter(predicate + name for predicate, name in found)

    def wide(self, direction: str) -> int:
        """How many 16-byte global accesses there are outside any mask."""
        sizes = {"v4.b32": 16, "v2.b64": 16}
        return sum(
            n
            for name, n in self.instructions().items()
            if any(name == f"{direction}.global.{size}" for size in sizes)
        )


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> list[Compiled]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(SETS)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    return [Compiled(codes, *line) for codes, line in zip(SETS, lines, strict=True)]


by_set = pytest.mark.parametrize(
    "i", range(len(SETS)), ids=lambda i: "-".join(NAMES[c] for c in SETS[i])
)


@by_set
def test_the_kernel_takes_tables_and_no_float(kernels, i):
    assert kernels[i].signature == {
        "segments": "*i64",
        "work": "*i32",
        "scalars": "*fp64",
        **dict.fromkeys(("PARAM", "GRAD", "STATE", "BLOCK"), "constexpr"),
    }
    assert ".param .f32" not in kernels[i].ptx
    assert ".param .f64" not in kernels[i].ptx


@by_set
def test_whole_chunks_are_read_and_written_16_bytes_at_a_time(kernels, i):
    kernel = kernels[i]
    param, grad, state = (WIDTHS[code] for code in kernel.codes)
    threads, chunk = 32 * kernel.options["num_warps"], 4096
    read, written = param + grad + 2 * state, param + 2 * state
    assert kernel.wide("ld") == read * chunk // threads // 16
    assert kernel.wide("st") == written * chunk // threads // 16


@by_set
def test_no_operation_is_fused_or_approximate(kernels, i):
    kernel = kernels[i]
    assert kernel.options["enable_fp_fusion"] is False  # ptxas is told so too
    names = " ".join(kernel.instructions())
    width = "f64" if kernel.codes[0] == 3 else "f32"
    assert f"div.rn.{width}" in names
    assert f"sqrt.rn.{width}" in names
    for fused_or_rough in ("fma.", ".approx", ".ftz", "div.full", "rcp.", "rsqrt."):
        assert fused_or_rough not in names, fused_or_rough


@by_set
def test_scalars_are_narrowed_once(kernels, i):
    narrowed = kernels[i].instructions()["cvt.rn.f32.f64"]
    assert narrowed == (0 if kernels[i].codes[0] == 3 else 8)
