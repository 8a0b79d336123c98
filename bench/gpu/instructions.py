"""Reads machine code, as cuobjdump and Triton print it, and finds its main path."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

LOADS = ("LDG", "LD.", "global_load", "flat_load", "buffer_load")
STORES = ("STG", "ST.", "global_store", "flat_store", "buffer_store")
# Bytes by the suffix of the instruction, as NVIDIA and as AMD write it; 4 without one.
WIDTHS = {"256": 32, "128": 16, "64": 8, "[US]16": 2, "[US]8": 1}
WIDTHS |= {"x4": 16, "x3": 12, "x2": 8, "[us]?short": 2, "[us]?byte": 1}


@dataclass(frozen=True)
class Instruction:
    name: str  # such as LDG.E.128, without its predicate
    operands: str
    falls_through: bool = True
    target: int | None = None  # of a branch

    @property
    def loads(self) -> int:
        """Bytes that one thread loads from global memory."""
        return self._width if self.name.startswith(LOADS) else 0

    @property
    def stores(self) -> int:
        return self._width if self.name.startswith(STORES) else 0

    @property
    def _width(self) -> int:
        for suffix, width in WIDTHS.items():
            if re.search(rf"(\.|dword|_){suffix}(\.|_|$)", self.name):
                return width
        return 4

    @property
    def local(self) -> bool:
        return self.name.startswith(("LDL", "STL", "scratch_"))


def main_path(code: list[Instruction]) -> list[Instruction]:
    """What lies between the most 16-byte loads that one path holds, and the widest stores after it.

    A kernel has several such paths, for whole chunks and for single vectors. Calls are passed over.
    """
    after: list[list[int]] = [[] for _ in code]
    before: list[list[int]] = [[] for _ in code]
    for i, one in enumerate(code):
        for j in ([i + 1] if one.falls_through else []) + [one.target]:
            if j is not None and j < len(code):
                after[i].append(j)
                before[j].append(i)

    def reach(start: Iterable[int], edges: list[list[int]]) -> set[int]:
        seen, border = set(start), list(start)
        while border:
            for j in edges[border.pop()]:
                if j not in seen:
                    seen.add(j)
                    border.append(j)
        return seen

    def block(i: int, step: int) -> int:
        """The first or the last instruction of the straight line that holds `i`."""
        forth, back = (after, before) if step > 0 else (before, after)
        while forth[i] == [i + step] and back[i + step] == [i]:
            i += step
        return i

    widest = max((one.stores for one in code), default=0)
    ends = reach([block(i, 1) for i, one in enumerate(code) if one.stores == widest], before)
    best: set[int] = set()
    for first in (i for i, one in enumerate(code) if one.loads >= 16):
        if first in best:
            continue
        path = reach([block(first, -1)], after) & ends
        best = max(best, path, key=lambda path: sum(code[i].loads for i in path))
    return [code[i] for i in sorted(best)]


def parse_sass(text: str) -> list[Instruction]:
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(@\S+ )? *([A-Z][\w.]*) *(.*?) *;", text)
    at = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    code = []
    for _, predicate, name, operands in lines:
        target, always = None, not predicate
        if name.startswith("BRA"):
            condition, _, address = operands.rpartition("0x")
            target, always = at[int(address, 16)], always and not condition
        ends = always and name.startswith(("BRA", "EXIT", "RET"))
        code.append(Instruction(name, operands, not ends, target))
    return code


def parse_amdgcn(text: str) -> list[Instruction]:
    lines, labels = [], {}
    for line in text.partition(".section\t.rodata")[0].splitlines():
        label = re.match(r"(\.LBB\w+):", line)
        if label:
            labels[label[1]] = len(lines)
        elif re.match(r"\t[a-z]", line):
            name, _, operands = line.partition(";")[0].strip().partition(" ")
            lines.append((name, operands.strip()))
    return [
        Instruction(
            name,
            operands,
            name not in ("s_branch", "s_endpgm"),
            labels[operands] if name.startswith(("s_branch", "s_cbranch")) else None,
        )
        for name, operands in lines
    ]
