"""The cases that the benchmarks run, the same for fmjax and for its peer.

The peer is PyTorch with `transformers` and scaled dot-product attention, on the same weights: the
fmjax model is saved and PyTorch loads it; where their Python is given, Hugging Face's Flax classes
do so too. Before anything is timed all must give the same logits; timing a different function would
compare nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from peer import FlaxPeer, Peer
from record import named

import fmjax
from fmjax.models import bert, clip, family_of, gpt2, llama, resnet, t5, vit
from fmjax.tasks.vocabulary_loss import CHUNK_SIZE
from fmjax.types import Variables

BASE = bert.VARIANTS["base"]
# Wang et al. 2020, arXiv:2002.10957: the 6-layer, 384-wide student with BERT-base's 12 heads.
MINILM = bert.Config(
    hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
)
SMOKE = bert.Config(
    vocab_size=128,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=32,
)
TINY = {
    "bert": SMOKE,
    "clip": clip.VARIANTS["tiny"],
    "gpt2": gpt2.Config(vocab_size=128, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "llama": dataclasses.replace(llama.VARIANTS["tiny"], attention_dropout=0.0),
    "resnet": resnet.VARIANTS["tiny"],
    "t5": t5.VARIANTS["tiny"],
    "vit": vit.VARIANTS["tiny"],
}
# Largest difference of logits over the largest logit. bfloat16 keeps 8 bits of every activation,
# and the two sides round at different places.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
# Examples whose logits are compared: all of a large batch would take longer than its steps.
COMPARED = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a batch and a precision.

    Attributes:
        name: what `--cases` calls it.
        config: the model's sizes, and by its class the family.
        head: the model's head.
        batch_size: B.
        length: T; 1 of pictures, so that a picture counts as one, and of pairs the text's.
        dtype: of the products. bfloat16 keeps float32 master weights and is the peer's autocast.
        image_size: rows and columns of pictures; None for tokens.
        target_length: tokens of the targets of an encoder-decoder, besides T.
        chunk_size: tokens whose logits exist at one time in a train step.
        ways: whether `train_step.py` also takes the step in its other ways.
    """

    name: str
    config: Any
    head: str
    batch_size: int
    length: int
    dtype: str
    image_size: int | None = None
    target_length: int | None = None
    chunk_size: int = CHUNK_SIZE
    ways: bool = False

    @property
    def family(self) -> str:
        """The config's family."""
        return type(self.config).__module__.rsplit(".", 1)[-1]


def pictures(name: str, config: Any, batch_size: int, dtype: str) -> Case:
    """A classifier of 1,000 classes and pictures of 224 x 224 pixels."""
    config = dataclasses.replace(config, id2label=tuple(map(str, range(1000))))
    return Case(name, config, "image_classification", batch_size, 1, dtype, image_size=224)


def pairs(name: str, config: Any, batch_size: int, dtype: str) -> Case:
    """Pictures of 224 x 224 pixels and as many texts of full length, all compared with all."""
    length = config.text_config.max_position_embeddings
    return Case(name, config, "model", batch_size, length, dtype, image_size=224)


def select(cases: Sequence[Case], names: Sequence[str], *, smoke: bool) -> list[Case]:
    """The cases with these names (all if none are given); for a smoke run, made tiny.

    Raises:
        ValueError: an unknown name.
    """
    chosen = named(cases, names)
    if smoke:
        chosen = [
            dataclasses.replace(
                case,
                config=TINY[case.family],
                batch_size=8 if case.ways else 2,  # which divides in all ways
                length=min(case.length, 16),
                image_size=None if case.image_size is None else 8,
                target_length=None if case.target_length is None else 8,
            )
            for case in chosen
        ]
    return chosen


def create(case: Case) -> tuple[Any, Variables]:
    """The case's model with random weights from seed 0."""
    return fmjax.create(case.family, case.config, head=case.head, rng=jax.random.key(0))


def make_batch(case: Case) -> dict[str, np.ndarray]:
    """Random tokens without padding, or pixels, from seed 0; labels where the head has some."""
    random = np.random.default_rng(0)
    if case.family == "clip" and case.image_size is not None:
        text, vision = case.config.text_config, case.config.vision_config
        size = (case.batch_size, case.image_size, case.image_size, vision.num_channels)
        ids = random.integers(0, text.eos_token_id, (case.batch_size, case.length), dtype=np.int32)
        ids[:, -1] = text.eos_token_id
        return {"input_ids": ids, "pixel_values": random.normal(size=size).astype(np.float32)}
    if case.image_size is not None:
        shape = (case.batch_size, case.image_size, case.image_size, case.config.num_channels)
        classes = len(case.config.id2label)
        return {
            "pixel_values": random.normal(size=shape).astype(np.float32),
            "labels": random.integers(0, classes, case.batch_size, dtype=np.int32),
        }
    shape = (case.batch_size, case.length)
    batch = {"input_ids": random.integers(0, case.config.vocab_size, shape, dtype=np.int32)}
    if case.family == "bert":
        batch["token_type_ids"] = np.zeros(shape, np.int32)
    if case.target_length is not None:
        targets = (case.batch_size, case.target_length)
        labels = random.integers(1, case.config.vocab_size, targets, dtype=np.int32)
        batch["labels"] = labels
        start = np.full_like(labels[:, :1], case.config.decoder_start_token_id)
        batch["decoder_input_ids"] = np.concatenate([start, labels[:, :-1]], axis=1)
    if case.head == "causal_lm":  # not shifted: both sides do that
        batch["labels"] = batch["input_ids"]
    if case.head == "masked_lm":  # every position is labelled
        batch["labels"] = random.integers(0, case.config.vocab_size, shape, dtype=np.int32)
    if case.head == "sequence_classification":
        batch["labels"] = random.integers(0, 2, case.batch_size, dtype=np.int32)
    return batch


def inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch without its labels."""
    return {name: value for name, value in batch.items() if name != "labels"}


def forward_fn(model: Any, case: Case) -> Callable[[Variables, dict[str, Any]], Any]:
    """The function whose output is compared and, in `forward.py`, timed: float32 weights in, the
    case's precision inside."""

    def forward(variables: Variables, inputs: dict[str, Any]) -> jax.Array:
        low = jax.tree.map(lambda leaf: leaf.astype(case.dtype), variables["params"])
        output = model.apply({**variables, "params": low}, **inputs)
        if case.family == "clip":
            return output.logits_per_image
        return output.last_hidden_state if case.head == "model" else output.logits

    return forward


def torch_is_there() -> bool:
    """Whether PyTorch can be the peer on the device that JAX uses."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return jax.default_backend() == "cpu" or torch.cuda.is_available()


@contextlib.contextmanager
def peers_of(
    case: Case,
    model: Any,
    variables: Variables,
    batch: dict[str, np.ndarray],
    *,
    torch: bool,
    flax_python: Path | None = None,
    learning_rate: float = 0.0,
    weight_decay: float = 0.0,
) -> Iterator[dict[str, Peer]]:
    """The case by others, each in its own process, with the same weights and the same batch.

    Args:
        torch: whether PyTorch is one, if it is installed.
        flax_python: see `FlaxPeer`; None for none.
    """
    with contextlib.ExitStack() as stack:
        peers: dict[str, Peer] = {}
        with tempfile.TemporaryDirectory() as folder:
            given: dict[str, Any] = {
                "model_class": family_of(case.family).HEADS[case.head],
                "dtype": case.dtype,
                "batch": batch,
                "learning_rate": learning_rate,
                "weight_decay": weight_decay,
            }
            torch = torch and torch_is_there()
            if torch or flax_python is not None:
                fmjax.save(folder, model, variables)
            if torch:
                device = "cpu" if jax.default_backend() == "cpu" else "cuda"
                peer = Peer(folder, family=case.family, device=device, **given)
                peers["torch"] = stack.enter_context(peer)
            if flax_python is not None:
                peers["hf-flax"] = stack.enter_context(FlaxPeer(flax_python, folder, **given))
            for peer in peers.values():
                peer.logits(1)  # by then it has read the folder
        yield peers


def compare(
    case: Case,
    model: Any,
    variables: Variables,
    batch: dict[str, np.ndarray],
    peers: Mapping[str, Peer],
) -> dict[str, float]:
    """By peer, the largest difference between its outputs and ours, over its largest output.

    Raises:
        ValueError: it is beyond `TOLERANCE`: the benchmark would be void.
    """
    forward = jax.jit(forward_fn(model, case))
    few = {name: value[:COMPARED] for name, value in inputs_of(batch).items()}
    ours = np.asarray(forward(variables, few), np.float32)
    differences = {}
    for side, peer in peers.items():
        theirs = peer.logits(COMPARED)
        difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        if not difference <= TOLERANCE[case.dtype]:
            raise ValueError(
                f"{case.name}: fmjax and {side} differ by {difference:.2g} of the largest output, "
                f"more than {TOLERANCE[case.dtype]:.0e}; their times are not comparable"
            )
        differences[side] = difference
    return differences
