"""How fast is a train step on a GPU or TPU, next to PyTorch compiled on the same device?

    python benchmarks/accelerator.py                      about 15 minutes on one H100
    python benchmarks/accelerator.py --cases bert-large gpt2-medium
    python benchmarks/accelerator.py --smoke              tiny models, seconds, on a CPU too

The models that papers report, in bfloat16 with float32 master weights and AdamW: masked language
modelling (BERT, 64 x 512 tokens, all labelled), causal language modelling (GPT-2, x 1024; a Llama
of 1.2 billion parameters, 4 x 2048), sequence to sequence (T5, 32 x 512 to 128) and pictures of
224 x 224 pixels. Dropout is on but for that of attention's probabilities, which no kernel of
flash attention that both sides have takes with a key of ours. There is no padding. PyTorch is
transformers' model with scaled dot-product attention, `torch.compile`, autocast and fused AdamW.

The share of the peak is model FLOPs, counted from the plain loss (attention in full, also where it
is causal), over the device's published dense bfloat16 rate.
"""

from __future__ import annotations

import dataclasses
import os

# Both sides are on the device at once, each with what it needs.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import train_step
import tyro
from cases import Case, pictures
from run import Settings, run

from fmjax.models import bert, gpt2, llama, resnet, t5, vit

CHUNK = 16384  # of tokens: an accelerator has room for their logits
# config.json of the released Llama 3.2 1B, at its own pace: without the stretched positions, which
# cost nothing.
LLAMA_1B = llama.Config(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=8192,
    rope_theta=500000.0,
    tie_word_embeddings=True,
)


def _bert(name: str) -> bert.Config:
    return dataclasses.replace(bert.VARIANTS[name], attention_probs_dropout_prob=0.0)


def _gpt2(name: str) -> gpt2.Config:
    return dataclasses.replace(gpt2.VARIANTS[name], attn_pdrop=0.0)


def _text(name: str, config: object, head: str, batch_size: int, length: int) -> Case:
    return Case(name, config, head, batch_size, length, "bfloat16", chunk_size=CHUNK)


T5_BASE = dataclasses.replace(
    _text("t5-base", t5.VARIANTS["base"], "seq2seq_lm", 32, 512), target_length=128
)
CASES = (
    _text("bert-base", _bert("base"), "masked_lm", 64, 512),
    _text("bert-large", _bert("large"), "masked_lm", 64, 512),
    _text("gpt2-small", _gpt2("base"), "causal_lm", 32, 1024),
    _text("gpt2-medium", _gpt2("medium"), "causal_lm", 16, 1024),
    _text("llama-1b", LLAMA_1B, "causal_lm", 4, 2048),
    T5_BASE,
    pictures("vit-b16", vit.VARIANTS["b16"], 256, "bfloat16"),
    pictures("vit-l16", vit.VARIANTS["l16"], 128, "bfloat16"),
    pictures("resnet-50", resnet.VARIANTS["50"], 256, "bfloat16"),
)


if __name__ == "__main__":
    run("accelerator", CASES, tyro.cli(Settings, description=__doc__), train_step.run_case)
