"""mT5 (Xue et al. 2021, arXiv:2010.11934): T5 v1.1 for 101 languages. HF "mt5"."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from fmjax.models import t5
from fmjax.weights import Rule


@dataclasses.dataclass(frozen=True)
class Config(t5.PairConfig):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    vocab_size: int = 250112
    d_ff: int = 1024
    num_layers: int = dataclasses.field(default=8, metadata={"also": ("num_hidden_layers",)})
    num_heads: int = dataclasses.field(default=6, metadata={"also": ("num_attention_heads",)})
    feed_forward_proj: str = "gated-gelu"
    decoder_start_token_id: int | None = 0
    classifier_dropout: float = 0.0
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    @property
    def scaled(self) -> bool:
        return False


MODEL_TYPE = "mt5"
HEADS = {head: f"M{name}" for head, name in t5.HEADS.items()}

VARIANTS = {
    "tiny": Config(
        vocab_size=99, d_model=24, d_kv=6, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=3,
        relative_attention_num_buckets=8, relative_attention_max_distance=20,
        tie_word_embeddings=False,
    ),
    # Xue et al. 2021, section 3.2: T5 v1.1's sizes.
    **t5.gated_sizes(Config),
}  # fmt: skip


class Model(t5.Model):
    """mT5 with one head; see `fmjax.nn.seq2seq.EncoderDecoder`."""


inputs = t5.inputs
PREFIX = t5.PREFIX
# Files of transformers 5 may have it; PyTorch never scales here.
FIXED = {**t5.FIXED, "scale_decoder_outputs": ...}
IGNORED = t5.IGNORED


def from_tensors(config: Config, head: str, names: Collection[str]) -> Config:
    """The config with what only the tensors' names tell: whether the output matrix is tied.

    transformers 5 writes ``tie_word_embeddings: true`` whatever it has.
    """
    if config.tie_word_embeddings and head == "seq2seq_lm" and "lm_head.weight" in names:
        return dataclasses.replace(config, tie_word_embeddings=False)
    return config


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    return t5.rules(config, head)
