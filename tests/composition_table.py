"""The table of compositions that `compositions` and its further files fill."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Composition:
    """One row: what is composed, and how it is trained.

    Attributes:
      methods: names of files in methods/.
      on: family and task.
      devices: how the step runs.
      slow: whether its methods are each in two other rows, too, and it is for `make test-all`.
      make: gives the arguments of `check_trains`.
    """

    methods: tuple[str, ...]
    on: str
    make: Callable[[], dict]
    devices: str = "one device"
    slow: bool = False

    @property
    def name(self):
        return f"{'+'.join(self.methods)} on {self.on}"


COMPOSITIONS = []


def composition(*methods, on, devices="one device", slow=False):
    """Adds a function's arguments of `check_trains` to the table."""

    def add(make):
        COMPOSITIONS.append(Composition(methods, on, make, devices, slow))
        return make

    return add
