import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmjax.tree import (
    count,
    flatten,
    map_with_path,
    merge,
    override,
    split,
    stack_layers,
    unflatten,
    unstack_layers,
)

trees = st.recursive(
    st.integers(),
    lambda inner: st.dictionaries(st.text("abc_0", min_size=1), inner, min_size=1, max_size=3),
).filter(lambda tree: isinstance(tree, dict))


@given(trees)
def test_flatten_and_unflatten_are_inverse(tree):
    assert unflatten(flatten(tree)) == tree


@given(trees, st.integers(0, 5))
def test_split_and_merge_are_inverse(tree, salt):
    first, second = split(tree, lambda path: (len(path) + salt) % 2 == 0)
    assert merge(first, second) == tree
    assert flatten(first).keys().isdisjoint(flatten(second))


def test_override_replaces_and_refuses():
    tree = {"a": {"b": 1, "c": 2}}
    assert override(tree, {"a": {"c": 3}}) == {"a": {"b": 1, "c": 3}}
    with pytest.raises(ValueError, match="a/d"):
        override(tree, {"a": {"d": 3}})
    with pytest.raises(ValueError, match="both trees have"):
        merge(tree, {"a": {"b": 1}})


@given(st.integers(1, 4))
def test_stack_and_unstack_are_inverse(layers):
    tree = {
        "params": {
            "embed": jnp.arange(3.0),
            **{f"layers_{i}": {"mlp": {"kernel": jnp.full((2, 3), i)}} for i in range(layers)},
        }
    }
    stacked = stack_layers(tree)
    assert stacked["params"]["layers"]["mlp"]["kernel"].shape == (layers, 2, 3)
    back = flatten(unstack_layers(stacked))
    assert back.keys() == flatten(tree).keys()
    for path, leaf in flatten(tree).items():
        np.testing.assert_array_equal(back[path], leaf)
    abstract = stack_layers(jax.eval_shape(lambda: tree))
    assert abstract["params"]["layers"]["mlp"]["kernel"].shape == (layers, 2, 3)


def test_a_missing_layer_is_named():
    with pytest.raises(ValueError, match=r"layers \[0, 2\]"):
        stack_layers({"layers_0": {"w": 1}, "layers_2": {"w": 1}})


def test_paths_reach_into_dataclasses_and_tuples():
    paths = []
    map_with_path(lambda path, leaf: paths.append(path), {"a": (1, {"b": 2})})
    assert paths == ["a/0", "a/1/b"]
    assert count({"a": jnp.ones((2, 3)), "b": jnp.ones(())}) == 7
