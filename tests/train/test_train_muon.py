"""Muon: orthogonal steps for the matrices of blocks, AdamW's for all else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fmjax
from fmjax.train import adamw, muon
from fmjax.train.optim import hidden_matrix
from fmjax.tree import flatten, stack_layers, unstack_layers


def variables_of_bert():
    config = fmjax.models.family_of("bert").Config(
        vocab_size=30, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=8,
    )  # fmt: skip
    return fmjax.create("bert", config, head="masked_lm", rng=jax.random.key(0))[1]["params"]


def updates_of(tx, params, seed=0):
    rng = np.random.default_rng(seed)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
    return tx.update(grads, tx.init(params), params)[0], grads


def test_matrices_take_orthogonal_steps_and_the_rest_adamws():
    params = variables_of_bert()
    rate, decay = 0.1, 0.01
    ours, _ = updates_of(muon(rate, weight_decay=decay), params)
    adamws, _ = updates_of(adamw(rate, weight_decay=decay), params)
    matrices = 0
    for path, update in flatten(ours).items():
        if not hidden_matrix(path):
            np.testing.assert_allclose(update, flatten(adamws)[path], rtol=1e-5, err_msg=path)
            continue
        matrices += 1
        step = update / rate + decay * flatten(params)[path]
        values = np.linalg.svd(step, compute_uv=False) / (0.2 * np.sqrt(max(step.shape)))
        # Five iterations of Newton-Schulz leave singular values between 0.5 and 1.5 (Jordan 2024),
        # and of the smallest ones of a gradient somewhat less.
        assert values.max() < 1.5, path
        assert np.median(values) > 0.5, path
    assert matrices == 3 * 6


def test_scanned_layers_take_the_same_steps():
    params = variables_of_bert()
    tx = muon(0.1)
    loop, grads = updates_of(tx, params)
    stacked = {"params": params}, {"params": grads}
    stacked_params, stacked_grads = (stack_layers(tree)["params"] for tree in stacked)
    scanned, _ = tx.update(stacked_grads, tx.init(stacked_params), stacked_params)
    again = flatten(unstack_layers({"params": scanned})["params"])
    for path, update in flatten(loop).items():
        np.testing.assert_allclose(again[path], update, atol=1e-5, err_msg=path)


def test_it_takes_a_schedule():
    params = variables_of_bert()
    tx = muon(optax.linear_schedule(0.0, 1.0, 10))
    first, _ = updates_of(tx, params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(first))
