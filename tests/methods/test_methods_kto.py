"""KTO against its formula in PyTorch, and the identities it must keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import fmjax
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
    def weighed(variables, coefficients, side):
        """The gradient of log-probabilities under coefficients, and they themselves."""

        def total(params):
            found = score({"params": params}, side, None).log_probs
            return jnp.sum(coefficients * found), found

        return jax.grad(total, has_aux=True)(variables["params"])

    def log_probs(variables, side):
        found = weighed(variables, np.zeros(B, np.float32), side)[1]
        return torch.tensor(np.asarray(found), dtype=torch.float64)

    def referred(batch, reference):
        """The batch with the reference's log-probabilities."""
        return batch | {
            f"ref_{kind}_logps": np.float32(log_probs(reference, rows(batch, kind)))
            for kind in ("completion", "mismatched")
        }

    return model, first, second, slope, weighed, log_probs, referred


def close_trees(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("swapped", [False, True])
def test_loss_and_gradient_equal_the_formula_in_pytorch(setting, swapped):
    """Once with a mean log-ratio of mismatched pairs above 0, once below; padding rows count for
    nothing, and no gradient goes through the reference point."""
    _, first, second, slope, weighed, log_probs, referred = setting
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

    grads, loss, aux = slope(policy, {}, referred(batch, reference), None)
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
    close_trees(grads["params"], weighed(policy, coefficients, rows(batch, "completion"))[0])


def test_the_two_cases_of_the_reference_point_are_both_seen(setting):
    _, first, second, *_, log_probs, _ = setting
    side = rows(make_batch(), "mismatched")
    assert abs((log_probs(first, side) - log_probs(second, side))[:4].mean()) > 1e-3


def test_a_policy_that_is_its_reference(setting):
    """Half of the weights, with the slope of a quarter of beta."""
    _, first, _, slope, weighed, _, referred = setting
    batch = make_batch()
    grads, loss, _ = slope(first, {}, referred(batch, first), None)
    weights = np.where(batch["desirable"] == 1, GOOD, BAD)
    np.testing.assert_allclose(loss, weights[:4].mean() / 2, rtol=1e-6)
    signs = np.where(batch["desirable"] == 1, -1, 1)
    coefficients = np.float32(signs * weights * BETA / 4 / 4 * batch["weight"])
    close_trees(grads["params"], weighed(first, coefficients, rows(batch, "completion"))[0])


@pytest.mark.slow
def test_a_reference_among_the_variables(setting):
    model, first, second, slope, _, _, referred = setting
    batch = make_batch()
    loss = jax.jit(kto_loss(model, beta=BETA, desirable_weight=GOOD, undesirable_weight=BAD))
    _, expected, _ = slope(second, {}, referred(batch, first), None)
    found, _ = loss({**second, "reference": first}, batch, None)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


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
