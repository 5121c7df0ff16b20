"""Marian against transformers' PyTorch Marian, from the same configs and weights."""

import dataclasses

import flax.serialization
import jax
import numpy as np
import pytest
import safetensors.numpy
from parity import (
    check_decoding,
    check_defaults,
    check_head,
    check_seq2seq_decoding,
    check_sizes,
    seq2seq_inputs,
    shuffled,
    text_inputs,
)

import fmjax
from fmjax.config import config_to_json, write_json
from fmjax.models import marian
from fmjax.nn.position import sinusoids
from fmjax.tree import flatten, unflatten

CONFIG = marian.Config(
    vocab_size=51, decoder_vocab_size=51, max_position_embeddings=20, d_model=30, encoder_layers=2,
    encoder_ffn_dim=44, encoder_attention_heads=3, decoder_layers=2, decoder_ffn_dim=26,
    decoder_attention_heads=5, activation_function="swish", pad_token_id=50,
    decoder_start_token_id=50, scale_embedding=True,
)  # fmt: skip
# Each side its own words, the decoder's tied to the output matrix; as many, as one of PyTorch's
# classes takes the sizes for equal.
APART = dataclasses.replace(
    CONFIG, share_encoder_decoder_embeddings=False, scale_embedding=False, encoder_layers=1,
)  # fmt: skip


def test_translation_equals_pytorch(tmp_path):
    inputs = seq2seq_inputs(CONFIG, pad_id=50)
    check_head(marian, CONFIG, "seq2seq_lm", tmp_path, inputs)


def test_translation_with_two_vocabularies_equals_pytorch(tmp_path):
    config = dataclasses.replace(APART, decoder_vocab_size=61)
    check_head(marian, config, "seq2seq_lm", tmp_path, seq2seq_inputs(APART))


def test_model_equals_pytorch(tmp_path):
    inputs = seq2seq_inputs(APART)
    positions = [f"{side}.embed_positions.weight" for side in ("encoder", "decoder")]
    check_head(marian, APART, "model", tmp_path, inputs, unused=positions)


def test_vectors_in_place_of_words_equal_pytorch(tmp_path):
    """The decoder scales them, the encoder does not."""
    inputs = seq2seq_inputs(CONFIG)
    rng = np.random.default_rng(1)
    for name in ("input_ids", "decoder_input_ids"):
        shape = (*inputs.pop(name).shape, CONFIG.d_model)
        inputs[name.replace("input_ids", "inputs_embeds")] = rng.normal(size=shape)
    check_head(marian, CONFIG, "seq2seq_lm", tmp_path, inputs)


def test_the_decoder_alone_equals_pytorch(tmp_path):
    inputs = text_inputs(CONFIG, "causal_lm")
    rng = np.random.default_rng(1)
    inputs["encoder_hidden_states"] = rng.normal(size=(2, 5, 30))
    positions = ["model.decoder.embed_positions.weight"]
    check_head(marian, CONFIG, "causal_lm", tmp_path, inputs, unused=positions)


def test_cached_decoding():
    model, variables = fmjax.create(
        "marian", APART, head="seq2seq_lm", rng=jax.random.key(0), scan=True
    )
    check_seq2seq_decoding(model, shuffled(variables))


def test_cached_decoding_of_the_decoder_alone():
    model, variables = fmjax.create("marian", APART, head="causal_lm", rng=jax.random.key(0))
    check_decoding(model, shuffled(variables))


def test_flax_files_load(tmp_path):
    """They hold the bias of logits and no sinusoids."""
    model, variables = fmjax.create("marian", CONFIG, head="seq2seq_lm", rng=jax.random.key(0))
    variables["buffers"]["final_logits_bias"] += 0.5
    fmjax.save(tmp_path, model, variables)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    tree = {
        _flax_name(name): tensor.T if _flax_name(name).endswith("kernel") else tensor
        for name, tensor in tensors.items()
        if "embed_positions" not in name
    }
    packed = flax.serialization.msgpack_serialize(unflatten(tree))
    (tmp_path / "flax_model.msgpack").write_bytes(packed)
    data = config_to_json(CONFIG, {"model_type": "marian", "architectures": ["FlaxMarianMTModel"]})
    write_json(tmp_path / "config.json", data)
    again, read = fmjax.load(tmp_path)
    assert again == model
    flat = flatten(read)
    for path, leaf in flatten(variables).items():
        np.testing.assert_array_equal(flat[path], leaf, err_msg=path)
    np.testing.assert_array_equal(
        flat["buffers/decoder/embed/sinusoids"], sinusoids(20, 30, interleaved=False)
    )


def _flax_name(name):
    """PyTorch's name of a tensor as Flax's path."""
    parts = name.split(".")
    if parts[-1] == "weight":
        kind = "scale" if "norm" in parts[-2] else "kernel"
        parts[-1] = "embedding" if "shared" in name else kind
    return "/".join(parts)


def test_published_sizes():
    check_sizes(marian, dict.fromkeys(("base", "big"), "MarianModel"))


def test_config_defaults_are_transformers_defaults():
    check_defaults(marian, decoder_vocab_size=58101)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="decoder_vocab_size=61 must be vocab_size=51"):
        dataclasses.replace(CONFIG, decoder_vocab_size=61)
    ids = np.ones((1, 4), np.int32)
    with pytest.raises(ValueError, match="exactly one of decoder_input_ids"):
        jax.eval_shape(lambda: marian.Model(CONFIG).init(jax.random.key(0), input_ids=ids))
