"""T5, mT5 and LongT5 against transformers' PyTorch classes, from the same configs and weights."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from parity import (
    assert_near,
    check_defaults,
    check_fixture,
    check_head,
    check_old_file,
    check_seq2seq_decoding,
    check_sizes,
    seq2seq_inputs,
    shuffled,
    text_inputs,
    torch_outputs,
    torch_twin,
)

import fmjax
from fmjax.config import parse_config
from fmjax.models import longt5, mt5, t5

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
CONFIG = t5.Config(
    vocab_size=51, d_model=30, d_kv=7, d_ff=44, num_layers=2, num_decoder_layers=1, num_heads=3,
    relative_attention_num_buckets=8, relative_attention_max_distance=12, decoder_start_token_id=0,
)  # fmt: skip
GATED = dataclasses.replace(
    CONFIG, num_layers=1, num_decoder_layers=2, feed_forward_proj="gated-gelu",
    tie_word_embeddings=False, layer_norm_epsilon=1e-5,
)  # fmt: skip
LABELS = dataclasses.replace(
    CONFIG, num_layers=1, id2label=("a", "b", "c"), feed_forward_proj="gated-silu"
)


def untie(twin):
    """An output matrix of its own, which transformers 5 reads from files but does not make."""
    twin.lm_head.weight = torch.nn.Parameter(torch.randn_like(twin.lm_head.weight))


def test_seq2seq_equals_pytorch(tmp_path):
    check_head(t5, CONFIG, "seq2seq_lm", tmp_path, seq2seq_inputs(CONFIG))


def test_v1_1_equals_pytorch(tmp_path):
    """Gated, with an output matrix of its own; PyTorch's file says it was tied."""
    inputs = seq2seq_inputs(GATED)
    check_head(t5, GATED, "seq2seq_lm", tmp_path, inputs, prepare=untie)
    written = json.loads((tmp_path / "torch" / "config.json").read_text())
    assert written["tie_word_embeddings"] is True
    assert written["scale_decoder_outputs"] is False
    assert (
        json.loads((tmp_path / "fmjax" / "config.json").read_text())["tie_word_embeddings"] is False
    )


def test_tied_without_scale_equals_pytorch(tmp_path):
    """What transformers 5 makes of a config that says untied."""
    config = dataclasses.replace(
        CONFIG, num_layers=1, scale_decoder_outputs=False, feed_forward_proj="gelu"
    )
    check_head(t5, config, "seq2seq_lm", tmp_path, seq2seq_inputs(config))


def test_model_equals_pytorch(tmp_path):
    config = dataclasses.replace(GATED, tie_word_embeddings=True)
    check_head(t5, config, "model", tmp_path, seq2seq_inputs(config))


@pytest.mark.parametrize("head", ["encoder", "token_classification"])
def test_the_encoder_alone_equals_pytorch(head, tmp_path):
    config = CONFIG if head == "encoder" else LABELS
    check_head(t5, config, head, tmp_path, text_inputs(config, head, length=14))


def test_sequence_classification_equals_pytorch(tmp_path):
    inputs = seq2seq_inputs(LABELS, end_id=1)
    check_head(t5, LABELS, "sequence_classification", tmp_path, inputs)


def test_question_answering_equals_pytorch(tmp_path):
    config = dataclasses.replace(LABELS, id2label=("a", "b"))
    check_head(t5, config, "question_answering", tmp_path, text_inputs(config, "model"))


def test_the_flax_fixture_equals_pytorch():
    check_fixture(FIXTURES / "t5-cond")


@pytest.mark.parametrize("scan", [False, True])
def test_cached_decoding(scan):
    model, variables = fmjax.create(
        "t5", GATED, head="seq2seq_lm", rng=jax.random.key(0), scan=scan
    )
    check_seq2seq_decoding(model, shuffled(variables))


def test_published_sizes():
    check_sizes(t5, dict.fromkeys(t5.VARIANTS, "T5Model"))


def test_config_defaults_are_transformers_defaults():
    check_defaults(t5, num_decoder_layers=6, scale_decoder_outputs=True)


def test_initial_weights_are_spread_as_published():
    """Normal, with deviations that make unscaled scores of deviation 1."""
    config = dataclasses.replace(t5.VARIANTS["small"], num_layers=1, vocab_size=2000)
    _, variables = fmjax.create("t5", config, head="seq2seq_lm", rng=jax.random.key(0))
    params = variables["params"]
    layer = params["encoder"]["layers_0"]
    wanted = {
        "query": (layer["attn"]["query"]["kernel"], (512 * 64) ** -0.5),
        "key": (layer["attn"]["key"]["kernel"], 512**-0.5),
        "out": (layer["attn"]["out"]["kernel"], 512**-0.5),
        "up": (layer["mlp"]["up"]["kernel"], 512**-0.5),
        "down": (layer["mlp"]["down"]["kernel"], 2048**-0.5),
        "bias": (params["encoder"]["relative_bias"]["embedding"], 512**-0.5),
        "word": (params["embed"]["word"]["embedding"], 1.0),
    }
    for name, (kernel, deviation) in wanted.items():
        # Five standard errors of a sample deviation.
        assert abs(kernel.std() / deviation - 1) < 5 * (2 * kernel.size) ** -0.5, name


def test_old_files_load(tmp_path):
    table = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    extra = (table, "lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    check_old_file(t5, CONFIG, "seq2seq_lm", tmp_path, extra=extra)
    old = {
        "n_positions": 512,
        "num_hidden_layers": 6,
        "dense_act_fn": "relu",
        "is_gated_act": False,
    }
    assert parse_config(t5.Config, old, t5.FIXED) == t5.Config()


def test_the_encoder_loads_from_a_whole_checkpoint(tmp_path):
    model, variables = fmjax.create("t5", GATED, head="seq2seq_lm", rng=jax.random.key(0))
    fmjax.save(tmp_path / "whole", model, variables)
    for head in ("encoder", "token_classification"):
        new = ("head/",) if head == "token_classification" else ()
        _, alone = fmjax.load(tmp_path / "whole", head=head, new=new)
        assert set(alone["params"]) == {"embed", "encoder"} | ({"head"} if new else set())
        np.testing.assert_array_equal(
            alone["params"]["encoder"]["layers_0"]["mlp"]["gate"]["kernel"],
            variables["params"]["encoder"]["layers_0"]["mlp"]["gate"]["kernel"],
        )


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="feed_forward_proj='gated-what'") as error:
        dataclasses.replace(CONFIG, feed_forward_proj="gated-what", dropout_rate=1.0, d_kv=0)
    assert "t5 config" in str(error.value)
    assert "dropout_rate=1.0" in str(error.value)
    assert "d_kv=0" in str(error.value)
    with pytest.raises(ValueError, match="dense_act_fn='relu' contradicts 'gated-gelu'"):
        dataclasses.replace(GATED, dense_act_fn="relu")


MULTILINGUAL = mt5.Config(
    vocab_size=51, d_model=30, d_kv=7, d_ff=44, num_layers=1, num_decoder_layers=1, num_heads=3,
    relative_attention_num_buckets=8, relative_attention_max_distance=12,
    tie_word_embeddings=False,
)  # fmt: skip


def test_mt5_equals_pytorch(tmp_path):
    inputs = seq2seq_inputs(MULTILINGUAL)
    check_head(mt5, MULTILINGUAL, "seq2seq_lm", tmp_path, inputs, prepare=untie)


@pytest.mark.parametrize("head", ["model", "encoder", "token_classification"])
def test_mt5_heads_equal_pytorch(head, tmp_path):
    config = dataclasses.replace(MULTILINGUAL, tie_word_embeddings=True)
    make = seq2seq_inputs if head == "model" else lambda config: text_inputs(config, head)
    check_head(mt5, config, head, tmp_path, make(config))


@pytest.mark.parametrize("head", ["sequence_classification", "question_answering"])
def test_mt5_classifiers_equal_pytorch(head, tmp_path):
    config = dataclasses.replace(MULTILINGUAL, tie_word_embeddings=True)
    check_head(mt5, config, head, tmp_path, seq2seq_inputs(config, end_id=1))


LOCAL = longt5.Config(
    vocab_size=51, d_model=30, d_kv=7, d_ff=44, num_layers=2, num_decoder_layers=1, num_heads=3,
    relative_attention_num_buckets=8, relative_attention_max_distance=12, local_radius=2,
    global_block_size=4,
)  # fmt: skip
GLOBAL = dataclasses.replace(
    LOCAL, encoder_attention_type="transient-global", feed_forward_proj="gated-gelu",
    scale_decoder_outputs=False, decoder_start_token_id=0,
)  # fmt: skip


@pytest.mark.parametrize("config", [LOCAL, GLOBAL], ids=["local", "transient-global"])
def test_longt5_equals_pytorch(config, tmp_path):
    inputs = seq2seq_inputs(config, length=11)
    # Padding, which also fills up the last block, is left out here: see below.
    del inputs["attention_mask"]
    check_head(
        longt5, config, "seq2seq_lm", tmp_path, inputs, attentions=False,
        gradient_tolerance=2e-5,  # measured on one kind of CPU: 1.04e-5, of a norm's scale
    )  # fmt: skip


@pytest.mark.parametrize(("head", "kind"), [("model", "local"), ("encoder", "transient-global")])
def test_longt5_heads_equal_pytorch(head, kind, tmp_path):
    """Fewer tokens than a block of either kind has."""
    config = dataclasses.replace(LOCAL, encoder_attention_type=kind, num_layers=1, local_radius=5)
    inputs = seq2seq_inputs(config, length=3)
    if head == "encoder":
        inputs = {"input_ids": inputs["input_ids"]}
    inputs.pop("attention_mask", None)
    check_head(longt5, config, head, tmp_path, inputs, attentions=False)


@pytest.mark.parametrize("config", [LOCAL, GLOBAL], ids=["local", "transient-global"])
def test_longt5_ignores_padding_as_pytorch_does(config, tmp_path):
    """On either side; the states of padding itself are nobody's business."""
    twin = torch_twin(longt5, config, "encoder").double()
    twin.save_pretrained(tmp_path)
    model, variables = fmjax.load(tmp_path)
    inputs = text_inputs(config, "encoder", length=14)
    inputs["attention_mask"] = np.ones((2, 14), np.int64)
    inputs["attention_mask"][0, :3] = inputs["attention_mask"][1, 9:] = 0
    ours = jax.jit(lambda v: model.apply(v, **inputs, output_attentions=True))(variables)
    theirs = torch_outputs(twin, inputs)
    keep = inputs["attention_mask"].astype(bool)
    hidden = theirs["last_hidden_state"].detach().numpy()
    assert_near(ours.last_hidden_state[keep], hidden[keep], "hidden")
    for mine, other in zip(ours.attentions, theirs["attentions"], strict=True):
        assert mine.shape == other.shape  # [B, N, H, P, 3P + G]
        mine, other = (
            np.moveaxis(np.asarray(x), 2, 3).reshape(2, -1, *x.shape[2:3], x.shape[-1])[:, :14]
            for x in (mine, other.detach().numpy())
        )
        assert_near(mine[keep], other[keep], "attentions")


@pytest.mark.slow
def test_longt5_cached_decoding():
    config = dataclasses.replace(GLOBAL, tie_word_embeddings=False, scale_decoder_outputs=None)
    model, variables = fmjax.create(
        "longt5", config, head="seq2seq_lm", rng=jax.random.key(0), scan=True
    )
    check_seq2seq_decoding(model, shuffled(variables))


def test_longt5_files_without_output_matrix_are_tied(tmp_path):
    """Published files say untied and mean not scaled, with a matrix of their own or without."""
    config = dataclasses.replace(GLOBAL, tie_word_embeddings=False, scale_decoder_outputs=None)
    for tied in (False, True):
        made = dataclasses.replace(GLOBAL, tie_word_embeddings=True) if tied else config
        model, variables = fmjax.create("longt5", made, head="seq2seq_lm", rng=jax.random.key(0))
        fmjax.save(tmp_path, model, variables)
        data = json.loads((tmp_path / "config.json").read_text())
        data["tie_word_embeddings"] = False
        data.pop("scale_decoder_outputs", None)
        (tmp_path / "config.json").write_text(json.dumps(data))
        again, _ = fmjax.load(tmp_path)
        assert again.config == made
        assert not again.config.scaled


def test_published_sizes_of_siblings():
    check_sizes(mt5, dict.fromkeys(mt5.VARIANTS, "MT5Model"))
    check_sizes(longt5, dict.fromkeys(longt5.VARIANTS, "LongT5Model"))


def test_siblings_defaults():
    check_defaults(mt5, num_decoder_layers=8)
    check_defaults(longt5, num_decoder_layers=6, scale_decoder_outputs=True)


IDS = np.ones((1, 4), np.int32)


@pytest.mark.parametrize(
    ("head", "inputs", "words"),
    [
        ("model", {"input_ids": IDS}, "exactly one of decoder_input_ids"),
        ("encoder", {"input_ids": IDS, "decoder_input_ids": IDS}, "has no decoder"),
        ("sequence_classification", {"inputs_embeds": np.ones((1, 4, 30))}, "decoder_input_ids"),
        (
            "sequence_classification",
            {"inputs_embeds": np.ones((1, 4, 30)), "decoder_input_ids": IDS},
            "give input_ids",
        ),
    ],
)
def test_bad_inputs_are_refused(head, inputs, words):
    model = t5.Model(CONFIG, head=head)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))
