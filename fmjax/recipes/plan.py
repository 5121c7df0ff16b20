"""Will it fit, how fast can it be, what will it cost: training planned for hardware elsewhere.

The real train step is compiled for the target; nothing runs. Every number says where it is from:
"counted" in the program as traced, "compiled" (in the program as compiled), "bound" (the best that
published figures allow), "measured" (a run on the device at hand).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import tyro

from fmjax.config import write_json
from fmjax.perf.flops import FlopCount
from fmjax.perf.roofline import roofline
from fmjax.perf.targets import Target, parse_target
from fmjax.recipes.plan_output import draw, mesh_name
from fmjax.recipes.plan_search import POLICIES, Candidate, candidates, rows_over
from fmjax.recipes.planned_step import Compiled, Step, Work, compile_step, describe
from fmjax.recipes.planned_step_run import measure
from fmjax.recipes.training import plain_settings
from fmjax.train.sharding import parse_axes
from fmjax.types import Remat

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Work):
    """Plan training on hardware that is not here: does it fit, how fast is it, on which mesh."""

    model: Annotated[str, tyro.conf.Positional]
    """FAMILY/VARIANT, as bert/large, or a folder with a config.json."""
    target: str
    """v4:2x2x1, v5e:4x4, v5p:2x2x2, v6e:2x4, a100, h100, h200, b200, h100:8, or cpu."""
    mesh: str | None = None
    """Chips by axis, as data=4,fsdp=2,tensor=2; by default the best is searched."""
    remat: Remat | None = None
    """What of blocks the backward pass recomputes; by default as the best is."""
    memory: float | None = None
    """Bytes of a chip, instead of the published ones."""
    price: float | None = None
    """Of a chip for an hour, in any currency."""
    compiles: int = 4
    """Plans that are compiled at most, the most promising first, beside what a compiler refuses for
    want of memory."""
    measure: bool = False
    """Also run the best plan for a few steps; of the target cpu alone."""
    json: Path | None = None
    """A file for everything that was found."""
    chart: Path | None = None
    """A file for a picture of the plans' memory and time: .png, .svg or .pdf."""


class Flops(NamedTuple):
    """Of a step over all chips: what it needs, and what it executes by what it recomputes."""

    model: int
    executed: dict[Remat, FlopCount]


def plan(settings: Settings) -> dict[str, Any]:
    """Plans a training step.

    Args:
        settings: what and for what.

    Returns:
        What ``--json`` writes: ``model``, ``target``, ``settings``, ``counted``, ``plans`` (each
        with ``mesh``, ``remat``, ``status`` and, by where they are from, its numbers) and ``best``,
        the place in ``plans`` of the fastest bound among those that fit, or None.

    Raises:
        ValueError: an unknown model or target, or a mesh that fits neither chips, batch nor model.
        ImportError: the target's compiler is not installed.
        OSError: a file cannot be read or written.
    """
    target = parse_target(settings.target, settings.memory)
    problems = []
    if settings.price is not None and settings.price < 0:
        problems.append(f"price={settings.price} must not be negative")
    if settings.compiles < 1:
        problems.append(f"compiles={settings.compiles} must be at least 1")
    if settings.measure and target.backend != "cpu":
        problems.append(f"measure is for the target cpu: {target.name} is not here to run on")
    if settings.remat == "offload" and target.backend == "cpu":
        problems.append(
            "remat='offload' has no use on a CPU, whose memory is the host's; choose 'block', "
            "which is the same there"
        )
    if settings.chart is not None and settings.chart.suffix not in (".png", ".svg", ".pdf"):
        problems.append(f"chart={settings.chart} must end with .png, .svg or .pdf")
    problems += [
        f"{name}={file}: there is no folder {file.parent}; make it first"
        for name, file in (("json", settings.json), ("chart", settings.chart))
        if file is not None and not file.parent.is_dir()
    ]
    if problems:
        raise ValueError("; ".join(problems))
    axes = None if settings.mesh is None else _checked_axes(settings.mesh, target, settings)
    step = describe(settings.model, settings)
    devices = target.devices()
    found, undivided = candidates(step, target, devices, axes, settings.remat)
    policies: set[Remat] = {one.remat for one in found}
    flops = Flops(step.model_flops(), {remat: step.flops(remat) for remat in policies})
    plans, best = _search(step, target, devices, found, settings, flops)
    rest = [one for one in found if all(one is not done for done, _, _ in plans)]
    rows = [row for _, row, _ in plans]
    rows += [_row(one, "not compiled", "others were more promising") for one in rest]
    doc = {
        "model": settings.model,
        "target": {
            "name": target.name,
            "chips": target.chips,
            "memory_bytes": target.memory,
            "kind": devices[0].device_kind,
            "jax": jax.__version__,
        },
        "settings": plain_settings(settings) | {"head": step.head},
        "counted": step.sizes() | {"model_flops": flops.model, "tokens": step.tokens},
        "plans": rows + [_row(one, "refused", why) for one, why in undivided],
        "best": best,
    }
    if settings.measure and best is not None:
        compiled = plans[best][2]
        assert compiled is not None
        doc["plans"][best]["measured"] = measure(compiled)
    if settings.json is not None:
        write_json(settings.json, doc)
    if settings.chart is not None and any("compiled" in row for row in rows):
        draw(doc, settings.chart)
    return doc


def _checked_axes(text: str, target: Target, settings: Settings) -> dict[str, int]:
    axes, problems = parse_axes(text), []
    if (there := math.prod(axes.values())) != target.chips:
        problems.append(f"it is of {there} chips, and {target.name} has {target.chips}")
    rows = rows_over(axes) * settings.microbatches
    if settings.batch % rows:
        problems.append(
            f"batch={settings.batch} does not divide by the {rows} parts of its examples"
        )
    if problems:
        raise ValueError(f"mesh {text!r}: {'; '.join(problems)}")
    return axes


def _search(
    step: Step,
    target: Target,
    devices: list[Any],
    found: list[Candidate],
    settings: Settings,
    flops: Flops,
) -> tuple[list[tuple[Candidate, dict[str, Any], Compiled | None]], int | None]:
    """What was tried, and the place of the best in it.

    A candidate whose state alone is larger than a chip is never compiled; nor is one that would not
    fit with the activations of another that recomputes as much or more and did not fit, nor one
    that recomputes more than what fits on the same mesh. What a compiler refuses, which it does
    soon, is not counted as compiled.
    """
    done: list[tuple[Candidate, dict[str, Any], Compiled | None]] = []
    too_large: list[tuple[Candidate, float]] = []  # and their activations
    undivided: list[dict[str, int]] = []
    compiles = 0
    for one in found:
        if one.least > target.memory:
            why = f"state and gradients alone take {one.least / 1e9:.1f} GB of a chip"
            done.append((one, _row(one, "too large", why), None))
            continue
        if compiles == settings.compiles or one.mesh in undivided:
            continue
        if any(one.mesh == other.mesh and row["status"] == "fits" for other, row, _ in done):
            # What is computed again takes time, and what was written once is written twice.
            done.append((one, _row(one, "not compiled", "less recomputed fits as well"), None))
            continue
        expected = one.least + max(
            (
                _at_least(one, other, size)
                for other, size in too_large
                if POLICIES.index(other.remat) >= POLICIES.index(one.remat)
            ),
            default=0.0,
        )
        if expected > target.memory:
            why = f"{expected / 1e9:.1f} GB a chip, with the activations of what did not fit"
            done.append((one, _row(one, "not compiled", why), None))
            continue
        name = mesh_name(one.mesh)
        logger.info("compiling %s, remat %s", name, one.remat)
        try:
            compiled = compile_step(step, target, devices, one.mesh, one.remat)
        except ValueError as error:
            if settings.mesh is not None:
                raise
            undivided.append(one.mesh)
            done.append((one, _row(one, "refused", str(error).splitlines()[0]), None))
            continue
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            text = str(error).splitlines()[0]
            too_large.append((one, _refused_activations(text, one, target)))
            done.append((one, _row(one, "too large", f"the compiler: {text[:200]}"), None))
            continue
        compiles += 1
        row = _compiled_row(one, compiled, step, target, settings, flops)
        if row["status"] == "too large":
            too_large.append((one, compiled.memory.total - one.least))
        keep = compiled if settings.measure else None  # a large program's text is large too
        done.append((one, row, keep))
    fitting = [place for place, (_, row, _) in enumerate(done) if row["status"] == "fits"]
    best = min(fitting, key=lambda place: _order(done[place][1]), default=None)
    return done, best


def _order(row: dict[str, Any]) -> tuple[float, float]:
    bound = row.get("bound", {}).get("step_seconds")
    return (bound if bound is not None else 0.0, row["compiled"]["peak_bytes"])


def _at_least(one: Candidate, other: Candidate, activations: float) -> float:
    """Bytes of activations that a candidate has at the least, by those of another.

    Axes of examples divide all of them. The tensor axis divides some only: what it leaves whole
    grows with it, as fewer chips are left to divide examples.
    """
    return activations * min(1.0, one.mesh.get("tensor", 1) / other.mesh.get("tensor", 1))


def _refused_activations(text: str, one: Candidate, target: Target) -> float:
    """Bytes of activations on a chip, from what a compiler says of memory that it lacks.

    libtpu names what temporaries take, gradients among them, or all that a program uses; from
    another message no more is known than that it did not fit.
    """
    found = re.search(r"(temporaries|Used) \(?([\d.]+)([MG])", text)
    if found is None:
        return target.memory - one.least
    size = float(found[2]) * 2 ** {"M": 20, "G": 30}[found[3]]
    return size - (one.gradients if found[1] == "temporaries" else one.least)


def _row(one: Candidate, status: str, reason: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "mesh": one.mesh,
        "remat": one.remat,
        "status": status,
        "reason": reason,
    }
    if one.least:
        row["bound"] = {"least_bytes": one.least}
    return row


def _compiled_row(
    one: Candidate,
    compiled: Compiled,
    step: Step,
    target: Target,
    settings: Settings,
    flops: Flops,
) -> dict[str, Any]:
    memory, traffic = compiled.memory, compiled.traffic
    fits = memory.total <= target.memory
    why = None if fits else f"{memory.total / 1e9:.1f} of {target.memory / 1e9:.1f} GB"
    row = _row(one, "fits" if fits else "too large", why)
    executed = flops.executed[one.remat]
    row["counted"] = {"executed_flops": executed.total, "of_8_bits": dict(executed.of_8_bits)}
    row["compiled"] = {
        "compile_seconds": compiled.seconds,
        "peak_bytes": memory.total,
        "host_bytes": compiled.host,
        "bytes": memory._asdict(),
        "moved_bytes": traffic.moved,
        "sent_bytes": traffic.sent,
        "collectives": [collective._asdict() for collective in traffic.collectives],
        "unknown_loops": traffic.unknown_loops,
    }
    if target.peak is not None:
        bound = roofline(
            target.peak,
            chips=target.chips,
            model_flops=flops.model,
            executed_flops=executed.total,
            moved=traffic.moved,
            sent=traffic.sent,
            tokens=step.tokens,
            of_8_bits=executed.of_8_bits,
            kept_by_host=compiled.host,
            price=settings.price,
        )
        row["bound"] |= {
            "compute_seconds": bound.compute,
            "memory_seconds": bound.memory,
            "interconnect_seconds": bound.interconnect,
            "host_seconds": bound.host,
            "step_seconds": bound.step,
            "limited_by": bound.limited_by,
            "tokens_per_second": bound.tokens_per_second,
            "mfu": bound.mfu,
            "cost_per_billion_tokens": bound.cost,
        }
    return row
