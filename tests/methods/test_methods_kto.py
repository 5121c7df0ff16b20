"""KTO against its formula in PyTorch, the identities it must keep, and its data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import fmjax
from fmjax.data import encode_completions
from fmjax.data.batches import batches
from fmjax.methods.kto import kto_loss, kto_losses
from fmjax.methods.preference import policy_of, sequence_log_probs
from fmjax.models import gpt2
from fmjax.train import gradient

V, B, T = 31, 6, 8
BETA, GOOD, BAD = 0.4, 1.3, 0.8
CONFIG = gpt2.Config(
    vocab_size=V, n_positions=16, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0,
)  # fmt: skip


def make_batch():
    """Responses of 2 to 5 tokens to prompts of 3; the last two rows are padding."""
    draw = np.random.default_rng(0)
    prompts = draw.integers(1, V, (B, 3))
    batch = {
        "desirable": np.array([1, 0, 0, 1, 1, 0]),
        "weight": np.float32([1, 1, 1, 1, 0, 0]),
    }
    for kind in ("completion", "mismatched"):
        ids = np.concatenate([prompts, draw.integers(1, V, (B, T - 3))], axis=1)
        mask = np.arange(T) < draw.integers(5, T + 1, B)[:, None]
        batch[f"{kind}_input_ids"] = np.where(mask, ids, 0).astype(np.int32)
        batch[f"{kind}_attention_mask"] = mask.astype(np.int32)
        batch[f"{kind}_labels"] = np.where(mask & (np.arange(T) >= 3), ids, -100)
    return batch


def rows(batch, kind):
    return {name: batch[f"{kind}_{name}"] for name in ("input_ids", "attention_mask", "labels")}


@pytest.fixture(scope="module")
def setting():
    """A model, two sets of its variables, and compiled functions of them."""
    model, first = fmjax.create("gpt2", CONFIG, head="causal_lm", rng=jax.random.key(0))
    draw = np.random.default_rng(1)
    second = jax.tree.map(lambda x: x + 0.1 * draw.normal(size=x.shape).astype(np.float32), first)
    loss = kto_loss(model, beta=BETA, desirable_weight=GOOD, undesirable_weight=BAD)
    slope = jax.jit(gradient(loss))
    score = sequence_log_probs(model)

    @jax.jit
    def weighed(params, coefficients, batch):
        """The gradient of log-probabilities under coefficients."""

        def total(params):
            found = score({"params": params}, rows(batch, "completion"), None)
            return jnp.sum(coefficients * found.log_probs)

        return jax.grad(total)(params)

    apply = jax.jit(lambda variables, ids, mask: model.apply(
        variables, input_ids=ids, attention_mask=mask).logits)  # fmt: skip

    def log_probs(variables, side):
        """By PyTorch, in float64, from the logits."""
        logits = apply(variables, side["input_ids"], side["attention_mask"])
        log_p = torch.tensor(np.asarray(logits), dtype=torch.float64).log_softmax(-1)[:, :-1]
        labels = torch.tensor(side["labels"], dtype=torch.long)[:, 1:]
        picked = log_p.gather(2, labels.clamp(min=0)[..., None])[..., 0]
        return (picked * (labels != -100)).sum(1)

    return model, first, second, slope, weighed, log_probs


def close_trees(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("swapped", [False, True])
def test_loss_and_gradient_equal_the_formula_in_pytorch(setting, swapped):
    """Once with a mean log-ratio of mismatched pairs above 0, once below; padding rows count for
    nothing, and no gradient goes through the reference point."""
    _, first, second, slope, weighed, log_probs = setting
    policy, reference = (second, first) if swapped else (first, second)
    batch = make_batch()
    drift = log_probs(policy, rows(batch, "mismatched")) - log_probs(
        reference, rows(batch, "mismatched")
    )
    point = drift[:4].mean().clamp(min=0)
    ratio = (
        log_probs(policy, rows(batch, "completion"))
        - log_probs(reference, rows(batch, "completion"))
    )[:4].requires_grad_()
    good = torch.tensor(batch["desirable"][:4]) == 1
    value = torch.where(
        good,
        GOOD * torch.sigmoid(BETA * (ratio - point)),
        BAD * torch.sigmoid(BETA * (point - ratio)),
    )
    expected = (torch.where(good, GOOD, BAD) - value).mean()
    expected.backward()

    grads, loss, aux = slope({"params": policy["params"]}, {"reference": reference}, batch, None)
    assert aux.weight == 4
    np.testing.assert_allclose(loss, expected.detach(), rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["reference_point"].value, point, rtol=1e-4, atol=1e-6)
    assert (float(point) > 0) == (float(drift[:4].mean()) > 0)
    for name, chosen in (("desirable", good), ("undesirable", ~good)):
        np.testing.assert_allclose(
            aux.metrics[f"rewards/{name}"].value,
            BETA * ratio.detach()[chosen].mean(),
            rtol=1e-4,
        )
    assert ratio.grad is not None
    coefficients = np.concatenate([ratio.grad.numpy(), np.zeros(2)]).astype(np.float32)
    close_trees(grads["params"], weighed(policy["params"], coefficients, batch))


def test_the_two_cases_of_the_reference_point_are_both_seen(setting):
    _, first, second, *_, log_probs = setting
    side = rows(make_batch(), "mismatched")
    assert abs((log_probs(first, side) - log_probs(second, side))[:4].mean()) > 1e-3


def test_a_policy_that_is_its_reference(setting):
    """Half of the weights, with the slope of a quarter of beta."""
    _, first, _, slope, weighed, _ = setting
    batch = make_batch()
    grads, loss, _ = slope({"params": first["params"]}, {"reference": first}, batch, None)
    weights = np.where(batch["desirable"] == 1, GOOD, BAD)
    np.testing.assert_allclose(loss, weights[:4].mean() / 2, rtol=1e-6)
    signs = np.where(batch["desirable"] == 1, -1, 1)
    coefficients = np.float32(signs * weights * BETA / 4 / 4 * batch["weight"])
    close_trees(grads["params"], weighed(first["params"], coefficients, batch))


def test_values_saturate_without_cancellation():
    ratios = jnp.float32([60.0, -60.0, 0.0, 0.0])
    losses = kto_losses(ratios, jnp.float32(0.0), jnp.array([1, 0, 1, 0]), beta=1.0)
    np.testing.assert_allclose(losses[:2], np.exp(-60.0), rtol=1e-5)
    np.testing.assert_array_equal(losses[2:], 0.5)


def test_bad_settings_are_refused(setting):
    model, first, *_ = setting
    with pytest.raises(ValueError, match="beta=0, undesirable_weight=-1 must be positive"):
        kto_loss(model, beta=0, undesirable_weight=-1)
    with pytest.raises(ValueError, match="'model'; log-probabilities"):
        kto_loss(model.clone(head="model"))
    batch = make_batch()
    with pytest.raises(ValueError, match="there is no reference"):
        kto_loss(model)(policy_of(first), batch, None)
    with pytest.raises(ValueError, match="completion_input_ids and mismatched_input_ids"):
        kto_loss(model)({**first, "reference": first}, {"desirable": batch["desirable"]}, None)
    del batch["desirable"]
    with pytest.raises(ValueError, match="no 'desirable'"):
        kto_loss(model)(first, batch, None)


def test_encoded_completions():
    """Mismatched are responses to the next other prompt, also round the end."""
    from fmjax.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["abab abc"], kind="bytebpe", vocab_size=258, max_length=16)
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
    assert batch["desirable"].tolist() == [1, 0, 1, 1, 0]
    assert batch["weight"].tolist() == [1, 1, 1, 1, 0]
    with pytest.raises(ValueError, match=r"(?s)1: desirable is 2.*all 2 prompts are 'a'.*no token"):
        encode_completions(tokenizer, ["a", "a"], ["", "b"], [True, 2], max_length=8)
    with pytest.raises(ValueError, match="'desirable': 1"):
        encode_completions(tokenizer, ["a", "b"], ["a", "b"], [True], max_length=8)
