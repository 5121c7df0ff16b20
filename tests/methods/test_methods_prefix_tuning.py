"""Prefixes: what they compute, their gradients, generation, the network, files, refusals."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composition import check_trains
from parity import assert_near, torch_twin

import fmjax
from fmjax.methods import prefix_tuning, prompt_tuning
from fmjax.methods.selection import matching
from fmjax.models import family_of
from fmjax.nn.attention import Attention, Cache, attend
from fmjax.tasks import causal_lm
from fmjax.tree import flatten, stack_layers, unflatten, unstack_layers

IDS = np.random.default_rng(0).integers(5, 90, (2, 6)).astype(np.int32)
MASK = np.array([[1] * 6, [1] * 4 + [0] * 2], np.int32)
WORDS = np.array([11, 12, 13])
BEFORE = np.broadcast_to(WORDS, (2, 3))


@functools.cache
def made(model_type, head="causal_lm", scan=False):
    """A tiny model and its random variables."""
    config = family_of(model_type).VARIANTS["tiny"]
    return fmjax.create(model_type, config, head=head, scan=scan, rng=jax.random.key(0))


def test_a_query_sees_prefix_and_keys_by_hand():
    """Grouped heads, a mask, a bias, a cap of scores and probabilities, in numpy."""
    draw = np.random.default_rng(1)
    query = draw.normal(size=(2, 3, 4, 5))  # [B, T, H, K]
    key, value = draw.normal(size=(2, 2, 2, 6, 5))  # [B, G, S, K]
    before = Cache(*(jnp.asarray(x) for x in draw.normal(size=(2, 2, 4, 5))))  # [G, P, K]
    mask = draw.random((2, 1, 3, 6)) < 0.6
    bias = draw.normal(size=(1, 4, 3, 6))
    given = [jnp.asarray(x, jnp.float32) for x in (query, key, value)]
    out, probabilities = attend(
        *given, mask=jnp.asarray(mask), bias=jnp.asarray(bias), prefix=before, softcap=3.0,
        with_probabilities=True,
    )  # fmt: skip
    for b, t, h in np.ndindex(2, 3, 4):
        g = h // 2
        keys = np.concatenate([before.key[g], key[b, g]])
        values = np.concatenate([before.value[g], value[b, g]])
        scores = 3 * np.tanh(keys @ query[b, t, h] / np.sqrt(5) / 3)
        scores[4:] += bias[0, h, t]
        scores[4:][~mask[b, 0, t]] = -np.inf
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        np.testing.assert_allclose(probabilities[b, h, t], weights, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(out[b, t, h], weights @ values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_empty_prefix_is_none(scan):
    model, variables = made("llama", scan=scan)
    empty = prefix_tuning.create(model, variables, jax.random.key(0), length=0)
    run = functools.partial(model.apply, input_ids=IDS, attention_mask=MASK)
    chex.assert_trees_all_equal(run(empty).logits, run(variables).logits)


def test_a_prefix_of_no_weight_only_moves_positions():
    """Keys far from every query get no attention: the text stands P further, and no more."""
    model, variables = made("gpt2")
    tuned = prefix_tuning.create(model, variables, jax.random.key(0), length=2, stddev=1.0)
    bias = flatten(variables)["params/layers_0/attn/query/bias"]
    far = {}
    for path, leaf in flatten(tuned["adapters"]).items():
        far[f"adapters/{path}"] = -1e4 * jnp.ones_like(leaf) if "key" in path else leaf
    others = {
        path: jnp.full_like(bias, 10.0) if path.endswith("/query/bias") else leaf
        for path, leaf in flatten(variables).items()
    }
    shifted = jnp.broadcast_to(jnp.arange(6) + 2, (2, 6))
    plain = model.apply(unflatten(others), input_ids=IDS, position_ids=shifted).logits
    ours = model.apply(unflatten(others | far), input_ids=IDS).logits
    chex.assert_trees_all_close(ours, plain, atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "scan"),
    [
        ("gpt2", False),
        pytest.param("llama", True, marks=pytest.mark.slow),
        pytest.param("llama", False, marks=pytest.mark.slow),
        pytest.param("phi", False, marks=pytest.mark.slow),
        pytest.param("opt", False, marks=pytest.mark.slow),
        pytest.param("gpt_neox", False, marks=pytest.mark.slow),
    ],
)
def test_the_prefix_of_a_text_is_the_text(model_type, scan):
    """Forwards, and generated with a cache from prompts padded on the left."""
    model, variables = made(model_type, scan=scan)
    tuned = prefix_tuning.from_tokens(model, variables, WORDS)
    both = np.concatenate([BEFORE, IDS], axis=1)
    expected = model.apply(variables, input_ids=both).logits[:, 3:]
    assert_near(model.apply(tuned, input_ids=IDS).logits, expected, "logits")
    generated = fmjax.generate(model, tuned, IDS, max_new_tokens=5).sequences
    for _ in range(5):
        logits = jax.jit(lambda v, ids: model.apply(v, input_ids=ids).logits[:, -1])
        both = np.concatenate([both, np.asarray(logits(variables, both)).argmax(-1)[:, None]], 1)
        if scan:  # one program is enough to see
            break
    np.testing.assert_array_equal(generated[:, : both.shape[1] - 3], both[:, 3:])


def test_a_tuned_prompt_generates_as_a_prefix():
    model, variables = made("gpt2")
    prompted = prompt_tuning.create(variables, jax.random.key(1), length=3, init="random")
    ids = prompt_tuning.prompt_ids(prompted)[0]
    tuned = prefix_tuning.from_tokens(model, prompted, ids)
    words = jnp.concatenate([jnp.broadcast_to(ids, (2, 3)), IDS], axis=1)
    expected = model.apply(prompted, input_ids=words).logits[:, -1].argmax(-1)
    padded = np.pad(IDS, ((0, 0), (2, 0)))
    mask = np.pad(np.ones_like(IDS), ((0, 0), (2, 0)))
    found = fmjax.generate(model, tuned, padded, attention_mask=mask, max_new_tokens=1)
    np.testing.assert_array_equal(found.tokens[:, 0], expected)


def test_generation_leaves_room_for_the_prefix():
    model, variables = made("gpt2")
    most = model.config.n_positions
    tuned = prefix_tuning.create(model, variables, jax.random.key(0), length=8)
    with pytest.raises(ValueError, match=f"more than the model's {most - 8}"):
        fmjax.generate(model, tuned, IDS, max_new_tokens=most - 8)
    with pytest.raises(ValueError, match="more than the model's"):
        model.apply(tuned, input_ids=jnp.ones((1, most), jnp.int32))


@pytest.mark.slow
def test_prefixes_of_scanned_llama_train():
    model, variables = made("llama", scan=True)
    tuned = prefix_tuning.create(model, variables, jax.random.key(0), length=4, stddev=1.0)
    loss = causal_lm.loss(model, train=False)
    batch = {"input_ids": np.tile(IDS[:1], (2, 1)), "attention_mask": MASK}
    batch |= {"weight": np.array([1.0, 0.5])}
    state, _ = check_trains(
        tuned, loss, optax.adam(0.5), batch, is_trainable=matching(["adapters/*"], tuned),
        falls_to=0.96,
    )  # fmt: skip
    moved = flatten(state.trainable)
    assert all((np.asarray(moved[k]) != np.asarray(v)).any() for k, v in
               flatten({"adapters": tuned["adapters"]}).items())  # fmt: skip


@pytest.mark.slow
def test_the_network_is_what_it_makes():
    model, variables = made("gpt2", scan=True)
    network = prefix_tuning.create_network(
        model, variables, jax.random.key(0), length=3, hidden=5, width=4
    )
    parts = {k: np.asarray(v) for k, v in flatten(network["prefix_network"]).items()}
    folded = prefix_tuning.fold(network)
    assert set(folded) == {"params", "adapters"}
    hidden = np.tanh(parts["embedding"] @ parts["hidden/kernel"] + parts["hidden/bias"])
    place = "layers/attn/prefix_value"
    for layer in range(2):
        row = hidden @ parts[f"out/{place}/kernel"][layer] + parts[f"out/{place}/bias"][layer]
        np.testing.assert_allclose(
            flatten(folded)[f"adapters/{place}"][layer], row, rtol=1e-5, atol=1e-6
        )
    loss = causal_lm.loss(model, train=False)
    batch = {"input_ids": IDS, "weight": np.ones(2)}
    through = prefix_tuning.through_network(loss)
    chex.assert_trees_all_close(
        through(network, batch, None)[0], loss(folded, batch, None)[0], rtol=1e-6
    )
    slopes = jax.grad(lambda n: through({**variables, "prefix_network": n}, batch, None)[0])(
        network["prefix_network"]
    )
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(slopes))
    with pytest.raises(ValueError, match="no prefix_network"):
        prefix_tuning.fold(variables)


@pytest.mark.slow
def test_sides_of_an_encoder_decoder():
    """Each has its own, cross-attention none; one side may be left out."""
    model, variables = made("t5", "seq2seq_lm")
    tuned = prefix_tuning.create(
        model, variables, jax.random.key(0), length=2, stddev=1.0,
        where=lambda place: place.startswith("decoder/"),
    )  # fmt: skip
    assert set(flatten(tuned["adapters"])) == {
        f"decoder/layers_{i}/attn/prefix_{part}" for i in range(2) for part in ("key", "value")
    }
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4], "output_attentions": True}
    out = model.apply(tuned, **inputs)
    assert out.attentions[0].shape[-1] == 2 + 4
    assert out.cross_attentions[0].shape[-1] == 6
    chex.assert_trees_all_equal(
        out.encoder_last_hidden_state, model.apply(variables, **inputs).encoder_last_hidden_state
    )
    assert float(jnp.abs(out.logits - model.apply(variables, **inputs).logits).max()) > 1e-3


def test_prefixes_that_would_not_be_read():
    for model_type, head in (("deberta", "model"), ("longt5", "seq2seq_lm")):
        model, variables = made(model_type, head)
        with pytest.raises(ValueError, match=r"would not be read.*attention of its own"):
            prefix_tuning.create(model, variables, jax.random.key(0), length=2)
    model, variables = made("big_bird", "model")
    tuned = prefix_tuning.create(model, variables, jax.random.key(0), length=1)
    long = jnp.ones((1, model.config.max_position_embeddings - 1), jnp.int32)
    with pytest.raises(ValueError, match="block-sparse attention has no prefix"):
        jax.eval_shape(lambda: model.apply(tuned, input_ids=long))
    model, variables = made("resnet", "model")
    with pytest.raises(ValueError, match="no self-attention"):
        prefix_tuning.create(model, variables, jax.random.key(0), length=2)


def test_arguments_that_are_mistakes():
    model, variables = made("gpt2")
    tuned = prefix_tuning.create(model, variables, jax.random.key(0), length=2)
    with pytest.raises(ValueError, match="already"):
        prefix_tuning.create(model, tuned, jax.random.key(0), length=2)
    with pytest.raises(ValueError, match="length is -1"):
        prefix_tuning.create(model, variables, jax.random.key(0), length=-1)
    with pytest.raises(ValueError, match="hidden=0"):
        prefix_tuning.create_network(model, variables, jax.random.key(0), length=2, hidden=0)
    uneven = flatten(tuned)
    uneven["adapters/layers_0/attn/prefix_key"] = jnp.ones((3, 36))
    with pytest.raises(ValueError, match=r"lengths \[2, 3\]"):
        model.apply(unflatten(uneven), input_ids=IDS)
    layer = Attention(2)
    wrong = layer.init(jax.random.key(0), jnp.ones((1, 2, 4)), mask=None)
    wrong["adapters"] = {"prefix_key": jnp.ones((2, 5)), "prefix_value": jnp.ones((2, 5))}
    with pytest.raises(ValueError, match=r"\(2, 5\); it must be \[P, 4\]"):
        layer.apply(wrong, jnp.ones((1, 2, 4)), mask=None)
    encoder, others = made("bert", "model")
    with pytest.raises(ValueError, match="no decoder"):
        prefix_tuning.from_tokens(encoder, others, WORDS)
    biased, others = made("bloom")
    with pytest.raises(ValueError, match="biases or windows"):
        prefix_tuning.from_tokens(biased, others, WORDS)
    pair, others = made("t5", "seq2seq_lm")
    with pytest.raises(ValueError, match="encoder-decoders"):
        prefix_tuning.save("nowhere", pair, others)


@pytest.mark.parametrize("model_type", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_parity_with_the_cache_of_pytorch(model_type):
    """transformers, given the prefix as keys and values so far, as PEFT does."""
    import torch
    from transformers import DynamicCache

    family = family_of(model_type)
    twin = torch_twin(family, family.VARIANTS["tiny"], "causal_lm")
    model, variables = from_torch(twin)
    tuned = prefix_tuning.create(model, variables, jax.random.key(2), length=3, stddev=1.0)
    groups, size = model.cache_shape
    leaves = {k: torch.tensor(np.asarray(v)).requires_grad_() for k, v in
              flatten(tuned["adapters"]).items()}  # fmt: skip

    def heads(layer, part):
        rows = leaves[f"layers_{layer}/attn/prefix_{part}"].reshape(3, groups, size)
        return rows.transpose(0, 1)[None].expand(2, -1, -1, -1)

    pairs = [(heads(i, "key"), heads(i, "value")) for i in range(2)]
    mask = np.concatenate([np.ones((2, 3), int), MASK], axis=1)
    expected = twin(
        input_ids=torch.tensor(IDS).long(),
        attention_mask=torch.tensor(mask),
        past_key_values=DynamicCache(pairs),
    ).logits
    weights = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    weights *= MASK[:, :, None]
    (expected * torch.tensor(weights)).sum().backward()

    def weighed(adapters):
        logits = model.apply(
            {**variables, "adapters": adapters}, input_ids=IDS, attention_mask=MASK
        ).logits
        return (logits * weights).sum(), logits

    slopes, logits = jax.jit(jax.grad(weighed, has_aux=True))(tuned["adapters"])
    assert_near(logits * MASK[:, :, None], expected.detach().numpy() * MASK[:, :, None], "logits")
    largest = max(float(leaf.grad.abs().max()) for leaf in leaves.values())
    for path, slope in flatten(slopes).items():
        error = np.abs(slope - leaves[path].grad.numpy()).max() / largest
        assert error < 1e-5, (path, error)


def from_torch(twin):
    """Our model with the weights of PyTorch's."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        twin.save_pretrained(folder)
        return fmjax.load(folder, head="causal_lm")


@pytest.mark.parametrize(
    ("model_type", "scan"), [("llama", True), pytest.param("gpt2", False, marks=pytest.mark.slow)]
)
def test_folders_of_peft(model_type, scan, tmp_path):
    """Read as PEFT writes them, also of its network, and written as PEFT reads them."""
    peft = pytest.importorskip("peft")
    import torch

    family = family_of(model_type)
    twin = torch_twin(family, family.VARIANTS["tiny"], "causal_lm")
    model, variables = from_torch(twin)
    if scan:
        model, variables = model.clone(scan=True), stack_layers(variables)
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=4
    )
    theirs = peft.get_peft_model(twin, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    tuned = prefix_tuning.load(model, variables, tmp_path / "theirs")
    tensors = {"input_ids": torch.tensor(IDS).long(), "attention_mask": torch.tensor(MASK)}
    expected = theirs(**tensors).logits.detach().numpy()
    logits = model.apply(tuned, input_ids=IDS, attention_mask=MASK).logits
    assert_near(logits, expected, "logits")
    prefix_tuning.save(tmp_path / "ours", model, tuned)
    again = torch_twin(family, family.VARIANTS["tiny"], "causal_lm")
    back = peft.PeftModel.from_pretrained(again, tmp_path / "ours").eval()
    assert_near(back(**tensors).logits.detach().numpy(), expected, "back")


def test_our_folders_come_back(tmp_path):
    model, variables = made("llama", scan=True)
    tuned = prefix_tuning.create(model, variables, jax.random.key(0), length=3)
    folder = prefix_tuning.save(tmp_path / "prefix", model, tuned)
    back = prefix_tuning.load(model, variables, folder)
    chex.assert_trees_all_equal(back, tuned)
    loop = model.clone(scan=False)
    single = prefix_tuning.load(loop, unstack_layers(variables), folder)
    chex.assert_trees_all_equal(stack_layers(single), tuned)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"num_virtual_tokens": 2}))
    with pytest.raises(ValueError, match="prompt_embeddings has shape"):
        prefix_tuning.load(model, variables, folder)
    with pytest.raises(ValueError, match="there is no"):
        prefix_tuning.save(tmp_path / "none", model, variables)
    network = prefix_tuning.create_network(model, variables, jax.random.key(0), length=2, hidden=2)
    with pytest.raises(ValueError, match="fold the variables"):
        prefix_tuning.save(tmp_path / "none", model, network)
