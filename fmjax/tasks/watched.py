"""A task's loss around a stand-in for its model that remembers what it was given and what it gave.

So a method reads hidden states or logits of the very pass that the loss is of: there is no second
one, and dropout, masks and running statistics are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jax import Array

from fmjax.tree import flatten
from fmjax.types import Output, Variables


class Passed(NamedTuple):
    """A full pass of the model: what it was given and what it gave."""

    inputs: dict[str, Any]
    flags: dict[str, Any]
    output: Output
    values: Mapping[str, Array]


class Watched:
    """A model for one trace of a task's loss, that remembers its full pass."""

    def __init__(self, model: Any, asks: Mapping[str, bool], values: bool = False) -> None:
        self.config, self.head = model.config, model.head
        self._model, self._asks, self._values = model, asks, values
        self._passes: list[Passed] = []

    def apply(self, variables: Variables, *args: Any, **options: Any) -> Any:
        """As the model's."""
        if "method" in options:
            return self._model.apply(variables, *args, **options)
        how = {name: options.pop(name) for name in ("train", "rngs", "mutable")}
        flags = {name: value for name, value in options.items() if name.startswith("output_")}
        inputs = {name: value for name, value in options.items() if name not in flags}
        flags |= self._asks
        found, updates = run(self._model, variables, inputs, flags, self._values, **how)
        output, made = found
        self._passes.append(Passed(inputs, flags, output, made))
        return output, updates

    def passed(self) -> Passed:
        """The one pass.

        Raises:
            ValueError: there was none, or there were several.
        """
        if len(self._passes) != 1:
            raise ValueError(
                f"the task's loss ran the model {len(self._passes)} times; what the model gives is "
                "read in tasks that run it once"
            )
        return self._passes[0]


def run(
    model: Any,
    variables: Variables,
    inputs: dict[str, Any],
    flags: dict[str, Any],
    values: bool,
    *,
    mutable: list[str],
    **how: Any,
) -> tuple[tuple[Output, dict[str, Array]], Variables]:
    """((output, values of attention by path), updates)."""
    watching: dict[str, Any] = {}
    if values:
        mutable = [*mutable, "intermediates"]
        watching["capture_intermediates"] = lambda module, _: module.name == "value"
    output, updates = model.apply(variables, **inputs, **flags, **how, **watching, mutable=mutable)
    updates = dict(updates)
    made = flatten(updates.pop("intermediates", {}))
    return (output, {path: calls[0] for path, calls in made.items()}), updates
