"""BERT against transformers' PyTorch BERT, from the same randomly drawn configs and weights."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import fmjax
from fmjax import hub
from fmjax.config import config_to_json, parse_config
from fmjax.models import bert
from fmjax.tree import flatten, unflatten
from fmjax.weights import export_params

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
OUTPUTS = (
    "logits",
    "last_hidden_state",
    "pooler_output",
    "prediction_logits",
    "seq_relationship_logits",
    "start_logits",
    "end_logits",
)


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


def torch_twin(config, head, seed):
    """transformers' model of the same config, in float64, every weight random."""
    data = config_to_json(config, {})
    del data["label2id"]
    hf = transformers.BertConfig(**data, attn_implementation="eager")
    torch.manual_seed(seed)
    twin = getattr(transformers, bert.HEADS[head])(hf).eval()
    for parameter in twin.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return twin


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


def assert_near(ours, reference, what, tolerance=1e-5):
    """Within `tolerance` of the reference's largest value."""
    reference = np.asarray(reference)
    scale = max(np.abs(reference).max(), 1e-6)
    error = np.abs(np.asarray(ours, np.float64) - reference).max() / scale
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("head", bert.HEADS)
def test_equals_pytorch(head, tmp_path_factory):
    @settings(max_examples=2, phases=[Phase.explicit, Phase.generate])
    @given(configs(head), st.integers(0, 99))
    def check(config, seed):
        twin = torch_twin(config, head, seed)
        folder = tmp_path_factory.mktemp("bert")
        twin.save_pretrained(folder)
        model, variables = fmjax.load(folder)
        assert model.head == head
        assert model.config == config
        check_numbers(model, variables, twin, draw_inputs(config, head, seed))
        check_round_trip(model, variables, twin, folder, tmp_path_factory.mktemp("saved"))

    check()


def check_numbers(model, variables, twin, inputs):
    twin = twin.double()
    reference = twin(
        **{
            k: torch.tensor(v).double() if v.dtype == np.float64 else torch.tensor(v)
            for k, v in inputs.items()
        },
        output_hidden_states=True,
        output_attentions=True,
    )
    rng = np.random.default_rng(0)
    names = [name for name in OUTPUTS if reference.get(name) is not None]
    weights = {name: rng.normal(size=tuple(reference[name].shape)) for name in names}

    def run(variables):
        out = model.apply(variables, **inputs, output_hidden_states=True, output_attentions=True)
        total = sum(jnp.vdot(getattr(out, name), weights[name]) for name in names)
        return total, out

    (_, out), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(variables)
    for name in OUTPUTS:
        ours = getattr(out, name)
        assert (ours is None) == (name not in names), name
        if ours is not None:
            assert_near(ours, reference[name].detach(), name)
    pairs = {
        "hidden": (out.hidden_states, reference.hidden_states),
        "attention": (out.attentions, reference.attentions),
    }
    if model.config.add_cross_attention:
        pairs["cross-attention"] = (out.cross_attentions, reference.cross_attentions)
    for what, (ours, theirs) in pairs.items():
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_near(mine, other.detach(), f"{what} {i}")

    sum((reference[name] * torch.tensor(weights[name])).sum() for name in names).backward()
    theirs = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    largest = max(float(g.abs().max()) for g in theirs.values())
    table = bert.rules(model.config, model.head)
    ours = {tensor.name: tensor.read() for tensor in export_params(table, flatten(grads))}
    assert theirs.keys() <= ours.keys()
    for name, grad in theirs.items():
        # Relative to the tensor's largest gradient, or to a hundredth of the model's largest: a key
        # bias has no effect on a softmax, so its gradient is rounding noise around 0 (and those
        # of query and key kernels are sums that nearly cancel); 1e-4 there instead of 1e-2 fails.
        scale = max(float(grad.abs().max()), 1e-2 * largest)
        error = np.abs(ours[name] - grad.numpy()).max() / scale
        assert error <= 1e-5, f"gradient of {name}: relative error {error:.2e}"


def check_round_trip(model, variables, twin, original, folder):
    fmjax.save(folder, model, variables)
    again, info = type(twin).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    before = type(twin).from_pretrained(original).state_dict()
    for name, tensor in again.state_dict().items():
        if name == "cls.predictions.bias" and not model.config.tie_word_embeddings:
            continue  # not used by the untied head; the decoder's own bias is written for it
        assert torch.equal(tensor, before[name]), name
    model_again, variables_again = fmjax.load(folder)
    assert model_again == model
    flat = flatten(variables_again)
    for path, leaf in flatten(variables).items():
        np.testing.assert_array_equal(flat[path], leaf)
    assert {k: v for k, v in again.config.to_dict().items() if k in CONFIG_FIELDS} == {
        k: v for k, v in twin.config.to_dict().items() if k in CONFIG_FIELDS
    }


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
    model, variables = fmjax.load(FIXTURES / name)
    check_fixture(name, model, variables)


def test_legacy_names_in_a_pytorch_bin(tmp_path):
    source = FIXTURES / "bert-mlm-legacy"
    for file in ("config.json", "pytorch_model.bin"):
        (tmp_path / file).write_bytes((source / file).read_bytes())
    model, variables = fmjax.load(tmp_path)
    check_fixture("bert-mlm-legacy", model, variables)


def check_fixture(name, model, variables):
    io = np.load(FIXTURES / name / "io.npz")
    inputs = {
        key.removeprefix("in."): io[key]
        for key in io.files
        if key.startswith("in.") and key != "in.labels"
    }
    out = model.apply(variables, **inputs, output_hidden_states=True, output_attentions=True)
    checked = 0
    for key in io.files:
        field, _, index = key.removeprefix("pt.").partition(".")
        if not key.startswith("pt.") or field == "loss":
            continue
        ours = getattr(out, field) if not index else getattr(out, field)[int(index)]
        assert_near(ours, io[key], key, tolerance=2e-4)
        checked += 1
    assert checked >= 5


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


def test_cached_decoding_equals_the_full_pass():
    config = bert.Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=12, is_decoder=True,
    )  # fmt: skip
    for scan in (False, True):
        model, variables = fmjax.create(
            "bert", config, head="causal_lm", rng=jax.random.key(0), scan=scan
        )
        ids = np.random.default_rng(0).integers(0, 50, (2, 9))
        full = jax.jit(lambda v, ids, m=model: m.apply(v, input_ids=ids).logits)(variables, ids)

        @jax.jit
        def decode(variables, ids, cache, model=model):
            out = model.apply(variables, input_ids=ids, cache=cache)
            return out.logits, out.cache

        cache, parts = model.init_cache(2, 11), []
        for start, end in ((0, 4), (4, 5), (5, 6), (6, 9)):
            logits, cache = decode(variables, ids[:, start:end], cache)
            parts.append(logits)
        assert int(cache["length"]) == 9
        assert_near(np.concatenate(parts, axis=1), full, "cached")
        changed = ids.copy()
        changed[:, 6:] = 0
        after = model.apply(variables, input_ids=changed).logits
        np.testing.assert_allclose(after[:, :6], full[:, :6], atol=1e-6)  # causal


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
    for name, config in bert.VARIANTS.items():
        abstract = hub.abstract_variables(bert.Model(config))
        ours = sum(leaf.size for leaf in jax.tree.leaves(abstract))
        data = config_to_json(config, {})
        with torch.device("meta"):
            twin = transformers.BertModel(transformers.BertConfig(**data))
        assert ours == sum(p.numel() for p in twin.parameters())
        assert abs(ours / 1e6 / published[name] - 1) < 0.02


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
