"""Options: where they come from, what wins, what is refused and with which words."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import fmjax
from fmjax.generate.inputs import make_plan, minimum_new_tokens
from fmjax.generation_config import GenerationConfig
from fmjax.models import bart, bert, gpt2
from fmjax.recipes.checkpoints import convert_checkpoint

CONFIG = gpt2.Config(vocab_size=47, n_positions=32, n_embd=16, n_layer=1, n_head=2)


@pytest.fixture(scope="module")
def decoder():
    return fmjax.create("gpt2", CONFIG, head="causal_lm", rng=jax.random.key(0))


def write(folder, name, data):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(data))
    return folder


def test_defaults_are_those_of_transformers():
    theirs = transformers.GenerationConfig()._get_default_generation_params()
    ours = vars(GenerationConfig())
    own = {"num_assistant_tokens", "max_length"}  # fewer drafts; the length counts new tokens
    shared = ours.keys() & theirs.keys() - own
    assert len(shared) > 20
    for name in shared:
        assert ours[name] == theirs[name], name


def test_reads_what_transformers_writes(tmp_path):
    """Every option, through its file and back."""
    options = {
        "max_new_tokens": 7, "min_new_tokens": 2, "do_sample": True, "temperature": 0.5,
        "top_k": 3, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.9, "epsilon_cutoff": 0.1,
        "eta_cutoff": 0.2, "repetition_penalty": 1.5, "encoder_repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 3, "num_beams": 3,
        "num_return_sequences": 2, "length_penalty": 0.7, "early_stopping": "never",
        "bad_words_ids": [[1], [2, 3]], "sequence_bias": [[[4], 1.5], [[5, 6], -2.0]],
        "suppress_tokens": [7], "begin_suppress_tokens": [8, 9], "forced_bos_token_id": 10,
        "forced_eos_token_id": [11, 12], "exponential_decay_length_penalty": [3, 1.1],
        "remove_invalid_values": True, "renormalize_logits": True, "eos_token_id": [1, 2],
        "pad_token_id": 0, "bos_token_id": 3, "decoder_start_token_id": 4, "stop_strings": ["a"],
        "num_assistant_tokens": 6, "min_length": 1,
    }  # fmt: skip
    assert options.keys() == vars(GenerationConfig()).keys() - {"max_length"}
    transformers.GenerationConfig(**options).save_pretrained(tmp_path / "theirs")
    config = fmjax.load_generation_config(tmp_path / "theirs")
    assert config == GenerationConfig(**options)
    assert hash(config) == hash(GenerationConfig(**options))
    config.write(tmp_path)
    assert GenerationConfig.read(tmp_path) == config
    again = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert again.length_penalty == 0.7
    assert again.eos_token_id == [1, 2]


def test_older_files_have_them_in_config_json(tmp_path):
    legacy = {"model_type": "bart", "num_beams": 4, "max_length": 50, "eos_token_id": 2}
    legacy |= {"min_length": None, "d_model": 16, "vocab_size": 99}
    assert GenerationConfig.read(write(tmp_path / "a", "config.json", legacy)) == GenerationConfig(
        num_beams=4, max_length=50, eos_token_id=2
    )
    pair = {"model_type": "encoder-decoder", "decoder_start_token_id": 5}
    pair |= {"decoder": {"model_type": "gpt2", "eos_token_id": 7, "num_beams": 3}}
    assert GenerationConfig.read(write(tmp_path / "b", "config.json", pair)) == GenerationConfig(
        num_beams=3, eos_token_id=7, decoder_start_token_id=5
    )
    # A file of its own counts alone.
    write(tmp_path / "b", "generation_config.json", {"eos_token_id": 9, "top_k": None})
    assert GenerationConfig.read(tmp_path / "b") == GenerationConfig(eos_token_id=9)


def test_unknown_keys_are_named(tmp_path):
    data = {"temprature": 0.5, "guidance_scale": 3.0, "watermarking_config": {"bias": 2.0}}
    data |= {"use_cache": False, "num_beam_groups": 1, "transformers_version": "4.30.0"}
    write(tmp_path, "generation_config.json", data)
    with pytest.raises(ValueError, match=r"generation_config\.json") as error:
        GenerationConfig.read(tmp_path)
    message = str(error.value)
    assert "temprature=0.5 is not a known key; did you mean temperature?" in message
    assert "guidance_scale=3.0 is not supported" in message
    assert "watermarking_config" in message
    assert "use_cache" not in message
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="not UTF-8 JSON"):
        GenerationConfig.read(tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match="must be an object"):
        GenerationConfig.read(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0, "do_sample": True}, "temperature=0.0 must be a positive number"),
        ({"top_p": 1.5, "top_k": -1}, "top_k=-1 must be .*\n.*top_p=1.5 must be"),
        ({"num_beams": 2.0}, "num_beams=2.0 must be an int"),
        ({"do_sample": 1}, "do_sample=1 must be true or false"),
        ({"early_stopping": "always", "num_beams": 2}, "'never'"),
        ({"eos_token_id": []}, r"eos_token_id=\(\) must be a token id or several"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"sequence_bias": {(): 1.0}}, "sequence_bias"),
        ({"stop_strings": [""]}, "stop_strings"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be an int of at least 1"),
        ({"num_return_sequences": 2}, "one text several times"),
        ({"num_return_sequences": 3, "num_beams": 2}, "more than num_beams=2"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens=5 is more than"),
        ({"min_length": 9, "max_length": 8}, "min_length=9 is more than"),
        ({"forced_eos_token_id": 3, "suppress_tokens": [3, 4]}, "among suppress_tokens"),
        ({"temperature": 0.5, "top_k": 5}, "temperature, top_k: needs do_sample=True"),
        ({"length_penalty": 2.0}, "length_penalty: needs num_beams above 1"),
        ({"max_new_tokens": 4, "max_length": 9}, "max_new_tokens or max_length, not both"),
        ({"max_tokens": 4, "topk": 5}, "max_tokens=4 is not an option.*\n.*did you mean top_k"),
        ({"do_sample": True}, "needs rng"),
        ({"do_sample": True, "rng": 0}, "rng=0 must be a typed key"),
        ({"stop_strings": "a"}, "needs the tokenizer"),
        ({"num_beams": 2, "output_logits": True}, "not of a beam search"),
        ({"eos_token_id": 50, "suppress_tokens": [1, 99]}, r"\[50\], outside .*47\n.*\[99\]"),
        ({"max_new_tokens": 40}, r"40 after a prompt of 4 tokens is 44 positions, more than.* 32"),
        ({"max_length": 3}, "no token may follow"),
        ({"min_length": 30, "max_new_tokens": 5}, "at least 26 new tokens .* at most 5"),
        ({"encoder_no_repeat_ngram_size": 2}, "needs the encoder's input_ids"),
        ({"decoder_input_ids": np.ones((1, 1), int)}, "for encoder-decoders"),
        ({"generation_config": {"num_beams": 2}}, r"a builtins\.dict; it must be a fmjax\.Gener"),
        ({"token_type_ids": np.zeros((1, 4), int)}, "return_token_type_ids=False"),
        ({"sequence_bias": {(5,): float("nan")}}, "not nan"),
        ({"processors": [lambda x, state: x[:, :5]]}, r"makes \(1, 5\) of logits \(1, 47\)"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_contradictions_are_refused(decoder, options, words):
    ids = np.ones((1, 4), np.int64)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        fmjax.generate(*decoder, ids, **options)


@pytest.mark.parametrize(
    ("ids", "mask", "words"),
    [
        (np.zeros((2, 0), int), None, r"shape \(2, 0\); it must be \[B, P\] with at least one"),
        (np.zeros((0, 3), int), None, r"shape \(0, 3\)"),
        (np.zeros(3, int), None, r"shape \(3,\)"),
        ([[1, 2], [3]], None, "rows of different lengths"),
        (np.ones((1, 3)), None, "dtype float64; it must be integers"),
        ([[1, 47, -2]], None, r"\[-2, 47\], outside the vocabulary of 47"),
        (np.ones((1, 32), int), None, "32 tokens and the model 32 positions"),
        (np.ones((2, 3), int), [[1, 1, 1], [1, 1, 0]], r"padding after tokens in the rows \[1\]"),
        (np.ones((2, 3), int), [[0, 0, 0], [1, 1, 1]], r"rows \[0\] are empty"),
        (np.ones((2, 3), int), np.ones((2, 4)), r"attention_mask has shape \(2, 4\)"),
        (None, None, "give input_ids"),
        (["a film", "a plot"], None, r"token ids and holds lists of str_?: give .*\*\*tokenizer"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_bad_prompts_are_refused(decoder, ids, mask, words):
    for call in (fmjax.generate, fmjax.stream):
        with pytest.raises(ValueError, match=words):
            call(*decoder, ids, attention_mask=mask)


def test_bad_texts_of_an_encoder_are_refused():
    config = bart.Config(
        vocab_size=47, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        max_position_embeddings=20,
    )  # fmt: skip
    model, variables = fmjax.create("bart", config, head="seq2seq_lm", rng=jax.random.key(0))
    good = {"input_ids": np.ones((2, 5), int), "decoder_start_token_id": 2}
    for change, words in (
        ({"input_ids": np.ones((2, 21), int)}, "21 tokens a row, more than the model's 20"),
        ({"decoder_start_token_id": None}, "give decoder_start_token_id"),
        ({"attention_mask": [[1, 1, 1, 1, 1], [0] * 5]}, r"rows \[1\] are empty"),
        ({"max_new_tokens": 20}, "21 positions, more than the model's 20"),
        ({"decoder_input_ids": np.ones((3, 1), int)}, "3 rows; input_ids has 2"),
        ({"input_ids": None}, "exactly one of input_ids and encoder_outputs"),
        ({"input_ids": None, "encoder_outputs": [[1.0] * 5] * 2}, r"must be \[B, S, D\]"),
        (
            {
                "input_ids": None,
                "encoder_outputs": np.ones((2, 3, 15)),
                "attention_mask": [[1, 0, 0], [0] * 3],
            },
            r"D=15; the encoder's is 16\n.*encoder_outputs of the rows \[1\]",
        ),
        (
            {"decoder_start_token_id": None, "bos_token_id": 47},
            r"bos_token_id.* \[47\], outside the vocabulary of 47",
        ),
        ({"max_new_tokens": 15, "draft": (model, variables)}, "5 drafted ones is 21 positions"),
    ):
        with pytest.raises(ValueError, match=words):
            fmjax.generate(model, variables, **good | change)
    # Up to the last position; the bucket of 24 is cut to the 20 there are.
    out = fmjax.generate(model, variables, **good, max_new_tokens=19)
    assert out.sequences.shape == (2, 20)
    # A limit of its own choice leaves drafts their room.
    config = GenerationConfig(max_length=20, decoder_start_token_id=2)
    plan = make_plan(
        model, variables, config, {}, input_ids=good["input_ids"], attention_mask=None,
        extra_columns=5,
    )  # fmt: skip
    assert (plan.limit, plan.capacity) == (14, 20)


def test_models_that_do_not_generate_are_refused():
    ids = np.ones((1, 4), np.int64)
    for family, config, head in (
        ("gpt2", CONFIG, "model"),
        ("bert", bert.VARIANTS["tiny"], "model"),
    ):
        model = fmjax.hub.family_of(family).Model(config, head=head)
        with pytest.raises(ValueError, match=f"{family} with the head '{head}' does not generate"):
            fmjax.generate(model, {}, ids)
    with pytest.raises(ValueError, match="stream with num_beams=1"):
        fmjax.stream(None, {}, ids, num_beams=2)


def test_numbers_of_numpy_and_jax_are_numbers():
    config = GenerationConfig(
        eos_token_id=np.int32(4), suppress_tokens=np.arange(2), top_p=np.float32(0.5),
        bad_words_ids=[jnp.arange(2)], pad_token_id=jnp.int32(3),
    )  # fmt: skip
    assert config == GenerationConfig(
        eos_token_id=4, suppress_tokens=[0, 1], top_p=0.5, bad_words_ids=[[0, 1]], pad_token_id=3
    )


def test_lengths(decoder):
    """New tokens by max_new_tokens, max_length, the default of 20, and what positions allow."""
    ids = np.ones((2, 10), np.int64)
    for options, expected in (
        ({}, 20),
        ({"max_new_tokens": 3}, 3),
        ({"max_length": 12}, 2),
        ({"generation_config": GenerationConfig(max_length=500)}, 22),
        ({"generation_config": GenerationConfig(max_length=12), "max_new_tokens": 5}, 5),
        ({"generation_config": GenerationConfig(max_new_tokens=12), "max_length": 13}, 3),
    ):
        out = fmjax.generate(*decoder, ids, **options)
        assert out.tokens.shape == (2, expected), options
    # What this call says counts, also against another kind of minimum.
    file = GenerationConfig(min_length=25)
    for options, least, most in (
        ({"max_new_tokens": 4, "min_new_tokens": 2}, 2, 4),
        ({"max_new_tokens": 4}, 15, 4),
        ({"max_length": 14}, 4, 4),
    ):
        config = file.replace(**options)
        plan = make_plan(*decoder, config, options, input_ids=ids, attention_mask=None)
        assert (minimum_new_tokens(config, 10), plan.limit) == (least, most), options
    file = GenerationConfig(min_new_tokens=9)
    assert file.replace(max_new_tokens=4).min_new_tokens == 4
    with pytest.raises(ValueError, match="min_new_tokens=9 is more than"):
        file.replace(max_new_tokens=4, min_new_tokens=9)
    long = np.ones((1, 25), np.int64)
    assert fmjax.generate(*decoder, long).tokens.shape == (1, 7)  # the default is cut


def test_options_of_files_that_do_nothing_are_ignored(decoder):
    config = GenerationConfig(temperature=0.5, length_penalty=2.0, eos_token_id=3)
    ids = np.ones((1, 4), np.int64)
    out = fmjax.generate(*decoder, ids, generation_config=config, max_new_tokens=3)
    plain = fmjax.generate(*decoder, ids, eos_token_id=3, max_new_tokens=3)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    sampled = GenerationConfig(do_sample=True, temperature=0.5)
    out = fmjax.generate(*decoder, ids, generation_config=sampled, do_sample=False)
    assert out.tokens.shape == (1, 20)


def test_padding_is_told_by_the_padding_token(decoder):
    ids = np.array([[7, 8, 9, 10], [0, 0, 9, 10]])
    told = fmjax.generate(*decoder, ids, pad_token_id=0, max_new_tokens=5)
    masked = fmjax.generate(*decoder, ids, attention_mask=ids != 0, max_new_tokens=5)
    np.testing.assert_array_equal(told.tokens, masked.tokens)
    whole = fmjax.generate(*decoder, ids, pad_token_id=0, eos_token_id=0, max_new_tokens=5)
    alone = fmjax.generate(*decoder, ids[1:], max_new_tokens=5, eos_token_id=0)
    np.testing.assert_array_equal(whole.tokens[1:], alone.tokens)


def test_convert_carries_the_options(decoder, tmp_path):
    fmjax.save(tmp_path / "a", *decoder)
    lines = convert_checkpoint(str(tmp_path / "a"), tmp_path / "b")
    assert not (tmp_path / "b" / "generation_config.json").exists()
    # Of an older checkpoint, from its config.json.
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    write(tmp_path / "a", "config.json", config | {"eos_token_id": 5, "num_beams": 2})
    convert_checkpoint(str(tmp_path / "a"), tmp_path / "c")
    expected = GenerationConfig(eos_token_id=5, num_beams=2)
    assert fmjax.load_generation_config(tmp_path / "c") == expected
    write(tmp_path / "a", "config.json", config | {"num_beam_groups": 2})
    with pytest.raises(ValueError, match="num_beam_groups=2 is not supported"):
        convert_checkpoint(str(tmp_path / "a"), tmp_path / "e")
    assert not (tmp_path / "e").exists()
    # And a file as it is, with what only others read.
    data = {"eos_token_id": 6, "transformers_version": "4.40.0"}
    write(tmp_path / "a", "generation_config.json", data)
    others = {"chat_template.jinja", "source.spm", "special_tokens_map.json"}
    for name in (*others, "flax_model.msgpack.index.json"):
        write(tmp_path / "a", name, {})
    lines = convert_checkpoint(str(tmp_path / "a"), tmp_path / "d")
    assert "generation_config.json" in lines[-1]
    assert json.loads((tmp_path / "d" / "generation_config.json").read_text()) == data
    files = {path.name for path in (tmp_path / "d").iterdir()}
    assert files == {"config.json", "model.safetensors", "generation_config.json"} | others
