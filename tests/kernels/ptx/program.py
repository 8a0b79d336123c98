"""Kernels as they stand in a PTX file: instructions, basic blocks, registers and parameters."""

import bisect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from .arithmetic import TYPES, Fault

HINTS = {"cs", "ca", "cg", "nc", "cv", "wb", "wt"}  # for caches


@dataclass
class Instruction:
    line: int  # in the file
    text: str
    op: str
    operands: list[str]
    guard: str = ""  # a predicate register that must be true
    negated: bool = False  # or false
    reached: int = 0  # how many threads came to it
    hits: int = 0  # how many of them executed it, because its predicate held
    run: Callable | None = None

    @property
    def name(self) -> str:
        return self.op.partition(".")[0]

    @property
    def access(self) -> tuple[int, int, str]:
        """The number of elements of a load or a store, their size in bytes, and the space."""
        parts = self.op.split(".")
        count = next((int(p[1]) for p in parts if re.fullmatch(r"v[24]", p)), 1)
        space = next((p for p in parts if p in ("global", "shared", "param")), "generic")
        known = {self.name, space, parts[-1], f"v{count}", *HINTS}
        if not set(parts) <= known:
            raise Fault("is not implemented")
        return count, TYPES[parts[-1]].itemsize, space

    @property
    def not_coherent(self) -> bool:
        """Whether a load promises that nothing writes there while the kernel runs."""
        return "nc" in self.op.split(".")


@dataclass
class Program:
    """One kernel."""

    name: str
    widths: dict[str, int]  # bits of a register, by the letters that its name begins with
    params: dict[str, tuple[int, int]]  # offset and size of each parameter
    params_size: int
    threads: int  # per block
    shared: dict[str, int]  # where each array lies that the kernel declares in shared memory
    shared_size: int  # their bytes
    code: list[Instruction]
    blocks: list[tuple[int, int]]  # ranges of instructions of which only the last one may branch
    labels: dict[str, int]  # the block that each leads to

    def width(self, register: str) -> int:
        return self.widths.get(register) or self.widths[re.sub(r"\d+$", "", register)]

    def never_written(self, operand: str) -> bool:
        """Whether it is a register that no instruction of the kernel mentions as its first."""
        return operand[0] == "%" and operand not in self._first

    @cached_property
    def _first(self) -> set[str]:
        firsts = (one.operands[0] for one in self.code if one.operands)
        return {register for first in firsts for register in re.findall(r"%\w+", first)}

    def pack(self, *values: int) -> bytes:
        """The parameters as bytes: integers, followed by zeros for those that are left out."""
        packed = bytearray(self.params_size)
        for value, (at, size) in zip(values, self.params.values(), strict=False):
            packed[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        return bytes(packed)


def parse(text: str) -> list[Program]:
    """The kernels of a PTX file."""
    programs = []
    arrays = re.findall(r"\.shared \.align \d+ \.b8 (\w+)\[(\d+)\]", text)
    head = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{", re.DOTALL)
    for found in head.finditer(text):
        end = text.index("\n}", found.end())
        first = text.count("\n", 0, found.end()) + 1
        program = _parse(*found.groups(), text[found.end() : end], first)
        used = {o for one in program.code for o in one.operands}
        for name, size in arrays:
            if name in used:
                program.shared[name] = program.shared_size
                program.shared_size += -(-int(size) // 16) * 16
        programs.append(program)
    return programs


def _parse(name: str, parameters: str, directives: str, body: str, line: int) -> Program:
    offset, params = 0, {}
    for align, kind, symbol, count in re.findall(
        r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr\s+\.\w+\s+\.align\s+\d+)?"
        r"\s+(\w+)(?:\[(\d+)\])?", parameters):  # fmt: skip
        to = int(align or TYPES[kind].itemsize)
        size = TYPES[kind].itemsize * int(count or 1)
        params[symbol] = -(-offset // to) * to, size
        offset = sum(params[symbol])
    threads = int(re.search(r"\.(?:maxntid|reqntid)\s+(\d+)", directives)[1])
    widths: dict[str, int] = {}
    code: list[Instruction] = []
    leaders, labels = {0}, {}
    for number, row in enumerate(body.split("\n"), line):
        row = row.partition("//")[0].strip()
        if row.startswith((".loc", ".file")):
            continue
        for statement in row.split(";"):
            statement = statement.strip().lstrip("{} \t")  # braces around a scope
            if label := re.match(r"([$\w]+):", statement):
                labels[label[1]] = len(code)
                leaders.add(len(code))
                statement = statement[label.end() :].strip()
            if declared := re.match(r"\.reg\s+\.(\w+)\s+(%?\w+?)(<\d+>)?$", statement):
                type_ = declared[1]
                widths[declared[2]] = 1 if type_ == "pred" else 8 * TYPES[type_].itemsize
                continue
            if not statement or statement.startswith((".pragma", ".shared")):
                continue
            parts = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement)
            if not parts:
                raise ValueError(f"line {number}: {statement!r} is not understood")
            negated, guard, op, rest = parts.groups()
            found = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", rest)
            operands = [re.sub(r"\s", "", operand) for operand in found]
            code.append(Instruction(number, statement, op, operands, guard or "", bool(negated)))
            if op.partition(".")[0] in ("bra", "ret", "bar"):
                leaders.add(len(code))
    starts = sorted(leaders - {len(code)})
    blocks = list(zip(starts, [*starts[1:], len(code)], strict=True))
    targets = {label: bisect.bisect_left(starts, at) for label, at in labels.items()}
    return Program(name, widths, params, offset, threads, {}, 0, code, blocks, targets)


def loose(program: Program, allowed: set[str] = frozenset()) -> list[Instruction]:
    """Instructions that approximate, flush, fuse, or that ptxas may fuse."""
    bad = []
    for one in program.code:
        parts = one.op.split(".")
        vague = parts[-1] in ("f32", "f64", "f32x2", "f16x2", "f16", "bf16") and parts[0] in (
            "add", "sub", "mul", "div", "sqrt", "rcp") and "rn" not in parts  # fmt: skip
        if one.op not in allowed and (
            vague or parts[0] in ("fma", "ex2", "lg2", "rsqrt", "sin", "cos", "tanh")
            or {"ftz", "approx", "full", "sat"} & set(parts)
            or (parts[0] == "mad" and parts[-1][0] == "f")
        ):  # fmt: skip
            bad.append(one)
    return bad
