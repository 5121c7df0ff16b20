"""A stack of blocks: what the compiler makes of its residual sums."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from fmjax.models import family_of
from fmjax.nn.norm import LayerNorm
from fmjax.nn.stack import LayerOutput, _computed_once, run_stack

WIDTH = 8


class Block(nn.Module):
    """Pre-norm: a residual sum of a product."""

    @nn.compact
    def __call__(self, hidden, cache, index, shared):
        kernel = self.param("kernel", nn.initializers.normal(), (WIDTH, WIDTH))
        return hidden + LayerNorm(1e-5)(hidden) @ kernel, LayerOutput()


class Stack(nn.Module):
    num_layers: int

    @nn.compact
    def __call__(self, hidden):
        return run_stack(Block, {}, hidden, None, num_layers=self.num_layers).hidden


def most_inputs(num_layers):
    """Of all fusions in the compiled gradient."""
    model = Stack(num_layers)
    x = jnp.ones((2, 16, WIDTH))
    variables = model.init(jax.random.key(0), x)
    grad = jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(model.apply(v, x)))))
    text = grad.lower(variables).compile().as_text()
    headers = re.findall(r"^%\S*fused_computation\S* \((.*)\) -> ", text, re.MULTILINE)
    return max(header.count("param") for header in headers)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what the CPU compiler does")
def test_no_fusion_grows_with_depth():
    assert most_inputs(12) == most_inputs(6)


@pytest.mark.parametrize("first", [0.0, -1.5, np.nan, np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_the_same(first, dtype):
    x = jnp.asarray([[first, 1.0, 1e-30], [3.0, -np.inf, 0.1]], dtype)
    for leaf, same in zip(_computed_once((x, x[0])), (x, x[0]), strict=True):
        assert leaf.dtype == dtype
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), np.asarray(same, np.float32))
    grad = jax.grad(lambda x: jnp.sum(3 * _computed_once(x)))(x)
    np.testing.assert_array_equal(np.asarray(grad, np.float32), 3.0)


def test_no_examples_give_no_outputs():
    """As in PyTorch, where an empty batch is a batch."""
    for name, head in (("vit", "image_classification"), ("gpt2", "causal_lm")):
        family = family_of(name)
        model = family.Model(family.VARIANTS["tiny"], head=head)
        inputs = {key: value[:0] for key, value in family.inputs(model.config, head).items()}
        logits = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), **inputs))[0]  # noqa: B023
        assert logits.logits.shape[0] == 0
