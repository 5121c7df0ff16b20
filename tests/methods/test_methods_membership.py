"""Audits: scores by hand, models side by side as alone, and bounds that hold."""

import chex
import jax
import numpy as np
import optax
import pytest
from methods.test_methods_privacy import loss_fn, make_batch, make_params
from scipy import stats

from fmjax.methods.ensembles import member_state, member_states, of_members
from fmjax.methods.membership import (
    attack_metrics,
    epsilon_lower_bound,
    example_losses,
    fair_coins,
    likelihood_ratio,
    logit_confidence,
    shadow_step,
    threshold_advantage,
)
from fmjax.methods.privacy import private_gradient
from fmjax.train import init_state, make_train_step
from fmjax.tree import merge


def plain_loss(variables, batch, rng):
    return loss_fn(variables, batch, None)


def test_models_side_by_side_train_as_alone_without_what_they_must_not_see():
    params, tx = make_params(), optax.adam(0.1)
    frozen = {path: params["params"][path] for path in ("layers_0",)}
    grad_fn = private_gradient(
        plain_loss, clip_norm=1.0, noise_multiplier=0.5, expected_batch_size=8
    )
    step = make_train_step(grad_fn, tx)

    def make(rng):
        return init_state(params, tx, rng, lambda path: "head" in path)

    keys = jax.random.split(jax.random.key(1), 4)
    included = fair_coins(4, 30, seed=2)
    batches = []
    for number in range(3):
        rows = np.random.default_rng(number).permutation(30)[:16].astype(np.int32)
        rows[-3:] = -1
        weight = np.where(rows < 0, 0.0, 1.0).astype(np.float32)
        batches.append(make_batch(number) | {"index": rows, "weight": weight})
    states = member_states(make, keys)
    chex.assert_trees_all_equal(states.non_trainable, {"params": frozen})  # once, for all models
    together = jax.jit(shadow_step(step, included))
    for batch in batches:
        states, metrics = together(states, batch)
    losses = jax.jit(of_members(example_losses(plain_loss)))(states, batches[0])
    for number in (0, 3):
        state = make(keys[number])
        for batch in batches:
            mine = included[number][batch["index"]] & (batch["index"] >= 0)
            state, _ = jax.jit(step)(state, batch | {"weight": mine.astype(np.float32)})
        mine = member_state(states, number)
        chex.assert_trees_all_close(mine.trainable, state.trainable, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(mine.opt_state, state.opt_state, rtol=1e-5, atol=1e-6)
        alone = example_losses(plain_loss)(merge(state.trainable, state.non_trainable), batches[0])
        np.testing.assert_allclose(losses[:, number], alone, rtol=1e-4, atol=1e-6)
    last = batches[-1]["index"]
    assert float(metrics["loss"].weight) == (included[:, last] & (last >= 0)).sum()


def test_fair_coins_have_every_example_in_half_of_the_models():
    included = fair_coins(6, 1000)
    np.testing.assert_array_equal(included.sum(axis=0), 3)
    assert abs(included.mean(axis=1) - 0.5).max() < 0.08
    with pytest.raises(ValueError, match="shadows=5"):
        fair_coins(5, 10)


def test_likelihood_ratios_are_those_of_normal_densities():
    draw = np.random.default_rng(0)
    included = fair_coins(80, 5, seed=1)
    shadows = draw.normal(size=(80, 5)) * [1, 2, 3, 1, 2] + included * 1.5
    target = draw.normal(size=5)
    online = likelihood_ratio(target, shadows, included)
    offline = likelihood_ratio(target, shadows, included, online=False)
    few = likelihood_ratio(target, shadows[:60], included[:60], online=False)
    for i in range(5):
        ins, outs = shadows[included[:, i], i], shadows[~included[:, i], i]
        density = lambda values: stats.norm(values.mean(), values.std(ddof=1)).logpdf(target[i])  # noqa: B023, E731
        np.testing.assert_allclose(online[i], density(ins) - density(outs), rtol=1e-9)
        chance = stats.norm(outs.mean(), outs.std(ddof=1)).cdf(target[i])
        np.testing.assert_allclose(stats.norm.cdf(offline[i]), chance, rtol=1e-9)
    rest = [shadows[:60][~included[:60, i], i] for i in range(5)]
    variance = sum(((x - x.mean()) ** 2).sum() for x in rest) / sum(len(x) - 1 for x in rest)
    means = np.array([x.mean() for x in rest])
    np.testing.assert_allclose(few, (target - means) / np.sqrt(variance), rtol=1e-9)
    p = np.array([0.3, 0.999])
    np.testing.assert_allclose(logit_confidence(-np.log(p)), np.log(p / (1 - p)), rtol=1e-9)
    assert np.isfinite(logit_confidence(np.array([0.0, 800.0]))).all()


def test_attacks_are_worth_what_their_curve_says():
    members, others = np.array([3.0, 2, 2, 1]), np.array([2.0, 1, 0, 0])
    metrics = attack_metrics(members, others, at=(0.0, 0.25, 0.3))
    pairs = np.subtract.outer(members, others)
    assert metrics["auc"] == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    assert metrics["advantage"] == pytest.approx(3 / 4 - 1 / 4)
    assert metrics["tpr_at_0"] == 0.25
    assert metrics["tpr_at_0.25"] == metrics["tpr_at_0.3"] == 0.75
    assert threshold_advantage(np.array([0.0, 1, 5]), np.array([0.0, 3, 4])) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="1 of the scores are nan"):
        attack_metrics(members, np.array([np.nan]))
    with pytest.raises(ValueError, match="4 members and 0 others"):
        attack_metrics(members, others[:0])


def test_shadow_models_that_do_not_cover_the_examples_are_refused():
    included = fair_coins(4, 3)
    with pytest.raises(ValueError, match=r"must be \[N\], \[K, N\]"):
        likelihood_ratio(np.zeros(3), np.zeros((4, 2)), included)
    included[:, 1] = True
    with pytest.raises(ValueError, match="1 examples, which fewer than 1 shadow models leave out"):
        likelihood_ratio(np.zeros(3), np.zeros((4, 3)), included)


def test_bounds_on_epsilon_hold_and_are_not_empty():
    pytest.importorskip("jax_privacy", reason="needs fmjax[privacy]")
    # Randomised response with epsilon 2: the truth is told with probability e^2 / (1 + e^2).
    draw = np.random.default_rng(0)
    truth = np.arange(4000) < 2000
    told = np.where(draw.random(4000) < 1 / (1 + np.exp(-2.0)), truth, ~truth).astype(float)
    for one_run in (True, False):
        bound = epsilon_lower_bound(told[truth], told[~truth], delta=1e-5, one_run=one_run)
        assert 1.7 < bound < 2.0
    # By hand: each rate at half of the 5 %, divided among three thresholds: two and infinity.
    n = 2000
    tp, fp = int(told[truth].sum()), int(told[~truth].sum())
    level = 0.05 / 2 / 3
    low = stats.beta.ppf(level, tp, n - tp + 1)
    high = stats.beta.ppf(1 - level, fp + 1, n - fp)
    assert bound == pytest.approx(np.log((low - 1e-5) / high))
    random = draw.normal(size=4000)
    assert epsilon_lower_bound(random[truth], random[~truth], delta=1e-5) < 0.3
    with pytest.raises(ValueError, match="delta=0"):
        epsilon_lower_bound(told[truth], told[~truth], delta=0)
