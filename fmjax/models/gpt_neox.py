"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745), Pythia (Biderman et al. 2023, arXiv:2304.01373):
causal decoder with rotary positions in a part of each head, attention and feed-forward in parallel,
each after its own norm. HF "gpt_neox".
"""

from __future__ import annotations

import dataclasses

from flax import linen as nn
from jax import Array

from fmjax.models import config_alone, token_inputs
from fmjax.models.gptj import Shared
from fmjax.nn.attention import Attention, Cache
from fmjax.nn.decoder import Decoder, Inputs, TokenEmbeddings, config_problems
from fmjax.nn.dropout import Dropout
from fmjax.nn.mlp import Mlp
from fmjax.nn.norm import LayerNorm
from fmjax.nn.position import RopeScaling, scaled_rotary
from fmjax.nn.stack import LayerOutput
from fmjax.weights import (
    TRANSPOSE,
    Rule,
    decoder_head_rules,
    dense_rules,
    fused_per_head,
    joined_rules,
    norm_rules,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, under version 4's names and with transformers 5's defaults."""

    vocab_size: int = 50432
    hidden_size: int = 6144
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    intermediate_size: int = 24576
    hidden_act: str = "gelu"
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    classifier_dropout: float = 0.1
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    attention_bias: bool = True
    rotary_pct: float = dataclasses.field(
        default=0.25, metadata={"also": ("partial_rotary_factor",)}
    )
    rotary_emb_base: float = dataclasses.field(default=10000.0, metadata={"also": ("rope_theta",)})
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = config_problems(
            self, width="hidden_size", heads="num_attention_heads", act="hidden_act"
        )
        problems += rotary_problems(
            self.rope_scaling, self.rotary_size, self.hidden_size // self.num_attention_heads
        )
        if problems:
            raise ValueError("gpt_neox config: " + "; ".join(problems))

    @property
    def rotary_size(self) -> int:
        """R, how many features of a head are rotated (one more where that is odd)."""
        return int(self.hidden_size // self.num_attention_heads * self.rotary_pct)


def rotary_problems(scaling: RopeScaling | None, rotary: int, size: int) -> list[str]:
    """What is wrong with rotating `rotary` of the `size` features of a head."""
    problems = []
    if not 0 < (rotary + 1) // 2 * 2 <= size:
        problems.append(
            f"{rotary} rotary features of a head of {size}: they must be an even number of those"
        )
    return problems if scaling is None else problems + scaling.size_problems(rotary)


MODEL_TYPE = "gpt_neox"
HEADS = {
    "model": "GPTNeoXModel",
    "causal_lm": "GPTNeoXForCausalLM",
    "sequence_classification": "GPTNeoXForSequenceClassification",
    "token_classification": "GPTNeoXForTokenClassification",
    "question_answering": "GPTNeoXForQuestionAnswering",
}


def _pythia(layers: int, width: int, heads: int, vocab_size: int = 50304) -> Config:
    return Config(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )


VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=40, max_position_embeddings=32, rotary_pct=0.5,
        attention_dropout=0.1, hidden_dropout=0.1,
        rope_scaling=RopeScaling(rope_type="linear", factor=2.0),
    ),
    # Biderman et al. 2023, table 1, and the config.json files of EleutherAI/pythia-*.
    "pythia-14m": _pythia(6, 128, 4),
    "pythia-31m": _pythia(6, 256, 8),
    "pythia-70m": _pythia(6, 512, 8),
    "pythia-160m": _pythia(12, 768, 12),
    "pythia-410m": _pythia(24, 1024, 16),
    "pythia-1b": _pythia(16, 2048, 8),
    "pythia-1.4b": _pythia(24, 2048, 16),
    "pythia-2.8b": _pythia(32, 2560, 32),
    "pythia-6.9b": _pythia(32, 4096, 32, 50432),
    "pythia-12b": _pythia(36, 5120, 40, 50688),
    # The config.json files of togethercomputer/RedPajama-INCITE-Base-3B-v1 and -7B-Base, and of
    # stabilityai/stablelm-base-alpha-3b and -7b.
    "redpajama-3b": dataclasses.replace(
        _pythia(32, 2560, 32, 50432), use_parallel_residual=False, rotary_pct=1.0
    ),
    "redpajama-7b": dataclasses.replace(
        _pythia(32, 4096, 32, 50432), use_parallel_residual=False, rotary_pct=1.0
    ),
    "stablelm-alpha-3b": dataclasses.replace(
        _pythia(16, 4096, 32, 50688), max_position_embeddings=4096
    ),
    "stablelm-alpha-7b": dataclasses.replace(
        _pythia(16, 6144, 48, 50432), max_position_embeddings=4096
    ),
    # Black et al. 2022, section 2.1, and the config.json of EleutherAI/gpt-neox-20b.
    "20b": dataclasses.replace(_pythia(44, 6144, 64, 50432), hidden_act="gelu_fast"),
}  # fmt: skip


class Block(nn.Module):
    """Attention and feed-forward, each after its norm, side by side or one after the other."""

    config: Config
    train: bool
    output_hidden_states: bool
    output_attentions: bool

    @nn.compact
    def __call__(
        self, hidden: Array, cache: Cache | None, index: Array | int, shared: Shared
    ) -> tuple[Array, LayerOutput]:  # [B, T, D] -> [B, T, D]
        config = self.config
        init = nn.initializers.normal(config.initializer_range)

        def norm(name: str, x: Array) -> Array:
            return LayerNorm(config.layer_norm_eps, name=name)(x)

        def drop(x: Array) -> Array:
            return Dropout(config.hidden_dropout)(x, self.train)

        attended, probabilities, cache = Attention(
            config.num_attention_heads,
            dropout_rate=config.attention_dropout,
            train=self.train,
            with_probabilities=self.output_attentions,
            kernel_init=init,
            use_bias=config.attention_bias,
            name="attn",
        )(
            norm("norm_1", hidden),
            mask=shared.mask,
            rotary=shared.rotary,
            cache=cache,
            start=shared.start,
        )
        attended = hidden + drop(attended)
        source = hidden if config.use_parallel_residual else attended
        mlp = Mlp(config.intermediate_size, config.hidden_act, init, name="mlp")
        hidden = attended + drop(mlp(norm("norm_2", source)))
        return hidden, LayerOutput(
            cache, hidden if self.output_hidden_states else None, probabilities
        )


class Model(Decoder):
    """GPT-NeoX with one head; see `fmjax.nn.decoder.Decoder`."""

    config: Config
    block = Block

    @property
    def cache_shape(self) -> tuple[int, int]:
        heads = self.config.num_attention_heads
        return heads, self.config.hidden_size // heads

    @property
    def classifier_dropout(self) -> float:
        return self.config.classifier_dropout

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        self.embed = TokenEmbeddings(
            config.vocab_size, config.hidden_size, init, dropout_rate=config.hidden_dropout
        )
        self.final_norm = LayerNorm(config.layer_norm_eps)
        super().setup()

    def shared(self, inputs: Inputs, hidden: Array) -> Shared:
        config = self.config
        rotary = scaled_rotary(
            inputs.position_ids,
            config.rotary_size,
            config.rotary_emb_base,
            config.rope_scaling,
            max_positions=config.max_position_embeddings,
        )
        return Shared(inputs.mask(), inputs.start, rotary)


inputs = token_inputs
from_tensors = config_alone
PREFIX = "gpt_neox."
FIXED = {
    "is_decoder": frozenset((False, True)),  # it always is one
    "is_encoder_decoder": False,
    # In some files, read by no version.
    "attention_probs_dropout_prob": 0,
    "hidden_dropout_prob": 0,
}
IGNORED = (
    r"\.attention\.(bias|masked_bias)$",
    r"(^|\.)rotary_emb\.inv_freq$",
)


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    body = "" if head == "model" else PREFIX
    layer, here = f"{body}layers.{{i}}", "layers_{i}"
    attention, bias = f"{layer}.attention", config.attention_bias
    joined = fused_per_head(3, config.num_attention_heads)
    tied = ("lm_head.weight", "embed_out.weight") if config.tie_word_embeddings else ()
    table = [
        Rule("params/embed/word/embedding", f"{body}embed_in.weight", aliases=tied),
        *norm_rules("final_norm", f"{body}final_layer_norm"),
        *norm_rules(f"{here}/norm_1", f"{layer}.input_layernorm"),
        *norm_rules(f"{here}/norm_2", f"{layer}.post_attention_layernorm"),
        *joined_rules(
            f"{here}/attn", ("query", "key", "value"), f"{attention}.query_key_value", joined,
            bias=bias,
        ),
        *dense_rules(f"{here}/attn/out", f"{attention}.dense", bias=bias),
        *dense_rules(f"{here}/mlp/up", f"{layer}.mlp.dense_h_to_4h"),
        *dense_rules(f"{here}/mlp/down", f"{layer}.mlp.dense_4h_to_h"),
    ]  # fmt: skip
    if head == "causal_lm" and not config.tie_word_embeddings:
        # Its name on disk; version 5 calls it lm_head in memory and reads either.
        kernel = Rule("params/head/kernel", "embed_out.weight", TRANSPOSE, ("lm_head.weight",))
        return [*table, kernel]
    return table + decoder_head_rules(head, tied=True)
