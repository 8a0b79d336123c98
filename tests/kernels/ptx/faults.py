"""Faults to plant in the PTX of a kernel: the check must see every one of them."""

import math
import re
from dataclasses import dataclass

F32, BF16, MIXED = (0, 0, 0), (1, 1, 1), (1, 0, 0)
STOCHASTIC, BLOCK8, MASTER24 = (4, 1, 4), (5, 1, 7), (5, 0, 0)


@dataclass(frozen=True)
class Planted:
    """A changed place in the PTX of one kernel, of a step or of a norm; or all that match."""

    name: str
    backend: str
    codes: tuple[int, ...]
    pattern: str
    replacement: str
    nth: int | None = 0  # which of the places that match; None for all
    norm_type: float | None = None

    def edit(self, ptx: str) -> str:
        places = list(re.finditer(self.pattern, ptx))
        if not places:
            raise ValueError(f"{self.name}: the PTX has no {self.pattern!r}; mend faults.py")
        if self.nth is None:
            return re.sub(self.pattern, self.replacement, ptx)
        at = places[self.nth]
        return ptx[: at.start()] + at.expand(self.replacement) + ptx[at.end() :]


FAULTS = (
    Planted(
        "the loop over vectors ends late", "cuda", F32,
        r"setp\.lt\.s32(\s+%p\d+, [^;]*;\s*@%p\d+ bra\s+\S+;\s*bra\.uni)",
        r"setp.le.s32\1",
    ),
    Planted("the tail's first test is >", "cuda", F32, r"setp\.ge\.s32", "setp.gt.s32", -1),
    Planted("one product rounds towards zero", "cuda", F32, r"mul\.rn\.f32", "mul.rz.f32"),
    Planted("one sum rounds down", "cuda", F32, r"add\.rn\.f32", "add.rm.f32", 1),
    Planted("a square root approximates", "cuda", F32, r"sqrt\.rn\.f32", "sqrt.approx.ftz.f32"),
    Planted("a division flushes subnormals", "cuda", F32, r"div\.rn\.f32", "div.rn.ftz.f32"),
    Planted(
        "a product and a sum are fused", "cuda", F32,
        r"mul\.rn\.f32\s+(%f\d+), (%f\d+, %f\d+);\s*add\.rn\.f32\s+(%f\d+), \1, (%f\d+);",
        r"fma.rn.f32 \3, \2, \4;",
    ),
    Planted(
        "alignment to 8 passes for 16", "cuda", F32, r"(and\.b64\s+%rd\d+, %rd\d+), 15", r"\1, 7"
    ),
    Planted(
        "an index has 32 bits", "cuda", F32, r"shl\.b64\s+(%rd\d+), %rd\d+, 12;",
        r"\g<0> shl.b64 \1, \1, 32; shr.s64 \1, \1, 32;",
    ),
    Planted(
        "the gradient of the next segment", "cuda", F32,
        r"(shl\.b64\s+(%rd\d+), %rd\d+, 3;\s+add\.s64\s+(%rd\d+), %rd\d+, \2;"
        r"\s+ld\.global\.u64\s+%rd\d+, \[\3)\]", r"\1+8]",
    ),
    Planted(
        "a load that is not coherent of what is stored", "cuda", F32,
        r"ld\.global\.v4", "ld.global.nc.v4",
    ),
    Planted("bfloat16 is truncated", "cuda", BF16, r"cvt\.rn\.bf16\.f32", "cvt.rz.bf16.f32", 3),
    Planted(
        "two halves change places", "cuda", BF16, r"(bfi\.b64\s+[^;]*), 16, 16", r"\1, 32, 16"
    ),
    Planted("a mask is <=", "triton", F32, r"setp\.lt\.s64", "setp.le.s64", -1),
    Planted(
        "bfloat16 rounds half up", "triton", BF16, r"(add\.s32\s+%r\d+, %r\d+), 32767", r"\1, 32768"
    ),
    Planted("a barrier is missing", "triton", MIXED, r"bar\.sync\s+0;", ""),
    Planted(
        "shared memory is read elsewhere", "triton", MIXED,
        r"(ld\.shared\S+\s+\{[^}]*\}, \[%r\d+)\+\d+\]", r"\1+4096]",
    ),
    Planted(
        "a moment is truncated", "cuda", STOCHASTIC,
        r"(or\.b32\s+(%r\d+), %r\d+, 128;\s+)add\.s32\s+(%r\d+), \2, (%r\d+);",
        r"\1mov.b32 \3, \4;",
    ),
    Planted(
        "two streams take the same random bits", "cuda", STOCHASTIC,
        r"and\.b32\s+(%r\d+), (%r\d+), 65280;", r"shr.u32 \1, \2, 16;",
    ),
    Planted(
        "Triton's streams take the same random bits", "triton", STOCHASTIC,
        r"and\.b32\s+(%r\d+), (%r\d+), 65280;", r"shr.u32 \1, \2, 16;",
    ),
    Planted(
        "an exponent is that before rounding", "cuda", BLOCK8,
        r"(add\.s32\s+%r\d+, %r\d+), 1048575;", r"\1, 0;",
    ),
    Planted(
        "Triton's exponent is that before rounding", "triton", BLOCK8,
        r"(add\.s32\s+%r\d+, %r\d+), 1048575;", r"\1, 0;",
    ),
    Planted(
        "a lane of another block takes part", "cuda", BLOCK8,
        r"(shfl\.sync\.bfly\.b32\s+[^,]+, [^,]+), %r\d+,", r"\1, 8,",
    ),
    Planted(
        "exp_avg_sq has 8 random bits", "triton", BLOCK8,
        r"(and\.b32\s+%r\d+, %r\d+), 1048560;", r"\1, 1044480;", None,
    ),
    Planted(
        "exp_avg_sq becomes 0", "cuda", BLOCK8,
        r"selp\.b32(\s+%r\d+), 0, 1048576,", r"selp.b32\1, 0, 0,",
    ),
    Planted(
        "a remainder has no sign", "triton", BLOCK8, r"cvt\.s32\.s8", "cvt.u32.u8"
    ),
    Planted(
        "a stale remainder makes NaN", "triton", BLOCK8,
        r"setp\.num\.f32(\s+%p\d+), [^;]*;", r"setp.eq.u32\1, 0, 0;",
    ),
    Planted(
        "the upper half of an index is left out", "triton", BLOCK8,
        r"shr\.u64(\s+%rd\d+, %rd\d+), 32;", r"shr.u64\1, 63;",
    ),
    Planted(
        "a chunk with two upper halves has one key", "triton", BLOCK8,
        r"setp\.gt\.u32(\s+%p\d+, %r\d+), -2048;", r"setp.gt.u32\1, -1;",
    ),
    Planted(
        "an exponent goes elsewhere", "cuda", BLOCK8,
        r"(st\.u8\s+\[%rd\d+)\](, %r\d+;\s+\S+:)", r"\1+1]\2",
    ),
    Planted("a barrier of block8 is missing", "triton", BLOCK8, r"bar\.sync\s+0;", ""),
    Planted(
        "a matrix is loaded from elsewhere", "triton", MASTER24,
        r"(ldmatrix\S+\s+\{[^}]*\}, \[%r\d+)\]", r"\1+16]",
    ),
    Planted(
        "one element too many", "cuda", (0,), r"setp\.ge\.s32", "setp.gt.s32", norm_type=2.0
    ),
    Planted(
        "a scale is 0", "cuda", (0,), r"(min\.u32\s+%r\d+, %r\d+), 253", r"\1, 254", norm_type=1.0
    ),
    Planted(
        "a maximum drops NaN", "cuda", (0,), r"setp\.nan\.f64", "setp.ne.f64", norm_type=math.inf
    ),
    Planted(
        "a barrier of the norm is missing", "cuda", (0,), r"bar\.sync\s+0;", "", norm_type=2.0
    ),
    Planted(
        "a partial sum goes elsewhere", "cuda", (0,),
        r"(st\.global\.f64\s+\[%rd\d+)\]", r"\1+8]", norm_type=2.0,
    ),
    Planted(
        "Triton's scale is 0", "triton", (1,),
        r"(min\.u32\s+%r\d+, %r\d+), 253", r"\1, 254", norm_type=2.0,
    ),
    Planted(
        "a barrier of Triton's norm is missing", "triton", (0,), r"bar\.sync\s+0;", "", 1,
        norm_type=2.0,
    ),
    Planted(
        "a shuffle takes another thread", "triton", (0,),
        r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), 16,", r"\1, 8,", norm_type=2.0,
    ),
    Planted(
        "all threads write the partial sum", "triton", (0,), r"@%p\d+ (st\.global)", r"\1",
        norm_type=2.0,
    ),
)  # fmt: skip
