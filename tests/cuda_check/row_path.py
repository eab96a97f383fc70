"""Counts what one row of logits costs a thread, from a kernel's machine code."""

import re
from typing import NamedTuple

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
_ADDRESS = re.compile(r"0x([0-9a-f]+)\s*$")


class Row(NamedTuple):
    """What the path of an ordinary row has, and barriers and fences of the whole loop over rows.

    An ordinary row counts, is aligned, and has no cross-entropy. Of the warps it is one that merges
    no sums and looks up no row. A loop within that over rows is counted once or not at all, and its
    accesses of 16 bytes are not.
    """

    instructions: int
    classes: int
    accesses: int
    barriers: int = 0
    fences: int = 0


class Block(NamedTuple):
    """Instructions that run one after the other: only the last may branch, only the first is
    branched to."""

    instructions: list[str]
    following: list[int]  # the numbers of the blocks that may be next

    def count(self, *names: str) -> int:
        return sum(one.startswith(names) for one in self.instructions)

    @property
    def exponentials(self) -> int:
        return self.count("MUFU.EX2")

    @property
    def accesses(self) -> int:
        """Of 16 bytes of global memory."""
        return sum(bool(re.match(r"(LDG|LDGSTS|STG)\..*\b128", one)) for one in self.instructions)


def row(code: str) -> Row:
    """Of a kernel of logits, in the listing of `cuobjdump -sass`.

    The path goes once around the loop over rows, or once through a kernel that has no such loop. It
    contains the densest block of exponentials, which are a thread's classes unrolled. Of all such
    paths that only go forward it is one with the most accesses of 16 bytes, which are whole vectors
    fetched and written, and of these the shortest. A class takes two exponentials.
    """
    blocks = _blocks(code)
    reached = _reached(blocks)
    densest = max(reached, key=lambda i: blocks[i].exponentials)
    begin, ends = _loop(blocks, reached, densest)
    inside = [i for i in reached if begin <= i <= max(ends, default=0)]
    rolled = {
        i
        for end in inside
        for start in blocks[end].following
        if begin < start <= end
        for i in range(start, end + 1)
    }

    def accesses(path: list[int]) -> int:
        return sum(blocks[i].accesses for i in path if i not in rolled)

    def length(path: list[int]) -> int:
        return sum(len(blocks[i].instructions) for i in path)

    def merit(path: list[int]) -> tuple[bool, int, int]:
        return densest in path, accesses(path), -length(path)

    paths: dict[int, list[int]] = {}  # to the end
    for i in reversed(inside):
        rest = [paths[n] for n in blocks[i].following if n > i and n in paths]
        if i in ends:
            rest.append([])
        if rest:
            paths[i] = [i, *max(rest, key=merit)]
    path = paths.get(begin, [])
    if densest not in path or not blocks[densest].exponentials:
        raise ValueError("there is no path through the exponentials of a row")
    has_loop = begin in blocks[max(ends)].following
    loop = [blocks[i] for i in inside] if has_loop else []
    return Row(
        instructions=length(path),
        classes=sum(blocks[i].exponentials for i in path) // 2,
        accesses=accesses(path),
        barriers=sum(block.count("BAR.", "UCGABAR") for block in loop),
        fences=sum(block.count("MEMBAR") for block in loop),
    )


def _blocks(code: str) -> list[Block]:
    instructions = [
        (int(address, 16), predicate, name, operands.strip())
        for address, predicate, name, operands in _INSTRUCTION.findall(code)
    ]
    numbers = {address: i for i, (address, *_) in enumerate(instructions)}
    begins, following = {0}, {}
    for i, (_, predicate, name, operands) in enumerate(instructions):
        kind = name.split(".")[0]
        # A call with a predicate does not come back: so compute capability 8 leaves a loop.
        branches = kind == "BRA" or (kind == "CALL" and predicate)
        if not branches and kind not in ("EXIT", "RET", "BRX", "JMP"):
            continue
        target = _ADDRESS.search(operands) if branches else None
        # A warp that diverged before a shuffle is rare, and its way back is no loop.
        after = [numbers[int(target[1], 16)]] if target and ".DIV" not in name else []
        if predicate or (branches and not _ADDRESS.match(operands)):
            after.append(i + 1)
        following[i] = after
        begins.update((*after, i + 1))
    starts = sorted(begin for begin in begins if begin < len(instructions))
    block_of = {start: i for i, start in enumerate(starts)}
    return [
        Block(
            [name for _, _, name, _ in instructions[start:end]],
            [block_of[n] for n in following.get(end - 1, [end]) if n in block_of],
        )
        for start, end in zip(starts, [*starts[1:], len(instructions)], strict=True)
    ]


def _reached(blocks: list[Block]) -> list[int]:
    found, left = {0}, [0]
    while left:
        new = set(blocks[left.pop()].following) - found
        found |= new
        left += new
    return sorted(found)


def _loop(blocks: list[Block], reached: list[int], inside: int) -> tuple[int, set[int]]:
    """The first block of the innermost loop around one, and those that go back to it; without such
    a loop, of the kernel."""
    begins = [start for i in reached for start in blocks[i].following if start <= inside <= i]
    if not begins:
        return 0, {i for i in reached if blocks[i].instructions[-1] == "EXIT"}
    begin = max(begins)
    return begin, {i for i in reached if i >= inside and begin in blocks[i].following}
