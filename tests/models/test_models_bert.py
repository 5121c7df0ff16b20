"""BERT against transformers' PyTorch BERT, from the same randomly drawn configs and weights."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from parity import assert_near, check_decoding, check_fixture, check_head, check_sizes, shuffled

import fmjax
from fmjax import hub
from fmjax.config import config_to_json, parse_config
from fmjax.models import bert
from fmjax.tree import count, flatten, unflatten

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


@st.composite
def configs(draw, head):
    heads = draw(st.integers(1, 3))
    causal = head == "causal_lm" and draw(st.booleans())
    return bert.Config(
        vocab_size=draw(st.integers(20, 60)),
        hidden_size=heads * draw(st.sampled_from([4, 8, 10])),
        num_hidden_layers=draw(st.integers(1, 2)),
        num_attention_heads=heads,
        intermediate_size=draw(st.integers(5, 40)),
        hidden_act=draw(st.sampled_from(["gelu", "gelu_new", "relu", "silu"])),
        max_position_embeddings=draw(st.integers(12, 20)),
        type_vocab_size=draw(st.integers(1, 3)),
        layer_norm_eps=draw(st.sampled_from([1e-12, 1e-5, 1e-2])),
        pad_token_id=draw(st.sampled_from([0, 3, None])),
        tie_word_embeddings=draw(st.booleans()),
        is_decoder=causal,
        add_cross_attention=causal and draw(st.booleans()),
        id2label=tuple("abcd"[: draw(st.integers(1, 4))])
        if head != "question_answering"
        else ("a", "b"),
    )


def draw_inputs(config, head, seed):
    rng = np.random.default_rng(seed)
    shape = (2, 3, 9) if head == "multiple_choice" else (2, 9)
    mask = np.ones(shape, np.int32)
    mask[1, ..., 6:] = 0
    inputs = {
        "input_ids": rng.integers(0, config.vocab_size, shape),
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, config.type_vocab_size, shape),
    }
    if config.pad_token_id is not None:
        inputs["input_ids"][..., 2] = config.pad_token_id  # its row must get no gradient
    if config.add_cross_attention:
        inputs["encoder_hidden_states"] = rng.normal(size=(2, 5, config.hidden_size))
        inputs["encoder_attention_mask"] = np.array([[1] * 5, [1, 1, 1, 0, 0]])
    return inputs


@pytest.mark.parametrize("head", bert.HEADS)
def test_equals_pytorch(head, tmp_path_factory):
    @settings(max_examples=2, phases=[Phase.explicit, Phase.generate])
    @given(configs(head), st.integers(0, 99))
    def check(config, seed):
        folder = tmp_path_factory.mktemp("bert")
        # The untied head has a bias of its own; PyTorch keeps, and writes, the other one too.
        unused = () if config.tie_word_embeddings else ("cls.predictions.bias",)
        inputs = draw_inputs(config, head, seed)
        check_head(bert, config, head, folder, inputs, seed=seed, unused=unused)

    check()


CONFIG_FIELDS = {field.name for field in dataclasses.fields(bert.Config)} - {"add_pooling_layer"}


@pytest.mark.parametrize(
    "name",
    [
        "bert-mlm-flax_safetensors",
        "bert-mlm-legacy",
        "bert-mlm-sharded_bin",
        "bert-mlm-sharded_msgpack",
        "bert-seqcls",
    ],
)
def test_fixtures_equal_their_recorded_pytorch_outputs(name):
    """Written by transformers 4.57.6 in old formats, with what its PyTorch classes computed."""
    check_fixture(FIXTURES / name)


def test_legacy_names_in_a_pytorch_bin(tmp_path):
    source = FIXTURES / "bert-mlm-legacy"
    for file in ("config.json", "pytorch_model.bin", "io.npz"):
        (tmp_path / file).write_bytes((source / file).read_bytes())
    check_fixture(tmp_path)


@pytest.fixture(scope="module")
def masked_lm():
    model, variables = fmjax.load(FIXTURES / "bert-mlm-legacy")
    return model, variables


def test_a_head_checkpoint_loads_into_the_bare_model_and_back(tmp_path):
    folder = FIXTURES / "bert-mlm-sharded_bin"  # has no pooler
    bare, variables = fmjax.load(folder, head="model")
    assert "pooler" not in variables["params"]
    ids = np.arange(12).reshape(2, 6)
    hidden = bare.apply(variables, input_ids=ids)
    assert hidden.pooler_output is None
    model, full = fmjax.load(folder)
    reference = model.apply(full, input_ids=ids, output_hidden_states=True).hidden_states[-1]
    np.testing.assert_array_equal(hidden.last_hidden_state, reference)
    fmjax.save(tmp_path, bare, variables)
    names = hub.open_checkpoint(tmp_path).tensors
    assert "embeddings.word_embeddings.weight" in names
    classifier, with_head = fmjax.load(
        tmp_path, head="sequence_classification", num_labels=3, new=("head/", "pooler/")
    )
    np.testing.assert_array_equal(
        with_head["params"]["embed"]["word"]["embedding"],
        full["params"]["embed"]["word"]["embedding"],
    )
    assert classifier.apply(with_head, input_ids=ids).logits.shape == (2, 3)


def test_new_heads_only_where_asked():
    folder = FIXTURES / "bert-mlm-sharded_bin"
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message is checked below
        fmjax.load(folder, head="sequence_classification", num_labels=3)
    for words in ("head/classifier/kernel", "pooler/kernel", "new="):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="tail/"):
        fmjax.load(folder, new=("tail/",))


def test_new_leaves_follow_the_key():
    folder, new = FIXTURES / "bert-mlm-legacy", ("head/", "pooler/")

    def kernel(rng):
        _, variables = fmjax.load(folder, head="next_sentence_prediction", new=new, rng=rng)
        return np.asarray(variables["params"]["head"]["seq_relationship"]["kernel"])

    assert np.array_equal(kernel(None), kernel(jax.random.key(0)))
    assert not np.array_equal(kernel(None), kernel(jax.random.key(1)))
    assert 0 < kernel(None).std() < 0.1


def test_dtype_scan_and_shardings_on_the_way_in(masked_lm):
    model, variables = masked_lm
    folder, ids = FIXTURES / "bert-mlm-legacy", np.arange(12).reshape(2, 6)
    low_model, low = fmjax.load(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {jnp.dtype(jnp.bfloat16)}
    logits = model.apply(variables, input_ids=ids).logits
    low_logits = low_model.apply(low, input_ids=ids).logits
    assert low_logits.dtype == jnp.float32
    assert_near(low_logits, logits, "bfloat16", tolerance=0.05)

    scanned, stacked = fmjax.load(folder, scan=True)
    kernel = stacked["params"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.shape == (model.config.num_hidden_layers, 36, 52)
    assert_near(scanned.apply(stacked, input_ids=ids).logits, logits, "scan")

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def places(abstract):
        spec = {True: jax.sharding.PartitionSpec("data"), False: jax.sharding.PartitionSpec()}
        return jax.tree.map(
            lambda leaf: jax.sharding.NamedSharding(mesh, spec[leaf.shape[0] % 4 == 0]), abstract
        )

    sharded_model, sharded = fmjax.load(folder, shardings=places)
    kernel = sharded["params"]["layers_0"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (9, 52)
    assert_near(sharded_model.apply(sharded, input_ids=ids).logits, logits, "sharded")


@pytest.mark.parametrize("scan", [False, True])
def test_cached_decoding_equals_the_full_pass(scan):
    config = bert.Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=12, is_decoder=True,
    )  # fmt: skip
    model, variables = fmjax.create(
        "bert", config, head="causal_lm", rng=jax.random.key(0), scan=scan
    )
    check_decoding(model, shuffled(variables))


def test_published_sizes():
    """Devlin et al. 2019: 110 M and 340 M; Turc et al. 2019, table 1: 4.4, 11.3, 29.1, 41.7 M.

    The papers round and count heads; exact numbers are transformers' own for the bare model.
    """
    published = {
        "tiny": 4.4,
        "mini": 11.3,
        "small": 29.1,
        "medium": 41.7,
        "base": 110,
        "large": 340,
    }
    assert bert.VARIANTS.keys() == published.keys()
    check_sizes(bert, dict.fromkeys(published, "BertModel"))
    for name, millions in published.items():
        ours = count(hub.abstract_variables(bert.Model(bert.VARIANTS[name])))
        assert abs(ours / 1e6 / millions - 1) < 0.02


def test_config_defaults_are_transformers_defaults():
    theirs = transformers.BertConfig().to_dict()
    ours = config_to_json(bert.Config(), {})
    for key in CONFIG_FIELDS - {"id2label", "problem_type"}:
        assert ours[key] == theirs[key], key
    assert parse_config(bert.Config, theirs, bert.FIXED) == bert.Config()


def test_every_config_field_is_live():
    """Changing a field changes the variables or the program; problem_type is the task's."""
    start = bert.Config(
        vocab_size=30, hidden_size=12, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=10, max_position_embeddings=9, is_decoder=True,
    )  # fmt: skip
    changes = {
        "vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 3,
        "intermediate_size": 11, "hidden_act": "relu", "hidden_dropout_prob": 0.2,
        "attention_probs_dropout_prob": 0.2, "max_position_embeddings": 10, "type_vocab_size": 3,
        "layer_norm_eps": 1e-3, "pad_token_id": None, "classifier_dropout": 0.3,
        "is_decoder": False, "add_cross_attention": True, "tie_word_embeddings": False,
        "add_pooling_layer": False, "id2label": ("a", "b", "c"), "initializer_range": 0.1,
    }  # fmt: skip
    assert changes.keys() == {f.name for f in dataclasses.fields(bert.Config)} - {"problem_type"}

    def describe(config, head):
        model = bert.Model(config, head=head)
        inputs = bert.inputs(config, head)

        def init_and_run(rng):
            variables = model.init(rng, **inputs)
            return variables, model.apply(variables, **inputs, train=True, rngs={"dropout": rng})

        return str(jax.make_jaxpr(init_and_run)(jax.random.key(0)))

    heads = ("masked_lm", "sequence_classification", "model")
    before = [describe(start, head) for head in heads]
    for name, value in changes.items():
        after = [describe(dataclasses.replace(start, **{name: value}), head) for head in heads]
        assert after != before, f"{name} changes nothing"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_sise": 3}, "hidden_sise=3 is not a key"),
        ({"position_embedding_type": "relative_key"}, "relative_key.*only 'absolute'"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"hidden_size": "36"}, "hidden_size='36' must be int"),
        ({"num_attention_heads": 5}, "not a multiple"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob=1.5"),
        ({"id2label": {"0": "a", "2": "b"}}, r"keys \[0, 2\]"),
        ({"model_type": "brt"}, "'brt' is not among the families"),
        ({"model_type": None}, "model_type=None"),
        ({"architectures": ["BertForEverything"]}, "say which head"),
        ({"num_hidden_layers": 2}, "layer.2"),
        ({"num_hidden_layers": 4}, "layers_3"),
        ({"intermediate_size": 50}, "52"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, words, tmp_path):
    source = FIXTURES / "bert-mlm-legacy"
    data = json.loads((source / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(data))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=words):
        fmjax.load(tmp_path)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "exactly one of input_ids"),
        ({"input_ids": np.zeros((1, 99), int)}, "max_position_embeddings"),
        ({"input_ids": np.zeros(3, int)}, r"\[B, T\]"),
        ({"input_ids": np.zeros((1, 3), int), "attention_mask": np.ones((1, 4))}, "attention_mask"),
        (
            {"input_ids": np.zeros((1, 3), int), "encoder_hidden_states": np.ones((1, 4, 36))},
            "add_cross_attention",
        ),
        ({"input_ids": np.zeros((1, 3), int), "cache": {}}, "is_decoder"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(masked_lm, inputs, words):
    model, variables = masked_lm
    with pytest.raises(ValueError, match=words):
        model.apply(variables, **inputs)


def test_save_refuses_other_variables_and_leaves_nothing(masked_lm, tmp_path):
    model, variables = masked_lm
    flat = flatten(variables)
    kernel = flat.pop("params/layers_0/attn/query/kernel")
    flat["params/layers_0/attn/query/kernal"] = kernel
    with pytest.raises(ValueError, match=r"kernel is missing\n.*kernal is not in the model"):
        fmjax.save(tmp_path / "out", model, unflatten(flat))
    assert not (tmp_path / "out").exists()


def test_create_names_what_it_does_not_know(rng):
    with pytest.raises(ValueError, match="no variant 'huge'"):
        fmjax.create("bert", "huge", rng=rng)
    with pytest.raises(ValueError, match="no head 'tail'"):
        fmjax.create("bert", "tiny", head="tail", rng=rng)
    with pytest.raises(ValueError, match="'brat' is not among"):
        fmjax.create("brat", "tiny", rng=rng)
    with pytest.raises(ValueError, match="neither a variant"):
        fmjax.create("bert", 3, rng=rng)
