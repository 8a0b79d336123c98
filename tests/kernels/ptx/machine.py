"""Executes a kernel's PTX on the CPU.

All threads of a launch are lanes of numpy arrays. Each has a program counter; the basic block that
comes first in the text runs next, for those lanes that are at it. Registers hold raw bits. What a
kernel must not do raises a `Fault` that names the instruction and the thread: an access outside a
buffer, misaligned, to read-only memory, or in a race with another thread; a register that is read
before it is written; a barrier that not all threads reach; and all that `meaning()` refuses.
"""

import re
from collections.abc import Callable

import numpy as np

from .arithmetic import TYPES, UINT, Fault, meaning
from .memory import Memory, Shared
from .program import Instruction, Program

PARAMS = 0x1000  # where the parameters begin in their own space
POISON = 0xDEADBEEFDEADBEEF  # in registers that are not written yet
POINTERS = re.compile(r"\[([%\w$.]+)(?:\+(-?\w+))?\]")


class Machine:
    """One launch."""

    def __init__(self, program: Program, memory: Memory, params: bytes, blocks: int,
                 shared: int = 0, first: int = 0, grid: int | None = None) -> None:  # fmt: skip
        if len(params) != program.params_size:
            raise ValueError(f"{len(params)} bytes of parameters, not {program.params_size}")
        self.program, self.memory = program, memory
        self.params = np.frombuffer(params, np.uint8)
        self.threads, self.grid = program.threads, grid or blocks
        self.lanes = blocks * self.threads
        lane = np.arange(self.lanes)
        self.block, self.tid = lane // self.threads, (lane % self.threads).astype(np.uint32)
        self.ctaid = (self.block + first).astype(np.uint32)
        self.who = (lane + first * self.threads + 1).astype(np.int32)
        self.shared = Shared(shared + program.shared_size, blocks)
        self.registers: dict[str, np.ndarray] = {}
        self.partly: dict[str, np.ndarray] = {}  # which lanes have written a register, if not all
        self.pc = np.zeros(self.lanes, np.int64)
        self.waiting = np.zeros(self.lanes, bool)

    def run(self) -> None:
        end = len(self.program.blocks)
        while True:
            ready = (self.pc < end) & ~self.waiting
            if not ready.any():
                if self.waiting.any():
                    raise Fault("threads wait at a barrier that others never reach")
                return
            block = int(self.pc[ready].min())
            here = ready & (self.pc == block)
            lanes = None if here.all() else np.flatnonzero(here)
            first, last = self.program.blocks[block]
            self.next(lanes, block + 1)
            for one in self.program.code[first:last]:
                self.step(one, lanes)
            self.release()

    def step(self, one: Instruction, lanes: np.ndarray | None) -> None:
        everyone = lanes
        one.reached += self.lanes if lanes is None else len(lanes)
        try:
            if one.guard:
                taken = self.read(one.guard, "pred", lanes) ^ one.negated
                if not taken.all():
                    lanes = np.flatnonzero(taken) if lanes is None else lanes[taken]
                    if not len(lanes):
                        return
            one.hits += self.lanes if lanes is None else len(lanes)
            if one.run is None:
                one.run = build(one)
            one.run(self, lanes)
        except Fault as fault:
            lanes = everyone if lanes is None else lanes
            where = ""
            if fault.lanes is not None:
                i = np.flatnonzero(fault.lanes)[0]
                lane = i if lanes is None else lanes[i]
                where = f" (thread {self.tid[lane]} of block {self.ctaid[lane]})"
            raise Fault(f"line {one.line}: {one.text}: {fault}{where}") from None

    def next(self, lanes: np.ndarray | None, block: int) -> None:
        self.pc[slice(None) if lanes is None else lanes] = block

    def release(self) -> None:
        """Lets a block continue once all of its threads wait at the same barrier."""
        if not self.waiting.any():
            return
        rows, pcs = (x.reshape(-1, self.threads) for x in (self.waiting, self.pc))
        done = rows.all(1) & (pcs == pcs[:, :1]).all(1)
        self.shared.epoch += done
        rows[done] = False

    def read(
        self, operand: str, kind: str, lanes: np.ndarray | None, wider: bool = False
    ) -> np.ndarray:
        dtype = TYPES[kind]
        if operand in ("%tid.x", "%ctaid.x", "%ntid.x", "%nctaid.x"):
            value = {"%tid.x": self.tid, "%ctaid.x": self.ctaid}.get(operand)
            if value is None:
                return np.array([self.threads if operand == "%ntid.x" else self.grid], np.uint32)
            return value if lanes is None else value[lanes]
        if operand[0] == "%" or operand in self.program.widths:
            if operand not in self.registers:
                raise Fault(f"{operand} is read before it is written")
            written = self.partly.get(operand)
            if written is not None:
                written = written if lanes is None else written[lanes]
                if not written.all():
                    raise Fault(f"{operand} is read before it is written", ~written)
            bits = self.registers[operand]
            bits = bits if lanes is None else bits[lanes]
            if bits.itemsize != dtype.itemsize:
                if not wider or bits.itemsize < dtype.itemsize:
                    raise Fault(f"{operand} does not have the size of {kind}")
                bits = bits.astype(UINT[8 * dtype.itemsize])
            return bits.view(dtype)
        return np.array([self.immediate(operand, dtype)]).view(dtype)

    def immediate(self, operand: str, dtype: np.dtype) -> np.generic:
        unsigned = UINT[8 * dtype.itemsize]
        if operand in self.program.params:
            return unsigned(PARAMS + self.program.params[operand][0])
        if operand == "global_smem":
            return unsigned(0)
        if operand in self.program.shared:
            return unsigned(self.program.shared[operand])
        if dtype.kind == "f" or operand[:2] in ("0f", "0d"):
            if operand[:2] != {4: "0f", 8: "0d"}[dtype.itemsize]:
                raise Fault(f"immediate {operand} does not have the size of its type")
            return unsigned(int(operand[2:], 16))
        return unsigned(int(operand.rstrip("U"), 0) & (1 << 8 * dtype.itemsize) - 1)

    def write(self, register: str, lanes: np.ndarray | None, value: np.ndarray) -> None:
        width = self.program.width(register)
        if width != 1 and value.itemsize * 8 != width:
            raise Fault(f"{register} does not have the size of its result")
        bits = value.view(UINT[width])
        if lanes is None:
            self.registers[register] = (
                np.broadcast_to(bits, self.lanes).copy() if len(bits) != self.lanes else bits
            )
            self.partly.pop(register, None)
            return
        if register not in self.registers:
            poison = np.uint64(POISON).astype(UINT[width])
            self.registers[register] = np.full(self.lanes, poison)
            self.partly[register] = np.zeros(self.lanes, bool)
        self.registers[register][lanes] = bits
        if register in self.partly:
            self.partly[register][lanes] = True

    def address(self, operand: str, kind: str, lanes: np.ndarray | None) -> np.ndarray:
        base, offset = POINTERS.fullmatch(operand).groups()
        address = self.read(base, kind, lanes)
        if offset and (offset := int(offset, 0)):
            address = address + address.dtype.type(offset & (1 << 8 * address.itemsize) - 1)
        return address


def vector(operand: str) -> list[str]:
    return operand.strip("{}").split(",")


def build(one: Instruction) -> Callable[[Machine, np.ndarray | None], None]:
    """The function that executes an instruction for some lanes, or for all (None)."""
    name, operands = one.name, one.operands
    count = lambda m, lanes: m.lanes if lanes is None else len(lanes)  # noqa: E731
    pick = lambda x, lanes: x if lanes is None else x[lanes]  # noqa: E731
    if name == "bra":
        if one.op not in ("bra", "bra.uni"):
            raise Fault("is not implemented")
        return lambda m, lanes: m.next(lanes, m.program.labels[operands[0]])
    if name == "ret":
        return lambda m, lanes: m.next(lanes, len(m.program.blocks))
    if one.op == "bar.sync":

        def wait(m: Machine, lanes: np.ndarray | None) -> None:
            m.waiting[slice(None) if lanes is None else lanes] = True

        return wait
    if name in ("shfl", "redux"):
        return across_warp(one)
    if name == "ldmatrix":
        return load_matrices(one)
    if name in ("ld", "st"):
        many, size, space = one.access
        kind = one.op.split(".")[-1]
        target, pointer = operands if name == "ld" else operands[::-1]

        def move(m: Machine, lanes: np.ndarray | None) -> None:
            n = count(m, lanes)
            address = m.address(pointer, "b32" if space == "shared" else "b64", lanes)
            address = np.broadcast_to(address, n)
            who, block = pick(m.who, lanes), pick(m.block, lanes)
            if name == "st":
                values = np.stack([np.broadcast_to(m.read(v, kind, lanes, wider=True), n)
                                   for v in vector(target)], 1).view(UINT[8 * size])  # fmt: skip
                if space == "shared":
                    m.shared.access(address, many, size, who, block, values)
                elif space == "param":
                    raise Fault("a store into the parameters")
                else:
                    m.memory.store(address, values, who)
                return
            if space == "shared":
                values = m.shared.access(address, many, size, who, block)
            elif space == "param":
                at = (address - np.uint64(PARAMS)).view(np.int64)
                wide = size * many
                if (bad := (at < 0) | (at + wide > len(m.params)) | (at % wide != 0)).any():
                    raise Fault("outside the parameters, or misaligned", bad)
                values = m.params[at[:, None] + np.arange(wide)].view(UINT[8 * size])
            else:
                values = m.memory.load(address, many, size, who, one.not_coherent)
            values = values.view(TYPES[kind])
            for i, register in enumerate(vector(target)):
                column = np.ascontiguousarray(values[:, i])
                wide = m.program.width(register) // 8
                if wide > size:  # a register may be wider than what it loads
                    column = column.astype(f"{'i' if kind[0] == 's' else 'u'}{wide}")
                m.write(register, lanes, column)

        return move
    if name == "mov" and "{" in "".join(operands):
        to, source = operands
        bits = 8 * TYPES[one.op.split(".")[-1]].itemsize
        parts = vector(to if to[0] == "{" else source)
        part = f"b{bits // len(parts)}"

        def unpack(m: Machine, lanes: np.ndarray | None) -> None:
            whole = np.broadcast_to(m.read(source, f"b{bits}", lanes), count(m, lanes))
            pieces = np.ascontiguousarray(whole).view(TYPES[part]).reshape(-1, len(parts))
            for i, register in enumerate(parts):
                if register != "_":
                    m.write(register, lanes, pieces[:, i].copy())

        def piece(m: Machine, register: str, lanes: np.ndarray | None) -> np.ndarray:
            # nvcc fills up what nothing uses with a register that the kernel never writes.
            if m.program.never_written(register):
                return np.array([POISON], np.uint64).astype(TYPES[part])
            return m.read(register, part, lanes)

        def pack(m: Machine, lanes: np.ndarray | None) -> None:
            pieces = [np.broadcast_to(piece(m, p, lanes), count(m, lanes)) for p in parts]
            m.write(to, lanes, np.stack(pieces, 1).view(TYPES[f"b{bits}"])[:, 0])

        return unpack if to[0] == "{" else pack
    result, kinds, function = meaning(one.op)
    if len(operands) != 1 + len(kinds):
        raise Fault(f"has {len(operands)} operands")

    def compute(m: Machine, lanes: np.ndarray | None) -> None:
        values = [m.read(o, k, lanes, wider=name == "cvt")
                  for o, k in zip(operands[1:], kinds, strict=True)]  # fmt: skip
        m.write(operands[0], lanes, np.asarray(function(*values)).astype(TYPES[result], copy=False))

    return compute


REDUCE = {"max": np.maximum, "min": np.minimum, "add": np.add, "and": np.bitwise_and,
          "or": np.bitwise_or, "xor": np.bitwise_xor}  # fmt: skip


def across_warp(one: Instruction) -> Callable[[Machine, np.ndarray | None], None]:
    """shfl.sync.bfly and redux.sync of whole warps."""
    target, source, *others = one.operands
    target, _, valid = target.partition("|")  # whether a shuffle's source lane is in range: always
    kind, mode = one.op.split(".")[-1], one.op.split(".")[-2]
    shuffles = one.op == "shfl.sync.bfly.b32"
    if not shuffles and (one.op != f"redux.sync.{mode}.{kind}" or mode not in REDUCE):
        raise Fault("is not implemented")

    def exchange(m: Machine, lanes: np.ndarray | None) -> None:
        need_whole_warps(m, lanes)
        if (m.read(others[-1], "u32", lanes) != 0xFFFFFFFF).any():
            raise Fault("is not for all threads of a warp")
        count = m.lanes if lanes is None else len(lanes)
        values = np.broadcast_to(m.read(source, kind, lanes), count).reshape(-1, 32)
        if shuffles:
            by, within = (m.read(operand, "u32", lanes) for operand in others[:2])
            if (within != 31).any() or (by != by[0]).any():
                raise Fault("is not implemented")
            values = values[:, np.arange(32) ^ int(by[0])]
        else:
            values = np.repeat(REDUCE[mode].reduce(values, axis=1), 32)
        m.write(target, lanes, np.ascontiguousarray(values).reshape(-1))
        if valid:
            m.write(valid, lanes, np.ones(count, bool))

    return exchange


def need_whole_warps(m: Machine, lanes: np.ndarray | None) -> None:
    here = np.zeros(m.lanes, bool)
    here[slice(None) if lanes is None else lanes] = True
    if (bad := here & ~here.reshape(-1, 32).all(1).repeat(32)).any():
        raise Fault("not all threads of the warp take part", bad[here])


def load_matrices(one: Instruction) -> Callable[[Machine, np.ndarray | None], None]:
    """ldmatrix of four 8x8 matrices of 16 bits: lane 8 i + k gives the address of row k of the
    i-th, and lane l gets the two elements from 2 (l % 4) of row l // 4 of each."""
    if one.op != "ldmatrix.sync.aligned.m8n8.x4.shared.b16":
        raise Fault("is not implemented")
    registers, pointer = vector(one.operands[0]), one.operands[1]

    def load(m: Machine, lanes: np.ndarray | None) -> None:
        need_whole_warps(m, lanes)
        who, block = (x if lanes is None else x[lanes] for x in (m.who, m.block))
        address = np.broadcast_to(m.address(pointer, "b32", lanes), len(who))
        rows = m.shared.access(address, 4, 4, who, block)  # 16 bytes
        matrices = rows.reshape(-1, 4, 8, 4)  # of a warp: matrices, rows, pairs of elements
        for i, register in enumerate(registers):
            m.write(register, lanes, np.ascontiguousarray(matrices[:, i]).reshape(-1))

    return load


def launch(program: Program, memory: Memory, params: bytes, blocks: int, shared: int = 0,
           at_once: int = 128) -> None:  # fmt: skip
    """Runs all blocks, `at_once` at a time; a race is one between any two threads of the launch."""
    memory.begin_launch()
    for first in range(0, blocks, at_once):
        some = min(at_once, blocks - first)
        Machine(program, memory, params, some, shared, first, blocks).run()
