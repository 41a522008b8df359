"""Counts the instructions of a Triton kernel in its machine code, without a GPU.

    python -m benchmarks.ops.instructions topk_logprobs
    python -m benchmarks.ops.instructions topk_logprobs --arch 80

Per kernel and signature: the instructions of a thread outside loops (in brackets those that a branch may leave out) and
of one turn of each loop, each with its barriers (b) and its exchanges between the threads of a warp (s: shuffles and
reductions), then the loads from global memory by their bits. A warp issues one instruction at a time, and barriers and
exchanges are waited for: with the number of turns this bounds the time of a kernel that memory does not bound. It
needs Triton and no GPU.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from .kernel_table import SHARED_LIMIT, build, disassembled, label, signatures

LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ +)?([A-Z]\S*)(.*);")
LABEL = re.compile(r"^(\.L_x?_?\w+):")
TARGET = re.compile(r"`\((\.L\w+)\)")
WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128)\b")


@dataclass
class Count:
    """Instructions of one thread, and those that wait for other threads."""

    instructions: int = 0
    barriers: int = 0
    exchanges: int = 0

    def __str__(self) -> str:
        return f"{self.instructions} ({self.barriers} b, {self.exchanges} s)"


@dataclass
class Counts:
    """One kernel: instructions outside loops, those of them that a branch may skip, one iteration of each loop, loads.

    A loop within a loop is counted with the outer one. `loads` has the number of loads from global memory by bits.
    """

    straight: Count = field(default_factory=Count)
    skippable: int = 0
    loops: list[Count] = field(default_factory=list)
    loads: Counter[int] = field(default_factory=Counter)


@dataclass
class _Block:
    """Instructions without a branch between them, and the blocks that follow."""

    names: list[str] = field(default_factory=list)
    loads: Counter[int] = field(default_factory=Counter)
    next: set[int] = field(default_factory=set)
    ends: bool = False


def count(text: str) -> Counts:
    """Counts the instructions of a disassembled kernel."""
    blocks = _blocks(text)
    reached = [_reached(blocks, i) for i in range(len(blocks))]
    counts, seen = Counts(), set()
    ends = {i for i, block in enumerate(blocks) if block.ends}
    for i, block in enumerate(blocks):
        if i and i not in reached[0]:
            continue  # padding behind the end
        counts.loads += block.loads
        if i in seen:
            continue
        loop = {j for j in reached[i] if i in reached[j]}
        seen |= loop
        if loop:
            counts.loops.append(_sum([blocks[j] for j in sorted(loop)]))
        else:
            _add(counts.straight, block)
            if i and (({0} | _reached(blocks, 0, without=i)) & ends):
                counts.skippable += len(block.names)
    return counts


def _blocks(text: str) -> list[_Block]:
    blocks, starts, jumps = [_Block()], {}, []
    for line in text.splitlines():
        if mark := LABEL.match(line):
            if blocks[-1].names:
                blocks[-1].next.add(len(blocks))
                blocks.append(_Block())
            starts[mark.group(1)] = len(blocks) - 1
        elif found := LINE.search(line):
            guard, name, rest = found.groups()
            if name == "NOP":
                continue
            block = blocks[-1]
            block.names.append(name)
            if name.startswith(("LDG", "LDGSTS")):
                width = WIDTH.search(name)
                block.loads[int(width.group(1).strip("US")) if width else 32] += 1
            block.ends |= name == "EXIT"
            target = TARGET.search(rest)
            if name.startswith("BRA") and target:
                jumps.append((len(blocks) - 1, target.group(1)))
            if name.startswith(("BRA", "EXIT")):
                # A predicate is before the instruction, or before its target.
                if guard or (target and re.search(r"U?P\d", rest[: target.start()])):
                    block.next.add(len(blocks))
                blocks.append(_Block())
    for i, target in jumps:
        blocks[i].next.add(starts[target])
    for block in blocks:
        block.next &= set(range(len(blocks)))
    return blocks


def _reached(blocks: list[_Block], start: int, without: int = -1) -> set[int]:
    """Blocks that can follow, at once or later."""
    found: set[int] = set()
    open_ = [start]
    while open_:
        fresh = blocks[open_.pop()].next - found - {without}
        found |= fresh
        open_ += fresh
    return found


def _add(total: Count, block: _Block) -> None:
    total.instructions += len(block.names)
    total.barriers += sum(name.startswith("BAR") for name in block.names)
    total.exchanges += sum(
        name.startswith(("SHFL", "REDUX", "CREDUX", "VOTE", "MATCH")) for name in block.names
    )


def _sum(blocks: list[_Block]) -> Count:
    total = Count()
    for block in blocks:
        _add(total, block)
    return total


def counts_of(op: str, kernel: str, signature: Mapping[str, str], arch: int) -> Counts:
    """Compiles one kernel and counts its instructions."""
    return count(disassembled("nvdisasm", "-c", build(op, kernel, signature, arch).asm["cubin"]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Instructions of the Triton kernels of an op.")
    parser.add_argument("op", choices=sorted({op for op, _, _ in signatures(90)}))
    parser.add_argument("--arch", type=int, choices=sorted(SHARED_LIMIT), default=90)
    arguments = parser.parse_args()
    for op, kernel, signature in signatures(arguments.arch):
        if op == arguments.op:
            counts = counts_of(op, kernel, signature, arguments.arch)
            loads = " ".join(f"{n}x{bits}" for bits, n in sorted(counts.loads.items()))
            loops = ", ".join(map(str, counts.loops))
            print(f"{kernel} {label(signature)}")
            print(f"    {counts.straight} [{counts.skippable}]  loops: {loops}  loads: {loads}")


if __name__ == "__main__":
    main()
