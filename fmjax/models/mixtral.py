"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): Mistral whose feed-forward is eight experts, of
which each token passes two. HF "mixtral".
"""

from __future__ import annotations

import dataclasses

from flax import linen as nn
from jax import Array

from fmjax.models import llama
from fmjax.models.llama import FIXED, IGNORED, PREFIX, from_tensors, inputs
from fmjax.nn.moe import Experts
from fmjax.types import Output, PyTree
from fmjax.weights import TRANSPOSE, Rule, dense_rules, stacked

__all__ = ["FIXED", "IGNORED", "PREFIX", "from_tensors", "inputs"]


@dataclasses.dataclass(frozen=True)
class Config(llama.DecoderConfig):
    """The fields of config.json, under its names and with its defaults (transformers 5)."""

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1000000.0
    hidden_act: str = "silu"
    sliding_window: int | None = None
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    router_jitter_noise: float = 0.0
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001  # read by the task, not by the model

    def problems(self) -> list[str]:
        problems = super().problems()
        if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            problems.append(
                f"num_experts_per_tok={self.num_experts_per_tok} must be between 1 and "
                f"num_local_experts={self.num_local_experts}"
            )
        if not 0 <= self.router_jitter_noise < 1:
            problems.append(
                f"router_jitter_noise={self.router_jitter_noise} must be at least 0 and below 1"
            )
        return problems

    @property
    def act(self) -> str:
        return self.hidden_act

    @property
    def window(self) -> int | None:
        return self.sliding_window


MODEL_TYPE = "mixtral"
HEADS = {
    "model": "MixtralModel",
    "causal_lm": "MixtralForCausalLM",
    "sequence_classification": "MixtralForSequenceClassification",
    "token_classification": "MixtralForTokenClassification",
    "question_answering": "MixtralForQuestionAnswering",
}
VARIANTS = {
    "tiny": Config(
        vocab_size=99, hidden_size=36, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, head_dim=8, max_position_embeddings=64,
        attention_dropout=0.1, sliding_window=3, num_local_experts=4, router_jitter_noise=0.01,
        pad_token_id=2,
    ),
    # Jiang et al. 2024, table 1; config.json of the released weights.
    "8x7b": Config(max_position_embeddings=32768),
    "8x22b": Config(
        hidden_size=6144, intermediate_size=16384, num_hidden_layers=56, num_attention_heads=48,
        max_position_embeddings=65536,
    ),
}  # fmt: skip


class Block(llama.Block):
    """Llama's, with experts."""

    def feed_forward(self, x: Array) -> tuple[Array, Array | None]:
        config = self.config
        experts = Experts(
            config.num_local_experts, config.num_experts_per_tok, config.intermediate_size,
            config.act, self.kernel_init, config.router_jitter_noise, self.train, name="mlp",
        )  # fmt: skip
        return experts(x)


class Model(llama.Model):
    """Mixtral with one head; see `fmjax.nn.decoder.Decoder`."""

    block = Block

    @nn.compact
    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        cache: PyTree = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_logits: bool = True,
        output_router_logits: bool | None = None,
    ) -> Output:
        """Runs the model; beside the arguments of `fmjax.nn.decoder.Decoder`:

        Args:
            output_router_logits: whether ``router_logits`` is returned, for the losses that balance
                the experts; None is what the config says.

        Raises:
            ValueError: inputs that contradict each other or the config.
        """
        out = self.run(
            self.check(input_ids, attention_mask, position_ids, inputs_embeds, cache, train),
            cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_logits=output_logits,
        )
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        return out if output_router_logits else dataclasses.replace(out, router_logits=None)


def expert_rules() -> list[Rule]:
    """The router and experts of one layer, which files keep apart; from the base model on."""
    here, there = "layers_{i}/mlp", "layers.{i}.block_sparse_moe"
    table = dense_rules(f"{here}/router", f"{there}.gate", bias=False)
    for name, tensor in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        weight = f"{there}.experts.{{e}}.{tensor}.weight"
        table.append(Rule(f"params/{here}/{name}/kernel", weight, stacked(TRANSPOSE)))
    return table


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    layer = [*llama.attention_rules(config), *expert_rules(), *llama.pre_norm_rules()]
    return llama.assemble(config, head, layer)
