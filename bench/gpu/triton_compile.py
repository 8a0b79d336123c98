"""Compiles the Triton kernels for GPUs that need not be there: what their launches hand to them.

Triton compiles nothing where it interprets, so `compile_all` does it in a process of its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest.mock import patch

Codes = tuple[int, ...]  # dtypes of param, grad and moments, as in radam_kernels.modules

# float32, float64, and 16-bit types as parameter, with gradient, and throughout; then with formats
# for low memory: 32-bit masters and 16-bit moments, 24 and 8 bits, no master.
SETS: tuple[Codes, ...] = (
    *((0, 0, 0), (3, 3, 3), (1, 0, 0), (1, 1, 0), (1, 1, 1), (2, 1, 2)),
    *((6, 1, 4), (5, 1, 7), (4, 1, 4)),
)
NORM_SETS: tuple[Codes, ...] = ((0,), (1,), (3,))  # dtypes of gradients whose norm is taken
TARGETS = ("sm_90", "sm_100", "gfx942")


@dataclass
class Compiled:
    """One compiled kernel; `files` holds the path of its cubin, ptx or amdgcn.

    The kernel of a norm, which is that of norm 2, has one dtype.
    """

    codes: Codes
    arch: str
    signature: dict[str, str] = field(default_factory=dict)
    options: dict[str, bool | int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def text(self, kind: str) -> str:
        return Path(self.files[kind]).read_text()


def compile_all(folder: Path) -> list[Compiled]:
    """SETS and NORM_SETS for every one of TARGETS, as files in `folder`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(folder)],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"Triton's compilations failed:\n{done.stderr}")
    return [
        Compiled(**entry | {"codes": tuple(entry["codes"])}) for entry in json.loads(done.stdout)
    ]


def _compile_all(folder: Path) -> Iterator[Compiled]:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from radam_kernels.backends import triton_kernel
    from radam_kernels.modules import DTYPES

    pointers = {torch.int64: "*i64", torch.int32: "*i32", torch.float64: "*fp64"}
    tables = [torch.zeros(width, dtype=torch.int64) for width in (5, 1, 1, 9)]
    names = ("radam_step_kernel", "radam_norm_kernel", "radam_norm_total_kernel")

    class Recorder:
        """Takes the place of a kernel, and keeps the arguments of its launch."""

        def __getitem__(self, grid: object) -> "Recorder":
            return self

        def __call__(self, *args: object, **options: bool | int) -> None:
            self.args, self.options = args, options

    for codes in (*SETS, *NORM_SETS):
        recorders = {name: Recorder() for name in names}
        with patch.multiple(triton_kernel, **recorders):
            if len(codes) == 1:
                triton_kernel.launch_power_sum(*tables[:2], 0, 1, *codes, 2.0)
            else:
                low_memory = tables[0] if max(codes) >= len(DTYPES) else None
                triton_kernel.launch_(*tables, None, 0, 1, codes, low_memory)
        name = names[1] if len(codes) == 1 else names[0]
        kernel, recorder = getattr(triton_kernel, name), recorders[name]
        signature, constants = {}, {}
        for i, (parameter, arg) in enumerate(zip(kernel.params, recorder.args, strict=True)):
            if parameter.is_constexpr or arg is None:  # a kernel without it
                signature[parameter.name], constants[(i,)] = "constexpr", arg
            elif torch.is_tensor(arg):
                signature[parameter.name] = pointers[arg.dtype]
            else:
                signature[parameter.name] = "i32" if isinstance(arg, int) else repr(arg)
        source = ASTSource(kernel, signature, constants, {})
        for arch in TARGETS:
            compiled = Compiled(codes, arch, signature, recorder.options)
            nvidia = arch.startswith("sm_")
            target = GPUTarget("cuda", int(arch[3:]), 32) if nvidia else GPUTarget("hip", arch, 64)
            built = triton.compile(source, target=target, options=recorder.options)
            for kind in ("cubin", "ptx") if nvidia else ("amdgcn",):
                path = folder / f"{'-'.join(map(str, codes))}-{arch}.{kind}"
                what = built.asm[kind]
                path.write_bytes(what if isinstance(what, bytes) else what.encode())
                compiled.files[kind] = str(path)
            yield compiled


if __name__ == "__main__":
    print(json.dumps([asdict(compiled) for compiled in _compile_all(Path(sys.argv[1]))]))
