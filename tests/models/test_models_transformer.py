"""The published Transformer against torch.nn.Transformer's layers, from the same weights."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from parity import assert_near, check_seq2seq_decoding, exported, seq2seq_inputs, shuffled

import fmjax
from fmjax import hub
from fmjax.models import transformer
from fmjax.tree import flatten

CONFIG = transformer.Config(
    vocab_size=51, max_position_embeddings=20, d_model=30, encoder_layers=2, encoder_ffn_dim=44,
    encoder_attention_heads=3, decoder_layers=2, decoder_ffn_dim=26, decoder_attention_heads=5,
)  # fmt: skip
UNTIED = dataclasses.replace(CONFIG, tie_word_embeddings=False)


def twin_of(config):
    """torch.nn.Transformer without its last norms, which post-norm layers do not need."""
    nn, fields = torch.nn, {"dropout": 0.0, "batch_first": True}
    encoder = nn.TransformerEncoderLayer(
        config.d_model, config.encoder_attention_heads, config.encoder_ffn_dim, **fields
    )
    decoder = nn.TransformerDecoderLayer(
        config.d_model, config.decoder_attention_heads, config.decoder_ffn_dim, **fields
    )
    return nn.Transformer(
        config.d_model,
        custom_encoder=nn.TransformerEncoder(
            encoder, config.encoder_layers, enable_nested_tensor=False
        ),
        custom_decoder=nn.TransformerDecoder(decoder, config.decoder_layers),
        batch_first=True,
    ).double()


def positions(config, length):
    """Equation by equation: sines at even features, cosines at odd ones (section 3.5)."""
    table = np.zeros((length, config.d_model))
    for position in range(length):
        for i in range(0, config.d_model, 2):
            angle = position / 10000 ** (i / config.d_model)
            table[position, i : i + 2] = math.sin(angle), math.cos(angle)
    return torch.tensor(table)


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_equals_the_layers_of_torch(config):
    model, variables = fmjax.create("transformer", config, head="seq2seq_lm", rng=jax.random.key(0))
    variables = jax.tree.map(jnp.float32, shuffled(variables))
    tensors = {
        name: torch.tensor(np.array(tensor)).double().requires_grad_()
        for name, tensor in exported(transformer, model, variables).items()
    }
    twin = twin_of(config)
    stacks = {name: t for name, t in tensors.items() if ".layers." in name}
    inputs = seq2seq_inputs(config)
    tokens = {name: torch.tensor(value) for name, value in inputs.items()}
    words = {
        side: tensors["embedding.weight" if config is CONFIG else f"{side}_embedding.weight"]
        for side in ("encoder", "decoder")
    }

    def embedded(side, ids):
        vectors = torch.nn.functional.embedding(ids, words[side], padding_idx=0)
        return vectors * math.sqrt(config.d_model) + positions(config, ids.shape[1])

    source = embedded("encoder", tokens["input_ids"])
    target = embedded("decoder", tokens["decoder_input_ids"])
    padding = tokens["attention_mask"] == 0
    hidden = torch.func.functional_call(
        twin,
        stacks,
        (source, target),
        {
            "tgt_mask": torch.triu(torch.ones(6, 6, dtype=torch.bool), diagonal=1),
            "src_key_padding_mask": padding,
            "memory_key_padding_mask": padding,
            "tgt_key_padding_mask": tokens["decoder_attention_mask"] == 0,
        },
    )
    output = words["decoder"] if config is CONFIG else tensors["generator.weight"]
    logits = hidden @ output.T
    weights = np.random.default_rng(1).normal(size=tuple(logits.shape))
    (logits * torch.tensor(weights)).sum().backward()

    def loss(variables):
        ours = model.apply(variables, **inputs).logits
        return jnp.vdot(ours, weights), ours

    (_, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
    assert_near(ours, logits.detach(), "logits")
    mine = exported(transformer, model, grads)
    theirs = {name: np.asarray(tensor.grad) for name, tensor in tensors.items()}
    largest = max(np.abs(grad).max() for grad in theirs.values())
    for name, grad in theirs.items():
        scale = max(np.abs(grad).max(), 1e-2 * largest)
        error = np.abs(mine[name] - grad).max() / scale
        assert error < 1e-5, f"gradient of {name}: {error:.1e}"


def test_cached_decoding():
    model, variables = fmjax.create(
        "transformer", CONFIG, head="seq2seq_lm", rng=jax.random.key(0), scan=True
    )
    check_seq2seq_decoding(model, shuffled(variables))


def test_published_sizes():
    """Table 3 counts 65 and 213 million; it does not say of how many words."""
    for name, millions in (("base", 65), ("big", 213)):
        model = transformer.Model(transformer.VARIANTS[name])
        count = sum(leaf.size for leaf in jax.tree.leaves(hub.abstract_variables(model)))
        assert abs(count / 1e6 / millions - 1) < 0.04, f"{name}: {count}"


def test_files_go_there_and_back(tmp_path):
    model, variables = fmjax.create("transformer", UNTIED, head="seq2seq_lm", rng=jax.random.key(0))
    fmjax.save(tmp_path, model, variables)
    again, read = fmjax.load(tmp_path)
    assert again == model
    flat = flatten(read)
    for path, leaf in flatten(variables).items():
        np.testing.assert_array_equal(flat[path], leaf, err_msg=path)


@pytest.mark.slow
def test_it_learns_from_scratch():
    """To copy one batch: from the loss of a uniform guess to almost none."""
    config = dataclasses.replace(CONFIG, dropout=0.0)
    model, variables = fmjax.create("transformer", config, head="seq2seq_lm", rng=jax.random.key(0))
    ids = np.random.default_rng(0).integers(3, 51, (8, 6))
    started = np.concatenate([np.ones((8, 1), int), ids[:, :-1]], axis=1)
    tx = optax.adam(3e-3)

    @jax.jit
    def step(variables, state):
        def loss(variables):
            logits = model.apply(variables, input_ids=ids, decoder_input_ids=started).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids).mean()

        value, grads = jax.value_and_grad(loss)(variables)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(variables, updates), state, value

    state, losses = tx.init(variables), []
    for _ in range(60):
        variables, state, value = step(variables, state)
        losses.append(float(value))
    assert 0.7 * math.log(51) < losses[0] < 1.5 * math.log(51)
    assert losses[-1] < 0.2 * losses[0]
