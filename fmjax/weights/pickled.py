"""A pickle interpreter that can build weights and nothing else.

It knows the opcodes that PyTorch's writers emit and builds only dicts, lists, tuples, strings,
numbers and the caller's own objects. A global is a name, never an import; calling one asks the
caller. Every other opcode is refused, so no file can run code, and as each opcode makes at most
one object of at most its own length, none can claim more memory than a multiple of its size.
https://docs.python.org/3/library/pickletools.html
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

MAX_PICKLE = 64 * 2**20  # the structure alone; 100,000 tensors take about 20 MB
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINSTRING", "SHORT_BINSTRING", "INT", "LONG"),
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Global:
    """A name that a pickle refers to; it is compared, never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class _Mark:
    pass


def load_pickle(
    stream: IO[bytes] | Any,
    *,
    allowed: frozenset[Global],
    call: Callable[[Global, tuple], object],
    persistent: Callable[[object], object],
    where: str,
) -> object:
    """What a pickle describes; the stream is left behind its end.

    Args:
        stream: with read, readline and tell.
        allowed: the globals it may name.
        call: gives the result of calling one of them with arguments.
        persistent: gives the object of a persistent id.
        where: the file, for errors.

    Raises:
        ValueError: a global outside `allowed`, an opcode that weights do not need, or a pickle
            that is truncated or makes no sense.
    """
    machine = _Machine(allowed, call, persistent, where)
    begin = stream.tell()
    try:
        for opcode, argument, position in pickletools.genops(stream):
            if opcode.name == "STOP":
                return machine.pop()
            if position is not None and position - begin > MAX_PICKLE:
                raise ValueError(f"its structure is larger than {MAX_PICKLE} bytes")
            machine.step(opcode.name, argument)
    except ValueError as error:
        raise ValueError(f"{where}: the pickle in it is refused: {error}") from error
    raise ValueError(f"{where}: the pickle in it does not end")


class _Machine:
    def __init__(
        self,
        allowed: frozenset[Global],
        call: Callable[[Global, tuple], object],
        persistent: Callable[[object], object],
        where: str,
    ) -> None:
        self.allowed, self.call, self.persistent, self.where = allowed, call, persistent, where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}  # a dict: a memo index of 2**31 costs one entry

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("it takes from an empty stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while not isinstance(item := self.pop(), _Mark):
            items.append(item)
        return items[::-1]

    def top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise ValueError(f"it fills something that is no {kind.__name__}")
        return self.stack[-1]

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            if not stack:
                raise ValueError("it remembers what is not there")
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                raise ValueError(f"it recalls memo {argument}, which was never set")
            stack.append(self.memo[argument])
        elif name == "MARK":
            stack.append(_Mark())
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name == "TUPLE":
            stack.append(tuple(self.pop_to_mark()))
        elif name in TUPLES:
            items = [self.pop() for _ in range(TUPLES[name])]
            stack.append(tuple(reversed(items)))
        elif name in ("APPEND", "APPENDS"):
            items = [self.pop()] if name == "APPEND" else self.pop_to_mark()
            self.top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self.pop_to_mark()
            self.set_items(items)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(self.find(name, argument))
        elif name == "REDUCE":
            arguments, function = self.pop(), self.pop()
            if not isinstance(function, Global) or not isinstance(arguments, tuple):
                raise ValueError("it calls something that is no function")
            stack.append(self.call(function, arguments))
        elif name == "BUILD":
            # Attributes of an OrderedDict: `_metadata`, the versions of a state dict's modules.
            self.pop()
            self.top(dict)
        elif name == "BINPERSID":
            stack.append(self.persistent(self.pop()))
        else:
            shown = f" {argument!r}" if isinstance(argument, str) else ""
            raise ValueError(f"it uses the opcode {name}{shown}, which weights do not need")

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise ValueError("it gives a dict a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Only these: hashing a tuple nested a million deep would overflow the C stack.
            if type(key) not in (str, int):
                raise ValueError(f"it has a dict key of type {type(key).__name__}")
            target[key] = value

    def find(self, name: str, argument: Any) -> Global:
        if name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
        else:
            attribute, module = self.pop(), self.pop()
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise ValueError("it names a global by something that is no string")
        found = Global(module, attribute)
        if found not in self.allowed:
            raise ValueError(
                f"it asks for {str(found)[:200]!r}, which weights do not need and which may run "
                "code. If you trust the file, re-save its state dict as safetensors with PyTorch"
            )
        return found
