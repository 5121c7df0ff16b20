"""Preference losses against their formulas in PyTorch, and the identities they must keep."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from composition import check_trains

import fmjax
from fmjax.data import encode_completions, encode_preferences
from fmjax.data.batches import batches
from fmjax.methods.preference import (
    dpo_loss,
    log_odds,
    orpo_loss,
    pair_rows,
    policy_of,
    reference_log_probs,
    reference_of,
    reward_loss,
    sequence_log_probs,
    simpo_loss,
    with_reference,
)
from fmjax.models import gpt2, llama
from fmjax.train import accumulate, cast, gradient

V, B = 31, 4
CONFIG = gpt2.Config(
    vocab_size=V, n_positions=16, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0,
)  # fmt: skip


def make_batch(rows=B, lengths=(9, 12), seed=0):
    """Pairs of different lengths, of which the first 3 tokens are the prompt."""
    draw = np.random.default_rng(seed)
    batch = {"weight": np.ones(rows, np.float32)}
    prompts = draw.integers(1, V, (rows, 3))
    for kind, length in zip(("chosen", "rejected"), lengths, strict=True):
        ids = draw.integers(1, V, (rows, length))
        ids[:, :3] = prompts
        sizes = draw.integers(5, length + 1, rows)
        mask = np.arange(length) < sizes[:, None]
        ids = np.where(mask, ids, 0).astype(np.int32)
        batch[f"{kind}_input_ids"] = ids
        batch[f"{kind}_attention_mask"] = mask.astype(np.int32)
        batch[f"{kind}_labels"] = np.where(mask & (np.arange(length) >= 3), ids, -100)
    return batch


def moved(variables, seed, scale=0.1):
    """The variables somewhere else."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + scale * draw.normal(size=x.shape).astype(np.float32), variables
    )


@pytest.fixture(scope="module")
def policy():
    return fmjax.create("gpt2", CONFIG, head="causal_lm", rng=jax.random.key(0))


@pytest.fixture(scope="module")
def sides(policy):
    """A policy beside another reference, a batch, and all log-probabilities by PyTorch."""
    model, reference = policy
    variables = {**moved(reference, 1), "reference": reference}
    batch = make_batch()
    found = {}
    for name, weights in (("policy", policy_of(variables)), ("reference", reference)):
        for kind in ("chosen", "rejected"):
            logits = model.apply(
                weights,
                input_ids=batch[f"{kind}_input_ids"],
                attention_mask=batch[f"{kind}_attention_mask"],
            ).logits
            log_p = torch.tensor(np.asarray(logits)).log_softmax(-1)[:, :-1]
            labels = torch.tensor(batch[f"{kind}_labels"], dtype=torch.long)[:, 1:]
            mask = labels != -100
            picked = log_p.gather(2, labels.clamp(min=0)[..., None])[..., 0] * mask
            found[name, kind] = picked.sum(1)
            found[kind, "tokens"] = mask.sum(1)
    return model, variables, batch, found


def test_log_probs_equal_pytorch(sides):
    model, variables, batch, found = sides
    rows = pair_rows(batch)
    assert rows["input_ids"].shape == (2 * B, 12)
    got = sequence_log_probs(model, chunk_size=8)(policy_of(variables), rows, None)
    for offset, kind in enumerate(("chosen", "rejected")):
        np.testing.assert_allclose(got.log_probs[offset::2], found["policy", kind], rtol=1e-5)
        np.testing.assert_array_equal(got.tokens[offset::2], found[kind, "tokens"])


def test_losses_equal_their_formulas_in_pytorch(sides):
    model, variables, batch, found = sides
    chosen, rejected = found["policy", "chosen"], found["policy", "rejected"]
    h = (chosen - found["reference", "chosen"]) - (rejected - found["reference", "rejected"])
    mean_chosen = chosen / found["chosen", "tokens"]
    mean_rejected = rejected / found["rejected", "tokens"]
    odds = torch.log(mean_chosen.exp() / (1 - mean_chosen.exp())) - torch.log(
        mean_rejected.exp() / (1 - mean_rejected.exp())
    )
    b = 0.3
    expected = {
        dpo_loss(model, beta=b): -F.logsigmoid(b * h),
        dpo_loss(model, beta=b, label_smoothing=0.2): (
            -0.8 * F.logsigmoid(b * h) - 0.2 * F.logsigmoid(-b * h)
        ),
        dpo_loss(model, beta=b, kind="ipo"): (h - 1 / (2 * b)) ** 2,
        dpo_loss(model, beta=b, kind="hinge"): torch.relu(1 - b * h),
        orpo_loss(model, odds_weight=0.7): -mean_chosen - 0.7 * F.logsigmoid(odds),
        simpo_loss(model, beta=1.7, margin=0.4): -F.logsigmoid(
            1.7 * (mean_chosen - mean_rejected) - 0.4
        ),
    }
    for loss, values in expected.items():
        got, aux = loss(variables, batch, None)
        np.testing.assert_allclose(got, values.mean(), rtol=1e-5)
        assert aux.weight == B
    _, aux = next(iter(expected))(variables, batch, None)
    rewards = b * (chosen - found["reference", "chosen"])
    np.testing.assert_allclose(aux.metrics["rewards/chosen"].value, rewards.mean(), rtol=1e-4)
    np.testing.assert_allclose(aux.metrics["margin"].value, b * h.mean(), rtol=1e-4)
    np.testing.assert_allclose(aux.metrics["accuracy"].value, (h > 0).float().mean())
    np.testing.assert_allclose(aux.metrics["nll"].value, -mean_chosen.mean(), rtol=1e-5)


def test_log_odds_and_their_slope_equal_pytorch_in_float64():
    values = np.float32([-80.0, -20, -3, -0.7, -0.5, -0.4, -1e-2, -1e-4, -1e-6])
    exact = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    odds = exact - torch.log(-torch.expm1(exact))
    odds.sum().backward()
    np.testing.assert_allclose(log_odds(jnp.asarray(values)), odds.detach(), rtol=1e-5)
    slope = jax.vmap(jax.grad(log_odds))(jnp.asarray(values))
    np.testing.assert_allclose(slope, exact.grad, rtol=1e-5)
    assert jax.grad(log_odds)(0.0) == 0  # as for a row of padding


def test_dpo_begins_at_log_2_with_the_gradient_of_the_log_probabilities(policy):
    """And swapping the two responses turns the gradient round."""
    model, plain = policy
    variables, batch, beta = with_reference(plain), make_batch(lengths=(12, 12)), 0.25

    def dpo(params, batch):
        return dpo_loss(model, beta=beta)({**variables, "params": params}, batch, None)[0]

    def advantage(params):
        found = sequence_log_probs(model)({"params": params}, pair_rows(batch), None).log_probs
        return jnp.mean(found[0::2] - found[1::2])

    slope = jax.jit(jax.value_and_grad(dpo))
    loss, grads = slope(plain["params"], batch)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    expected = jax.tree.map(lambda g: -beta / 2 * g, jax.jit(jax.grad(advantage))(plain["params"]))
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    other = {"chosen": "rejected", "rejected": "chosen"}
    swapped = {
        "_".join([other.get(first, first), *rest]): value
        for name, value in batch.items()
        for first, *rest in [name.split("_")]
    }
    _, turned = slope(plain["params"], swapped)
    for got, want in zip(jax.tree.leaves(turned), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(got, -want, rtol=1e-4, atol=1e-6)


def test_where_the_reference_comes_from(sides):
    model, variables, batch, found = sides
    loss = dpo_loss(model)
    known = reference_log_probs(model)(variables, batch)
    np.testing.assert_allclose(known["ref_chosen_logps"], found["reference", "chosen"], rtol=1e-5)
    value, _ = loss(variables, batch, None)
    precomputed, _ = loss(policy_of(variables), {**batch, **known}, None)
    np.testing.assert_allclose(precomputed, value, rtol=1e-5)
    adapted = {**policy_of(variables), "adapters": {"a": jnp.ones(3)}}
    assert reference_of(adapted) == policy_of(variables)
    np.testing.assert_allclose(loss(adapted, batch, None)[0], np.log(2), rtol=1e-5)
    assert reference_of(with_reference(adapted)).keys() == {"params", "adapters"}
    with pytest.raises(ValueError, match="there is no reference"):
        loss(policy_of(variables), batch, None)
    with pytest.raises(ValueError, match="a reference; give both"):
        loss(variables, {**batch, **known}, None)
    del known["ref_chosen_logps"]
    with pytest.raises(ValueError, match="give both"):
        loss(policy_of(variables), {**batch, **known}, None)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(dpo_loss, id="dpo", marks=pytest.mark.slow),  # sums, as in ORPO
        pytest.param(orpo_loss, id="orpo"),
    ],
)
def test_padding_rows_do_not_count(sides, make):
    model, variables, batch, _ = sides
    empty = {name: value[:2].copy() for name, value in batch.items()}
    for kind in ("chosen", "rejected"):
        empty[f"{kind}_labels"][:] = -100
        empty[f"{kind}_attention_mask"][:, 1:] = 0
    empty["weight"][:] = 0
    padded = {name: np.concatenate([batch[name], empty[name]]) for name in batch}
    trainable, others = policy_of(variables), {"reference": variables["reference"]}
    grad_fn = gradient(make(model))
    plain, value, aux = jax.jit(grad_fn)(trainable, others, batch, None)
    pieces = jax.jit(accumulate(grad_fn, 2))
    grads, loss, padded_aux = pieces(trainable, others, padded, None)
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    assert padded_aux.weight == aux.weight
    for name, mean in aux.metrics.items():
        np.testing.assert_allclose(padded_aux.metrics[name].value, mean.value, rtol=1e-4)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)


def test_reward_model(policy):
    """Against PyTorch's formula; the padding token says where a sequence ends."""
    model, variables = fmjax.create(
        "gpt2", CONFIG, head="sequence_classification", num_labels=1, rng=jax.random.key(1)
    )
    batch = {**make_batch(), "margin": np.float32([0, 0.5, 1, 2])}
    rewards = {}
    for kind in ("chosen", "rejected"):
        del batch[f"{kind}_labels"]
        ids, mask = batch[f"{kind}_input_ids"], batch[f"{kind}_attention_mask"]
        logits = model.apply(variables, input_ids=ids, attention_mask=mask).logits
        rewards[kind] = torch.tensor(np.asarray(logits)[:, 0])
    expected = -F.logsigmoid(
        rewards["chosen"] - rewards["rejected"] - torch.tensor(batch["margin"])
    ).mean()
    value, aux = reward_loss(model)(variables, batch, None)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    right = (rewards["chosen"] > rewards["rejected"]).float().mean()
    np.testing.assert_allclose(aux.metrics["accuracy"].value, right)
    check_trains(variables, reward_loss(model), optax.adam(1e-2), batch)
    with pytest.raises(ValueError, match="with one label"):
        reward_loss(policy[0])


@pytest.mark.slow
def test_dpo_accumulated_on_llama():
    config = dataclasses.replace(llama.VARIANTS["tiny"], attention_dropout=0.0)
    model, variables = fmjax.create("llama", config, head="causal_lm", rng=jax.random.key(0))
    state, losses = check_trains(
        with_reference(variables), dpo_loss(model, beta=0.5), optax.adam(3e-3), make_batch(),
        differentiate=lambda loss: accumulate(gradient(loss), 2), steps=4,
    )  # fmt: skip
    np.testing.assert_allclose(losses[0], np.log(2), rtol=1e-5)
    assert state.non_trainable.keys() == {"reference"}


@pytest.mark.slow
def test_dpo_in_bfloat16(policy):
    model, variables = policy
    loss = cast(dpo_loss(model, beta=0.5), jnp.bfloat16)
    _, losses = check_trains(
        with_reference(variables), loss, optax.adam(3e-3), make_batch(), steps=4
    )
    np.testing.assert_allclose(losses[0], np.log(2), rtol=1e-5)  # both policies are rounded alike


def test_bad_settings_are_refused(policy):
    model = policy[0]
    with pytest.raises(ValueError, match=r"beta=0 must be positive; label_smoothing=0.5 must"):
        dpo_loss(model, beta=0, label_smoothing=0.5)
    with pytest.raises(ValueError, match="label_smoothing is of kind='sigmoid'"):
        dpo_loss(model, label_smoothing=0.1, kind="ipo")
    with pytest.raises(ValueError, match="'odd' is not one of"):
        dpo_loss(model, kind="odd")
    with pytest.raises(ValueError, match="must not be negative"):
        orpo_loss(model, odds_weight=-1)
    with pytest.raises(ValueError, match="margin=-1 not negative"):
        simpo_loss(model, margin=-1)
    with pytest.raises(ValueError, match="'model'; log-probabilities"):
        dpo_loss(model.clone(head="model"))
    with pytest.raises(ValueError, match="the same names"):
        pair_rows({"chosen_input_ids": np.ones((1, 3)), "rejected_labels": np.ones((1, 3))})


@pytest.fixture(scope="module")
def tokenizer():
    from fmjax.data.tokenizer import train_tokenizer

    return train_tokenizer(["abab abc"], kind="bytebpe", vocab_size=258, max_length=16)


def test_encoded_preferences(tokenizer):
    texts = {"prompts": ["ab", "long prompt"], "chosen": [" c", " cab"], "rejected": [" d", " a"]}
    stream = batches(
        encode_preferences(tokenizer, **texts, max_length=8, vocab_size=258),
        batch_size=3, shuffle=False, epochs=1, buckets=[(8, 8)],
    )  # fmt: skip
    batch = next(stream)
    eos = tokenizer.eos_token_id
    shown = [
        tokenizer.decode(row[mask == 1])
        for kind in ("chosen", "rejected")
        for row, mask in zip(
            batch[f"{kind}_input_ids"][:2], batch[f"{kind}_attention_mask"][:2], strict=True
        )
    ]
    end = tokenizer.eos_token
    assert shown == [f"ab c{end}", f"mpt cab{end}", f"ab d{end}", f"mpt a{end}"]
    assert (
        batch["chosen_labels"][0].tolist()
        == [-100, -100, *tokenizer(" c")["input_ids"], eos] + [-100] * 3
    )
    assert batch["weight"].tolist() == [1, 1, 0]
    assert (batch["chosen_labels"][2] == -100).all()
    wrong = {
        "prompts": ["", "a", "b"],
        "chosen": ["x", "a", "abcdefgh"],
        "rejected": ["", "a", "b"],
    }
    with pytest.raises(ValueError, match=r"(?s)0: the prompt.*0: the rejected.*1: both.*2: a resp"):
        encode_preferences(tokenizer, **wrong, max_length=8)


def test_encoded_completions(tokenizer):
    """Mismatched are responses to the next other prompt, also round the end."""
    prompts = ["ab", "ab", "ba", "ab"]
    encoded = encode_completions(
        tokenizer, prompts, [" a", " b", " c", " d"], [True, False, True, True],
        max_length=8, vocab_size=258,
    )  # fmt: skip
    batch = next(batches(encoded, batch_size=5, shuffle=False, epochs=1, buckets=[(8, 8)]))
    end = tokenizer.eos_token
    shown = {
        kind: [
            tokenizer.decode(row[mask == 1]).removesuffix(end)
            for row, mask in zip(
                batch[f"{kind}_input_ids"][:4], batch[f"{kind}_attention_mask"][:4], strict=True
            )
        ]
        for kind in ("completion", "mismatched")
    }
    assert shown["completion"] == ["ab a", "ab b", "ba c", "ab d"]
    assert shown["mismatched"] == ["ab c", "ab c", "ba d", "ab c"]
    assert batch["desirable"][:4].tolist() == [1, 0, 1, 1]
    assert batch["weight"].tolist() == [1, 1, 1, 1, 0]
    with pytest.raises(ValueError, match=r"(?s)1: desirable is 2.*all 2 prompts are 'a'.*no token"):
        encode_completions(tokenizer, ["a", "a"], ["", "b"], [True, 2], max_length=8)
    with pytest.raises(ValueError, match="'desirable': 1"):
        encode_completions(tokenizer, ["a", "b"], ["a", "b"], [True], max_length=8)
