"""BART against transformers' PyTorch BART, from the same configs and weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import (
    check_decoding,
    check_defaults,
    check_head,
    check_old_file,
    check_seq2seq_decoding,
    check_sizes,
    seq2seq_inputs,
    shuffled,
    text_inputs,
)

import fmjax
from fmjax.config import parse_config
from fmjax.models import bart

CONFIG = bart.Config(
    vocab_size=51, max_position_embeddings=20, d_model=30, encoder_layers=2, encoder_ffn_dim=44,
    encoder_attention_heads=3, decoder_layers=2, decoder_ffn_dim=26, decoder_attention_heads=5,
)  # fmt: skip
SHALLOW = dataclasses.replace(CONFIG, encoder_layers=1, decoder_layers=1)
SCALED = dataclasses.replace(
    SHALLOW, scale_embedding=True, tie_word_embeddings=False, activation_function="relu",
    decoder_start_token_id=4, id2label=("a", "b"),
)  # fmt: skip


def unused(config):
    """Without ties PyTorch has three tables of words and uses two."""
    return () if config.tie_word_embeddings else ("shared.weight", "model.shared.weight")


@pytest.mark.parametrize("config", [CONFIG, SCALED], ids=["tied", "scaled"])
def test_seq2seq_equals_pytorch(config, tmp_path):
    inputs = seq2seq_inputs(config, pad_id=1)
    check_head(bart, config, "seq2seq_lm", tmp_path, inputs, unused=unused(config))


def test_the_decoder_starts_from_the_encoder_tokens(tmp_path):
    inputs = text_inputs(SCALED, "model")
    check_head(bart, SCALED, "model", tmp_path, inputs, unused=unused(SCALED))


def test_sequence_classification_equals_pytorch(tmp_path):
    inputs = seq2seq_inputs(SHALLOW, pad_id=1, end_id=2)
    inputs["input_ids"][:, 2] = 2  # an end inside, which is not the last
    check_head(bart, SHALLOW, "sequence_classification", tmp_path, inputs)


def test_question_answering_equals_pytorch(tmp_path):
    inputs = seq2seq_inputs(SCALED, pad_id=1)
    check_head(bart, SCALED, "question_answering", tmp_path, inputs, unused=unused(SCALED))


def test_the_decoder_alone_equals_pytorch(tmp_path):
    inputs = text_inputs(CONFIG, "causal_lm", pad_id=1)
    rng = np.random.default_rng(1)
    inputs["encoder_hidden_states"] = rng.normal(size=(2, 5, 30))
    inputs["encoder_attention_mask"] = np.array([[1] * 5, [1, 1, 1, 0, 0]])
    check_head(bart, SHALLOW, "causal_lm", tmp_path, inputs)


@pytest.mark.parametrize("scan", [False, True])
def test_cached_decoding(scan):
    """With the encoder's keys and values in the cache."""
    model, variables = fmjax.create(
        "bart", CONFIG, head="seq2seq_lm", rng=jax.random.key(0), scan=scan
    )
    check_seq2seq_decoding(model, shuffled(variables))


def test_cached_decoding_of_the_decoder_alone():
    model, variables = fmjax.create(
        "bart", CONFIG, head="causal_lm", rng=jax.random.key(0), scan=True
    )
    check_decoding(model, shuffled(variables))


def test_published_sizes():
    check_sizes(bart, dict.fromkeys(bart.VARIANTS, "BartModel"))


def test_config_defaults_are_transformers_defaults():
    check_defaults(bart)


def test_old_files_load(tmp_path):
    """Tied copies under every name, fairseq's version."""
    extra = ("model.encoder.version", "model.decoder.version")
    check_old_file(bart, CONFIG, "seq2seq_lm", tmp_path / "extra", extra=extra)
    check_old_file(
        bart, CONFIG, "model", tmp_path / "renamed",
        rename=lambda name: name.replace("shared", "decoder.embed_tokens"),
    )  # fmt: skip
    old = {"num_hidden_layers": 12, "classif_dropout": 0.0, "normalize_embedding": True}
    assert parse_config(bart.Config, old, bart.FIXED) == bart.Config()
    with pytest.raises(ValueError, match="num_hidden_layers=3 is another name of encoder_layers"):
        parse_config(bart.Config, {"num_hidden_layers": 3, "encoder_layers": 6}, bart.FIXED)


def test_the_decoder_loads_from_a_whole_checkpoint(tmp_path):
    """And a sequence-to-sequence head from a bare one, whose bias of logits is then absent."""
    model, variables = fmjax.create("bart", CONFIG, head="seq2seq_lm", rng=jax.random.key(0))
    fmjax.save(tmp_path / "whole", model, variables)
    _, alone = fmjax.load(tmp_path / "whole", head="causal_lm")
    np.testing.assert_array_equal(
        alone["params"]["decoder"]["layers_1"]["mlp"]["up"]["kernel"],
        variables["params"]["decoder"]["layers_1"]["mlp"]["up"]["kernel"],
    )
    model, bare = fmjax.load(tmp_path / "whole", head="model")
    fmjax.save(tmp_path / "bare", model, bare)
    model, again = fmjax.load(tmp_path / "bare", head="seq2seq_lm")
    assert not again["buffers"]["final_logits_bias"].any()
    shallow = dataclasses.replace(CONFIG, decoder_layers=1)
    fmjax.save(tmp_path / "one", *fmjax.create("bart", shallow, rng=jax.random.key(0)))
    file = tmp_path / "one" / "config.json"
    file.write_text(file.read_text().replace('"decoder_layers": 1', '"decoder_layers": 2'))
    with pytest.raises(ValueError, match=r"decoder\.layers"):  # a layer too few is still an error
        fmjax.load(tmp_path / "one")


def test_layers_drop_while_training():
    config = dataclasses.replace(CONFIG, encoder_layerdrop=0.5, decoder_layerdrop=0.5, dropout=0.0)
    model, variables = fmjax.create("bart", config, rng=jax.random.key(0))

    @jax.jit
    def run(key):
        out = model.apply(
            variables, input_ids=jnp.arange(3, 9)[None], train=True, rngs={"dropout": key},
            output_hidden_states=True,
        )  # fmt: skip
        return jnp.stack([jnp.abs(a - b).max() for a, b in zip(
            out.hidden_states[1:], out.hidden_states[:-1], strict=True
        )])  # fmt: skip

    changes = np.stack([run(jax.random.key(seed)) for seed in range(24)])
    skipped = (changes == 0).mean()
    assert 0.25 < skipped < 0.75


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="decoder_attention_heads=7") as error:
        dataclasses.replace(CONFIG, decoder_attention_heads=7, dropout=1.0, pad_token_id=51)
    assert "bart config" in str(error.value)
    assert "dropout=1.0" in str(error.value)
    assert "pad_token_id=51" in str(error.value)


IDS = np.ones((1, 4), np.int32)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "exactly one of input_ids, inputs_embeds and encoder_outputs"),
        ({"input_ids": IDS, "encoder_outputs": np.ones((1, 4, 30))}, "exactly one of input_ids"),
        ({"inputs_embeds": np.ones((1, 4, 30))}, "exactly one of decoder_input_ids"),
        ({"input_ids": np.ones((1, 21), int)}, "21 positions"),
        ({"input_ids": np.ones(4, int)}, r"\[B, T\]"),
        ({"input_ids": IDS, "attention_mask": np.ones((1, 3))}, "attention_mask"),
        ({"input_ids": IDS, "position_ids": IDS}, "does not take position_ids"),
        ({"input_ids": IDS, "decoder_attention_mask": np.ones((1, 3))}, "attention_mask"),
    ],
)
def test_bad_inputs_are_refused(inputs, words):
    model = bart.Model(CONFIG)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))


def test_bad_caches_are_refused():
    model = bart.Model(CONFIG)
    run = lambda cache: jax.eval_shape(  # noqa: E731
        lambda: model.init(jax.random.key(0), input_ids=IDS, cache=cache)
    )
    with pytest.raises(ValueError, match="for 5 encoder positions and got 4"):
        run(model.init_cache(1, 6, 5))
    with pytest.raises(ValueError, match=r"the 0 that the cache holds .* length=4\)"):
        run(model.init_cache(1, 3, 4))
    with pytest.raises(ValueError, match="encoder_length=None"):
        model.init_cache(1, 6)
    with pytest.raises(ValueError, match="does not decode"):
        jax.eval_shape(
            lambda: bart.Model(CONFIG, head="question_answering").init(
                jax.random.key(0), input_ids=IDS, cache=model.init_cache(1, 6, 4)
            )
        )
