"""Everything in which a checkpoint and a model differ, as one readable error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

INDEX = re.compile(r"(?<=[._/])\d+(?=[._/]|$)", re.ASCII)


@dataclass
class Mismatch:
    """Lists to fill while comparing; `raise_if_any` at the end.

    Attributes:
        layers: lines about different numbers of layers.
        unwritten: (path, missing tensors, other names that would do).
        shapes: lines about shapes.
        kinds: lines about integer and float.
        unread: names of tensors.
        without_rule: paths of parameters.
        without_param: templates of rules.
        twice: what two rules claim.
        useless_new: lines about patterns.
    """

    layers: list[str] = field(default_factory=list)
    unwritten: list[tuple[str, Sequence[str], Sequence[str]]] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    without_rule: list[str] = field(default_factory=list)
    without_param: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    useless_new: list[str] = field(default_factory=list)

    def raise_if_any(self) -> None:
        """Raises a ValueError with everything, if there is anything."""
        groups = [
            (
                "different numbers of layers",
                self.layers,
                "the number of layers in config.json must be the checkpoint's",
            ),
            (
                "parameters with no tensor in the checkpoint",
                self._missing(),
                'for parts to train from scratch say so: new=("head/",); otherwise load another '
                "head, or a checkpoint that has them",
            ),
            (
                "wrong shapes",
                self.shapes,
                "make config.json fit the checkpoint; for a head with other labels pass "
                'num_labels= and new=("head/",)',
            ),
            (
                "wrong kinds of number",
                self.kinds,
                "quantized checkpoints are not read: use the unquantized one",
            ),
            (
                "tensors that nothing reads",
                collapse(self.unread),
                "load the head that they belong to, or check that this is the right model_type",
            ),
            (
                "parameters without a rule",
                collapse(self.without_rule),
                "the family's table of rules lacks them",
            ),
            (
                "rules without a parameter",
                collapse(self.without_param),
                "the family's table of rules names parameters that the model lacks",
            ),
            (
                "claimed by two rules",
                collapse(self.twice),
                "the family's table of rules must name each once",
            ),
            (
                "patterns in new= that match no parameter",
                self.useless_new,
                "patterns are matched at the start of a path without its collection",
            ),
        ]
        lines = []
        for title, items, fix in groups:
            if items:
                lines.append(f"{title} ({fix}):")
                lines += [f"    {item}" for item in items]
        if lines:
            raise ValueError("the weights do not fit the model:\n  " + "\n  ".join(lines))

    def _missing(self) -> list[str]:
        lines = []
        for path, missing, others in self.unwritten:
            also = f" (or {', '.join(others)})" if others else ""
            lines.append(f"{path} needs {', '.join(collapse(missing))}{also}")
        return lines


def collapse(names: Iterable[str]) -> list[str]:
    """Names that differ in their first number as one: "layer.{3,4,5}.weight".

    >>> collapse(["layer.0.bias", "layer.1.bias", "head.bias"])
    ['layer.{0,1}.bias', 'head.bias']
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = INDEX.search(name)
        key = (name[: match.start()], name[match.end() :]) if match else (name, "")
        groups.setdefault(key, []).append(match[0] if match else "")
    result = []
    for (before, after), numbers in groups.items():
        middle = numbers[0] if len(numbers) == 1 else "{" + ",".join(numbers) + "}"
        result.append(before + middle + after if any(numbers) else before)
    return result
