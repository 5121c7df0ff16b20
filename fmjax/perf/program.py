"""What a compiled program does, read from its text: bytes it moves, and what chips tell each other.

`compiled.cost_analysis()` counts the body of a loop once, and not every backend has it. The text
has everything: each instruction with its shapes, and how often loops run.

A kernel reads its operands from memory and writes its results there. Of a stack of layers it reads
the slice that it uses, and an update in place writes what it updates. What a TPU keeps in its
vector memory is not counted; neither is a cache that a GPU may find a buffer in, so that traffic on
a GPU can be smaller than what is counted here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# What makes no array: names, views, and calls, whose callees are counted themselves.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all while conditional call "
    "async-start async-update async-done partition-id replica-id optimization-barrier "
    "add-dependency domain".split()
)
_SLICES = ("dynamic-slice", "slice", "gather")
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]+[0-9a-z]*)\[([0-9,<=]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


class Collective(NamedTuple):
    """The collectives of one kind over groups of one size, in one run of the program.

    Args:
        kind: of `KINDS`.
        group: chips that take part in each.
        count: how many run.
        payload: bytes together of what they reduce, gather or exchange, whole, as one group has it.
        sent: the fewest bytes that a chip must send for them, by rings.
    """

    kind: str
    group: int
    count: int
    payload: int
    sent: int


class Traffic(NamedTuple):
    """What one run of the program does on one chip.

    Args:
        moved: bytes that kernels read from and write to memory.
        collectives: by kind and group, the most talkative first.
        unknown_loops: loops whose number of turns the text does not say; counted as one turn.
    """

    moved: int
    collectives: tuple[Collective, ...]
    unknown_loops: int

    @property
    def sent(self) -> int:
        """Bytes that a chip sends to others."""
        return sum(one.sent for one in self.collectives)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    def called(self, key: str) -> list[str]:
        """Computations that the attribute names."""
        found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest)
        return re.findall(r"[\w.\-]+", found[1]) if found else []


_Computation = dict[str, _Instruction]


def read_program(text: str, chips: int) -> Traffic:
    """What a compiled program does.

    Args:
        text: ``compiled.as_text()``.
        chips: that the program runs on.

    Raises:
        ValueError: the text has no entry: it is not that of a compiled program.
    """
    computations, entry = _parse(text)
    if entry is None:
        raise ValueError("the text has no ENTRY computation; give compiled.as_text()")
    moved, unknown = 0, 0
    found: dict[tuple[str, int], list[int]] = {}
    seen: set[str] = set()
    for name, times, kernel, known in _runs(computations, entry):
        unknown += not known
        inside = computations[name]
        for one in inside.values():
            kind = one.op.removesuffix("-start")
            if kind in KINDS:
                # A TPU begins, joins and ends one collective in three kernels, by one channel.
                channel = re.search(r"\bchannel_id=(\d+)", one.rest)
                if channel is not None and channel[1] in seen:
                    continue
                seen.update(() if channel is None else (channel[1],))
                if kind == "all-reduce" and "all-reduce-scatter" in name:
                    kind = "reduce-scatter"
                group, payload = _group(one, chips), _payload(one, inside)
                if group > 1:
                    sums = found.setdefault((kind, group), [0, 0])
                    sums[0] += times
                    sums[1] += times * payload
            if not kernel:
                moved += times * _moved(one, inside, computations)
    collectives = [
        Collective(kind, group, count, payload, _sent(kind, group, payload))
        for (kind, group), (count, payload) in found.items()
    ]
    collectives.sort(key=lambda one: -one.sent)
    return Traffic(moved, tuple(collectives), unknown)


def _parse(text: str) -> tuple[dict[str, _Computation], str | None]:
    computations: dict[str, _Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        if not line.startswith(" "):
            header = _HEADER.match(line)
            current = None if header is None else computations.setdefault(header[2], {})
            if header is not None and header[1]:
                entry = header[2]
        elif current is not None and (match := _LINE.match(line)):
            shape, rest = _cut_shape(match[3])
            op, _, rest = rest.partition("(")
            inner, rest = _cut_brackets("(" + rest)
            current[match[2]] = _Instruction(
                match[2], shape, op, tuple(_NAME.findall(inner)), inner + rest, bool(match[1])
            )
    return computations, entry


def _cut_shape(text: str) -> tuple[str, str]:
    """A shape, which is one word or a tuple in brackets, and what follows."""
    if text.startswith("("):
        shape, rest = _cut_brackets(text)
        return shape, rest.lstrip()
    shape, _, rest = text.partition(" ")
    return shape, rest


def _cut_brackets(text: str) -> tuple[str, str]:
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    return text, ""


def _runs(
    computations: dict[str, _Computation], entry: str
) -> Iterator[tuple[str, int, bool, bool]]:
    """Each computation that runs: its name, how often, whether inside a kernel, and whether the
    number of its turns is known."""
    pending = [(entry, 1, False, True)]
    while pending:
        name, times, kernel, known = pending.pop()
        yield name, times, kernel, known
        for one in computations[name].values():
            if one.op == "while":
                turns = _turns(one, computations)
                for body in one.called("body"):
                    pending.append((body, times * (turns or 1), kernel, turns is not None))
            elif one.op == "conditional":
                branches = one.called("branch_computations") or [
                    *one.called("true_computation"), *one.called("false_computation"),
                ]  # fmt: skip
                # One of them runs; as FLOPs are counted, the one that does the most.
                sizes = {branch: len(computations[branch]) for branch in branches}
                pending.append((max(sizes, key=lambda key: sizes[key]), times, kernel, True))
            elif one.op == "call":
                pending += [(callee, times, kernel, True) for callee in one.called("to_apply")]
            elif one.op in ("fusion", "async-start"):
                inner = kernel or one.op == "fusion"
                pending += [(callee, times, inner, True) for callee in one.called("calls")]


def _turns(loop: _Instruction, computations: dict[str, _Computation]) -> int | None:
    """How often a loop runs: as the compiler notes, or as its condition, which counts from 0."""
    if noted := re.search(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)', loop.rest):
        return int(noted[1])
    bounds: list[int] = []
    compares = 0
    names = loop.called("condition")
    while names:
        for one in computations[names.pop()].values():
            names += one.called("calls") if one.op == "fusion" else []
            compares += one.op == "compare" and "direction=LT" in one.rest
            if one.op == "constant" and (number := re.match(r"\((\d+)\)", one.rest)):
                bounds.append(int(number[1]))
    return bounds[0] if compares == 1 and len(bounds) == 1 else None


def _arrays(shape: str) -> list[tuple[int, bool]]:
    """Bytes of each array of a shape, and whether it lies in the chip's main memory."""
    found = []
    for kind, sizes, layout in _ARRAY.findall(shape):
        digits = re.search(r"\d+", kind)
        bits = _BITS[kind] if kind in _BITS else int(digits[0]) if digits else 0
        numbers = math.prod(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        space = re.search(r"S\((\d+)\)", layout)
        found.append((-(-numbers * bits // 8), space is None or space[1] == "0"))
    return found


def _in_memory(shape: str) -> int:
    return sum(size for size, there in _arrays(shape) if there)


def _whole(shape: str) -> int:
    return sum(size for size, _ in _arrays(shape))


def _moved(one: _Instruction, inside: _Computation, computations: dict[str, _Computation]) -> int:
    """Bytes that an instruction outside of any kernel reads and writes."""
    op = one.op
    if op in _FREE:
        return 0
    operands = [inside[name].shape for name in one.operands if name in inside]
    if op.endswith("-done"):
        return _in_memory(one.shape)
    if op.endswith("-start"):  # its results are those of the operation that ends it
        return sum(map(_in_memory, operands))
    if op in _SLICES:
        return 2 * _in_memory(one.shape)
    if op == "dynamic-update-slice":
        return 2 * _in_memory(operands[1])
    if op == "fusion":
        (name,) = one.called("calls")
        callee = computations[name]
        root = next(inner for inner in callee.values() if inner.root)
        # Of a TPU's collective in three kernels the first reads and the last writes.
        if "AsyncCollectiveDone" in root.rest:
            return _in_memory(one.shape)
        if name.startswith("async_collective_fusion"):
            callee = {key: inner for key, inner in callee.items() if inner.op not in KINDS}
        reads = sum(
            min(_in_memory(shape), _read(callee, number, computations))
            for number, shape in enumerate(operands)
        )
        if "AsyncCollectiveStart" in root.rest:
            return reads
        return reads + _written(callee, root, one.shape)
    if op == "custom-call":
        # What follows the results of a library's call is its scratch memory.
        results = re.sub(r"(, (/\*index=\d+\*/)?[su]8\[\d+\](\{[^}]*\})?)+\)$", ")", one.shape)
        return sum(map(_in_memory, operands)) + _in_memory(results)
    return sum(map(_in_memory, operands)) + _in_memory(one.shape)


def _read(callee: _Computation, number: int, computations: dict[str, _Computation]) -> int:
    """Bytes that a kernel reads of its operand of this number."""
    parameter = next(
        one
        for one in callee.values()
        if one.op == "parameter" and one.rest.startswith(f"({number})")
    )
    return _used(parameter, callee, computations, cut=False)


def _used(
    one: _Instruction, callee: _Computation, computations: dict[str, _Computation], *, cut: bool
) -> int:
    """Bytes that a kernel reads of an operand, or of what is `cut` out of one."""
    if cut and (one.root or one.op == "gather"):
        return _whole(one.shape)
    total = 0
    for user in callee.values():
        for place, operand in enumerate(user.operands):
            if operand != one.name:
                continue
            if user.op == "bitcast":
                total += _used(user, callee, computations, cut=cut)
            elif user.op in _SLICES and place == 0:
                total += _used(user, callee, computations, cut=True)
            elif user.op == "fusion":
                total += _read(computations[user.called("calls")[0]], place, computations)
            elif not cut and (
                user.op == "tuple" or (user.op == "dynamic-update-slice" and place == 0)
            ):
                continue  # passed on, or updated where it is
            else:
                return _whole(one.shape)
    return min(total, _whole(one.shape))


def _written(callee: _Computation, root: _Instruction, shape: str) -> int:
    """Bytes that a kernel writes."""
    results = [root] if root.op != "tuple" else [callee.get(name) for name in root.operands]
    arrays = _arrays(shape)
    if len(results) != len(arrays):
        return _in_memory(shape)
    total = 0
    for result, (size, there) in zip(results, arrays, strict=True):
        while result is not None and result.op == "bitcast" and result.operands[0] in callee:
            result = callee[result.operands[0]]
        if result is None or not there or (result.op == "parameter" and root.op == "tuple"):
            continue
        if result.op == "dynamic-update-slice":
            size = min(size, _whole(callee[result.operands[1]].shape))
        total += size
    return total


def _group(one: _Instruction, chips: int) -> int:
    """How many chips take part together."""
    if one.op.startswith("collective-permute"):
        return 2 if re.search(r"source_target_pairs=\{\{", one.rest) else 1
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", one.rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if regular := re.search(r"replica_groups=\[(\d+),(\d+)\]", one.rest):
        return int(regular[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", one.rest):
        return listed[1].count(",") + 1
    return chips


def _payload(one: _Instruction, inside: _Computation) -> int:
    """Bytes of the whole: of what is reduced or exchanged its operands, gathered, its result."""
    operands = sum(_whole(inside[name].shape) for name in one.operands if name in inside)
    if not one.op.startswith("all-gather"):
        return operands
    return _whole(one.shape) - (operands if one.op.endswith("-start") else 0)


def _sent(kind: str, group: int, payload: int) -> int:
    """The fewest bytes a chip sends: a ring passes each part on to all but one."""
    if kind == "collective-permute":
        return payload
    rounds = 2 if kind == "all-reduce" else 1
    return rounds * payload * (group - 1) // group
