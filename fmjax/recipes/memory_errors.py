"""A train step that finds no room: what fills the device, and the cheapest ways to make it fit.

Nothing is asked of a step that fits: when one is refused (by the compiler, or by the allocator when
it runs), it is compiled once more to see what it holds, and the ways out are reckoned from that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax

from fmjax.perf.device import device_memory
from fmjax.perf.memory import CLASSES, MemoryUse, bytes_per_chip, memory_use, state_bytes
from fmjax.train import is_param
from fmjax.train.compile import lower_step
from fmjax.train.moments import Moments
from fmjax.tree import flatten, is_stacked
from fmjax.types import Remat, StepFn, TrainState

WAYS = 3
"""How many ways to fit an error names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """How a step was set up, as far as its memory goes.

    Args:
        batch_size: B, over all devices.
        microbatches: pieces it is computed in.
        remat: what is recomputed in the backward pass.
        scan: whether layers are scanned.
        precision: of the computation.
        optimizer: its name in the recipes.
        moments: its moments' dtype.
        parts: that the state is divided into; 1 is whole on each device.
        rows: parts that a batch's rows are divided into.
        devices: how many there are.
    """

    batch_size: int
    microbatches: int
    remat: Remat
    scan: bool
    precision: Literal["float32", "bfloat16"]
    optimizer: str
    moments: Moments
    parts: int
    rows: int
    devices: int


class Way(NamedTuple):
    """A way to need less.

    Args:
        setting: as the recipes take it.
        price: what it costs beside.
        after: what the step then needs, of what it needs now.
    """

    setting: str
    price: str
    after: Callable[[MemoryUse], MemoryUse]


def ways(setup: Setup, layers: int, boundaries: int) -> list[Way]:
    """What could be set otherwise, the cheapest first.

    Args:
        setup: as it is.
        layers: L of the model.
        boundaries: bytes, on a device, of what goes from one layer into the next, all layers
            together: what stays where layers are recomputed. 0 if that is not known.
    """
    found = []
    if setup.precision == "float32":
        found.append(
            Way(
                "precision=bfloat16",
                "faster on most hardware, results in fewer digits",
                # Norms, softmax and losses stay in float32: a BERT's activations took 0.72 of what
                # they had. Beside the masters there is a copy in half the bytes.
                lambda use: use._replace(
                    activations=use.activations * 7 // 10 + use.parameters // 2
                ),
            )
        )
    more = 2 * setup.microbatches
    while more * setup.rows <= setup.batch_size:
        if setup.batch_size % (more * setup.rows) == 0:
            found.append(_in_pieces(setup, more))
        more *= 2
    spare = setup.devices // setup.parts
    if spare > 1:
        found.append(
            Way(
                f"mesh=fsdp={setup.devices}",
                "devices send each other parameters and gradients",
                lambda use: use._replace(
                    parameters=use.parameters // spare,
                    optimizer=use.optimizer // spare,
                    gradients=use.gradients // spare,
                ),
            )
        )
    if setup.remat == "none" and layers > 1 and boundaries:
        found.append(
            Way(
                # A loop of layers is no loop to XLA, which on CPUs keeps all of them alive.
                "remat=block" if setup.scan else "remat=block, scan=True",
                "layers are computed twice, about a third more work",
                lambda use: use._replace(
                    activations=min(use.activations, use.activations // layers + boundaries)
                ),
            )
        )
    if setup.moments == "float32" and setup.optimizer != "adafactor":
        found.append(
            Way(
                "moments=bfloat16",
                "moments rounded at random to 8 bits",
                lambda use: use._replace(optimizer=use.optimizer // 2),
            )
        )
    if setup.optimizer in ("adamw", "lamb"):
        found.append(
            Way(
                "optimizer=lion",
                "one moment in place of two; wants a learning rate a third to a tenth of AdamW's",
                lambda use: use._replace(optimizer=use.optimizer // 2),
            )
        )
    if setup.batch_size % (2 * setup.microbatches * setup.rows) == 0:
        found.append(
            Way(
                f"batch_size={setup.batch_size // 2}",
                "another run: noisier gradients, more steps",
                lambda use: use._replace(activations=use.activations // 2),
            )
        )
    found.append(
        Way(
            "low-rank adapters (fmjax.methods.lora)",
            "the weights themselves stay as they are",
            lambda use: use._replace(optimizer=use.optimizer // 50, gradients=use.gradients // 50),
        )
    )
    return found


def _in_pieces(setup: Setup, microbatches: int) -> Way:
    # The first split keeps a sum beside each piece's gradient.
    sums = 1 if setup.microbatches == 1 else 0
    return Way(
        f"microbatches={microbatches}",
        "the same gradient in smaller pieces, slower where they leave the device idle",
        lambda use: use._replace(
            gradients=use.gradients * (1 + sums),
            activations=use.activations * setup.microbatches // microbatches,
        ),
    )


def cheapest(found: list[Way], use: MemoryUse, limit: float) -> list[tuple[Way, int, bool]]:
    """Three ways, what a device needs by each, and whether that fits.

    Those that fit come first, the cheapest before the others; of several numbers of pieces the
    first that fits counts. If too few fit, those follow that need least, by themselves.

    Args:
        found: from `ways`.
        use: what is needed now.
        limit: bytes of a device.
    """
    needs = [(way, way.after(use).total) for way in found]
    needs = [(way, need) for way, need in needs if need < use.total]
    fitting, kinds = [], set()
    for way, need in needs:
        kind = way.setting.partition("=")[0]
        if need <= limit and kind not in kinds:
            fitting.append((way, need, True))
            kinds.add(kind)
    for way, need in sorted(needs, key=lambda pair: pair[1]):
        kind = way.setting.partition("=")[0]
        if kind not in kinds:
            fitting.append((way, need, False))
            kinds.add(kind)
    return fitting[:WAYS]


def explanation(
    error: str, use: MemoryUse, *, limit: float, setup: Setup, layers: int, boundaries: int
) -> str:
    """The message: what was refused, what fills a device, how it would fit.

    Args:
        error: what XLA said.
        use: by class; see `fmjax.perf.memory.MemoryUse`.
        limit: bytes of a device.
        setup, layers, boundaries: see `ways`.
    """
    fits = use.total <= limit
    what = "the run found no room beside its train step" if fits else "the train step does not fit"
    lines = [
        f"{what} in the memory of the device: {error.splitlines()[0][:300]}",
        f"of {limit / 1e9:.2f} GB on a device the step needs {use.total / 1e9:.2f} GB:",
        *(
            f"  {CLASSES[name]}: {size / 1e9:.2f} GB"
            for name, size in sorted(use._asdict().items(), key=lambda item: -item[1])
        ),
    ]
    if fits:
        lines.append(
            "which fits alone: evaluations, or other processes, hold the rest; evaluate on shorter "
            "or fewer examples at a time, or end those processes"
        )
        return "\n".join(lines)
    lines.append("the cheapest ways to need less (reckoned by size):")
    chosen = cheapest(ways(setup, layers, boundaries), use, limit)
    for way, need, fits in chosen:
        enough = "" if fits else ", which alone is not enough"
        lines.append(f"  {way.setting}: about {need / 1e9:.2f} GB{enough} ({way.price})")
    if chosen and not any(fits for _, _, fits in chosen):
        together = use
        for way, _, _ in chosen:
            together = way.after(together)
        lines.append(f"  all of them: about {together.total / 1e9:.2f} GB")
        if together.total > limit:
            lines[-1] += ", still too much: shorter examples, a smaller model or more devices"
    return "\n".join(lines)


class Watched:
    """A step as `explained` watches it: called as it is, and its last batch is known.

    Args:
        run: the compiled step.
    """

    def __init__(self, run: StepFn) -> None:
        self.run = run
        self.batch: Any = None

    def __call__(self, state: TrainState, batch: Any) -> Any:
        """The step; shapes of its batch are kept."""
        self.batch = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in batch.items()
        }
        return self.run(state, batch)


@contextlib.contextmanager
def explained(
    watched: Watched, step: StepFn, abstract: TrainState, setup: Setup, mesh: Any, places: Any
) -> Iterator[None]:
    """Where XLA finds no memory for the watched step in the ``with`` block, says why and what then.

    Args:
        watched: the compiled step.
        step: what was compiled.
        abstract: the state, with its shardings if it has some.
        setup: of the step.
        mesh, places: as `fmjax.train.jit_step` was given them.

    Raises:
        MemoryError: in the place of JAX's own error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or watched.batch is None:
            raise
        rows = jax.process_count()  # of which each gives its own
        batch = {
            name: jax.ShapeDtypeStruct((rows * leaf.shape[0], *leaf.shape[1:]), leaf.dtype)
            for name, leaf in watched.batch.items()
        }
        use = _use_of(str(error), step, abstract, batch, mesh, places)
        layers, boundaries = _layers_of(abstract, batch, setup, mesh)
        text = explanation(
            str(error), use, limit=device_memory(), setup=setup, layers=layers,
            boundaries=boundaries,
        )  # fmt: skip
        raise MemoryError(text) from error


def _use_of(
    error: str, step: StepFn, abstract: TrainState, batch: Any, mesh: Any, places: Any
) -> MemoryUse:
    if jax.process_count() == 1:  # compilers of several may wait for each other
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the compiler may refuse it too
            compiled = lower_step(step, abstract, batch, mesh, state_shardings=places).compile()
            return memory_use(compiled, abstract)
    parameters, optimizer = state_bytes(abstract)
    gradients = bytes_per_chip(abstract.trainable)
    wanted = said_bytes(error)
    return MemoryUse(
        parameters, optimizer, gradients, max(0, wanted - parameters - optimizer - gradients), 0
    )


def said_bytes(error: str) -> int:
    """The most bytes that XLA's message names, 0 if it names none.

    >>> said_bytes("RESOURCE_EXHAUSTED: Out of memory allocating 4000 bytes.")
    4000
    >>> said_bytes("Used 20.50G of 15.75G hbm for f32[99999999999] at 281474976710656.")
    22011707392
    """
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    sizes = re.findall(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(?:iB|B)?\b|(?:B|bytes)\b)", error)
    return max((int(float(number) * units[unit]) for number, unit in sizes), default=0)


def _layers_of(
    abstract: TrainState, batch: Mapping[str, Any], setup: Setup, mesh: Any
) -> tuple[int, int]:
    """(L, bytes between layers on a device), from names and shapes of parameters and batch."""
    every = flatten(abstract.trainable) | flatten(abstract.non_trainable)
    flat = {path: leaf for path, leaf in every.items() if is_param(path)}  # adapters aside
    single = {match[0] for path in flat if (match := re.search(r"\S*layers_\d+", path))}
    stacked = [leaf.shape[0] for path, leaf in flat.items() if is_stacked(path)]
    layers = max(len(single), *stacked, 0)
    norms = [leaf for path, leaf in flat.items() if re.search(r"layers(_\d+)?/.*scale$", path)]
    width = max((leaf.shape[-1] for leaf in norms), default=0)  # those of heads are narrower
    positions = math.prod(batch["input_ids"].shape) if "input_ids" in batch else 0
    parts = 1 if mesh is None else mesh.devices.size
    size = 2 if setup.precision == "bfloat16" else 4
    return layers, layers * width * positions * size // parts // setup.microbatches
