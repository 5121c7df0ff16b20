"""The train step that is planned: real, of any family, over arrays that have shapes alone."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, SingleDeviceSharding

import fmjax.hub as hub
from fmjax.config import parse_config, read_config
from fmjax.methods import lora
from fmjax.methods.adapted_layers import is_adapter
from fmjax.nn.fused_attention import attention_kernel
from fmjax.nn.moe import sent_to_experts
from fmjax.perf.flops import FlopCount, count_needed_flops
from fmjax.perf.memory import MemoryUse, host_bytes, memory_use
from fmjax.perf.program import Traffic, read_program
from fmjax.perf.targets import Target, mesh_over
from fmjax.recipes.training import OPTIMIZERS, Matmuls, Optimizer, Precision, computed
from fmjax.tasks import causal_lm, masked_lm, seq2seq, sequence_classification
from fmjax.train import (
    accumulate,
    gradient,
    init_state,
    is_param,
    layout,
    make_train_step,
)
from fmjax.train.compile import jit_alone, lower_step
from fmjax.train.moments import Moments
from fmjax.train.sharding import batch_spec, placed
from fmjax.tree import count
from fmjax.types import LossFn, Remat, TrainState, Variables

LOSSES: dict[str, Callable[..., LossFn]] = {
    "causal_lm": causal_lm.loss,
    "masked_lm": masked_lm.loss,
    "seq2seq_lm": seq2seq.loss,
    "image_classification": sequence_classification.loss,
    "sequence_classification": sequence_classification.loss,
}
"""What can be planned, by the model's head."""
OF_TOKENS = ("masked_lm", "seq2seq_lm")
"""Heads with a label a token."""
Method = Literal["full", "lora", "dora"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a step computes.

    A step is as a run has it: AdamW (or another of the recipes' optimizers) after the gradient's
    norm was cut, float32 master weights below the precision's products, dropout as the config says.
    Every row is full, with every position counted in the loss.
    """

    batch: int = 32
    """Examples a step, over all chips."""
    length: int = 512
    """Tokens of an example; of an encoder-decoder those of its source, and of its target."""
    head: str | None = None
    """The model's head, and with it the loss; by default the family's first that can be planned."""
    method: Method = "full"
    """What trains: all weights, or low-rank updates of queries and values."""
    rank: int = 8
    """Of the low-rank updates."""
    optimizer: Optimizer = "adamw"
    """Of what trains."""
    moments: Moments = "float32"
    """As what the optimizer keeps its moments."""
    microbatches: int = 1
    """Pieces a batch is computed in, to save memory."""
    precision: Precision = "bfloat16"
    """Of the computation."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """As which the model's weights are kept, and trained."""
    dropout: Literal["config", "residual", "none"] = "config"
    """As the model's config says, without that of attention's probabilities, or none at all. What
    drops probabilities cannot be a fused kernel."""
    matmuls: Matmuls = "float"
    """As what dense layers multiply: as the precision says, or in 8 bits."""
    scan: bool = True
    """Compile one layer and scan it."""
    image_size: int | None = None
    """Rows and columns of pictures; by default the config's, or 224."""


class Step(NamedTuple):
    """What is traced of a model and its work; see `describe`.

    Args:
        family, config, head: of the model.
        work: the settings.
        state: abstract, without shardings.
        batch: abstract, without shardings.
        tx: the optimizer.
    """

    family: ModuleType
    config: Any
    head: str
    work: Work
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    tx: optax.GradientTransformation

    @property
    def tokens(self) -> int:
        """Tokens of a step; pictures, where there are no tokens."""
        ids = self.batch.get("input_ids")
        return self.work.batch if ids is None else ids.size

    def loss(self, remat: Remat) -> LossFn:
        """The loss, of whose blocks its gradient recomputes as much as `remat` says."""
        model = self.family.Model(self.config, head=self.head, scan=self.work.scan, remat=remat)
        loss = LOSSES[self.head](model)
        return computed(loss, self.work.precision, self.work.matmuls)

    def flops(self, remat: Remat) -> FlopCount:
        """What a step's gradient executes over all chips, in the program as traced."""
        # By the products themselves, whatever kernel will compute them.
        with attention_kernel("plain"):
            state = self.state
            return count_needed_flops(
                gradient(self.loss(remat)),
                state.trainable, state.non_trainable, self.batch, state.rng,
            )  # fmt: skip

    def model_flops(self) -> int:
        """FLOPs that it needs: nothing is recomputed, and a token passes its own experts alone."""
        with sent_to_experts():
            return self.flops("none").total

    def sizes(self) -> dict[str, int]:
        """How many numbers there are, and how many of them train."""
        state = self.state
        trained = count(state.trainable)
        return {"parameters": trained + count(state.non_trainable), "trained": trained}


class Compiled(NamedTuple):
    """A step that was compiled for a target.

    Args:
        memory: what it needs on a chip.
        traffic: what it moves and sends.
        seconds: that tracing and compiling took.
        run: the program itself.
        state, batch: what it was lowered with.
        host: bytes a chip keeps in the host's memory.
    """

    memory: MemoryUse
    traffic: Traffic
    seconds: float
    run: Any
    state: TrainState
    batch: Any
    host: int = 0


def describe(model: str, work: Work) -> Step:
    """The step of a model.

    Args:
        model: FAMILY/VARIANT, as "bert/large", or a folder with a config.json.
        work: what it computes.

    Raises:
        ValueError: an unknown model, a head that cannot be planned, or sizes that do not fit.
        OSError: the folder's config.json cannot be read.
    """
    family, config, said = _model_of(model)
    problems = [
        f"{name}={value} must be at least 1"
        for name in ("batch", "length", "rank", "microbatches")
        if (value := getattr(work, name)) < 1
    ]
    if not problems and work.batch % work.microbatches:
        problems.append(f"batch={work.batch} is no multiple of microbatches={work.microbatches}")
    there = [head for head in family.HEADS if head in LOSSES]
    head = work.head or (said if said in LOSSES else there[0] if there else "")
    if head not in there:
        problems.append(
            f"{family.MODEL_TYPE} has no head {head!r} that can be planned; it has {there}"
        )
    if problems:
        raise ValueError("; ".join(problems))
    if work.dropout != "config":
        rates = {
            field.name: 0.0
            for field in dataclasses.fields(config)
            if "drop" in field.name
            and isinstance(getattr(config, field.name), float)
            and (work.dropout == "none" or "att" in field.name)
        }
        config = dataclasses.replace(config, **rates)
    plain = family.Model(config, head=head, scan=work.scan)
    variables = jax.eval_shape(
        partial(_prepared, work=work), hub.abstract_variables(plain), jax.random.key(0)
    )
    tx = OPTIMIZERS[work.optimizer](1e-4, weight_decay=0.01, moments=work.moments)
    trains = is_param if work.method == "full" else is_adapter
    state = jax.eval_shape(
        lambda variables, rng: init_state(variables, tx, rng, trains),
        variables,
        jax.random.key(0),
    )
    return Step(family, config, head, work, state, _batch_of(family, config, head, work), tx)


def _model_of(model: str) -> tuple[ModuleType, Any, str | None]:
    """Family, config, and the head that a folder's config.json names."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        data = read_config(folder)
        family = hub.family_of(str(data.get("model_type")))
        classes = data.get("architectures") or [None]
        heads = [head for head, name in family.HEADS.items() if name == classes[0]]
        return family, parse_config(family.Config, data, family.FIXED), (heads or [None])[0]
    name, slash, variant = model.partition("/")
    if not slash or name not in hub.families():
        raise ValueError(
            f"model {model!r} is neither a folder with a config.json nor FAMILY/VARIANT, as in "
            f"bert/large; the families are {hub.families()}"
        )
    family = hub.family_of(name)
    return family, hub.config_of(family, variant), None


def _prepared(variables: Variables, rng: jax.Array, *, work: Work) -> Variables:
    """The variables as they are kept, with what the method adds."""
    if work.weights == "bfloat16":
        variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    if work.method == "full":
        return variables
    return lora.add(
        variables, rng, rank=work.rank, alpha=2.0 * work.rank,
        weight_decomposed=work.method == "dora",
    )  # fmt: skip


def _batch_of(
    family: ModuleType, config: Any, head: str, work: Work
) -> dict[str, jax.ShapeDtypeStruct]:
    """Full rows."""
    rows = work.batch
    shape = jax.ShapeDtypeStruct
    batch = {"weight": shape((rows,), jnp.float32)}
    pixels = family.inputs(config, head).get("pixel_values")
    if pixels is not None:
        size = work.image_size or getattr(config, "image_size", None) or 224
        size = size if isinstance(size, int) else size[0]
        batch["pixel_values"] = shape((rows, size, size, pixels.shape[-1]), jnp.float32)
        return batch | {"labels": shape((rows,), jnp.int32)}
    tokens = shape((rows, work.length), jnp.int32)
    batch["input_ids"] = tokens
    if head == "seq2seq_lm":
        batch["attention_mask"] = tokens
    if head != "causal_lm":  # whose labels are its inputs
        batch["labels"] = tokens if head in OF_TOKENS else shape((rows,), jnp.int32)
    return batch


def places(step: Step, devices: list[Any], axes: Mapping[str, int]) -> Any:
    """The step's abstract state with the sharding of each leaf on a mesh.

    Raises:
        ValueError: the mesh does not divide the state.
    """
    if len(devices) == 1:
        return placed(step.state, SingleDeviceSharding(devices[0]))
    return placed(step.state, layout(step.state, mesh_over(devices, axes)))


def compile_step(
    step: Step, target: Target, devices: list[Any], axes: Mapping[str, int], remat: Remat
) -> Compiled:
    """The step compiled for a target's devices.

    Raises:
        ValueError: the mesh does not divide the model.
        jax.errors.JaxRuntimeError: the compiler refuses it, for want of memory above all.
    """
    start = time.monotonic()
    grad_fn = accumulate(gradient(step.loss(remat)), step.work.microbatches)
    train_step = make_train_step(grad_fn, step.tx)
    state = places(step, devices, axes)
    with target.compiling():
        if len(devices) == 1:
            batch = placed(step.batch, SingleDeviceSharding(devices[0]))
            lowered = jit_alone(train_step, devices[0].platform).lower(state, batch)
        else:
            mesh = mesh_over(devices, axes)
            batch = placed(step.batch, NamedSharding(mesh, batch_spec(mesh)))
            shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
            lowered = lower_step(train_step, state, batch, mesh, state_shardings=shardings)
        program = lowered.compile()
    text = program.as_text()
    assert text is not None  # of all backends that there are targets for
    return Compiled(
        memory_use(program, state),
        read_program(text, len(devices)),
        time.monotonic() - start,
        program,
        state,
        batch,
        host_bytes(program),
    )
