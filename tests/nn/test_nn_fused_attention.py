"""Fused attention: called as the plain one, equal to it, and chosen where it may be."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmjax
from fmjax.models import llama
from fmjax.nn.attention import attend
from fmjax.nn.fused_attention import attention_kernel, fused
from fmjax.nn.mask import Mask, make_attention_mask

B, T, H, G, K = 2, 16, 4, 2, 8
PADDING = np.ones((B, T), bool)
PADDING[1, 10:] = False  # on the right: every causal query sees a key
MASKS = {
    "none": {"causal": False},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 4},
    "padding": {"causal": False, "mask": jnp.asarray(PADDING)},
    "padding, causal window": {"causal": True, "window": 5, "mask": jnp.asarray(PADDING)},
    "padding, both ways": {"causal": False, "window": 3, "mask": jnp.asarray(PADDING)},
}


ODD = T - 1


def made(name: str, length: int = T) -> Mask | None:
    what = {"mask": None} | MASKS[name]
    if what["mask"] is not None:
        what["mask"] = what["mask"][:, :length]
    return make_attention_mask(**what, query_length=length, key_length=length)


def operands(dtype=jnp.float32, size: int = K, length: int = T):
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (B, length, H, size), dtype)
    key, value = (jax.random.normal(k, (B, G, length, size), dtype) for k in keys[1:3])
    return query, key, value, jax.random.normal(keys[3], (1, H, length, length), dtype)


def outputs_and_gradients(kernel, name: str, dtype, length: int = T):
    """Of a weighted sum of what tokens that are not padding attend to."""
    mask, with_bias = made(name, length), name.startswith("padding")
    query, key, value, bias = operands(dtype, length=length)
    tokens = jnp.asarray(PADDING[:, :length], dtype)[..., None, None]
    weight = tokens * jnp.cos(jnp.arange(K)).astype(dtype)

    def total(query, key, value, bias):
        out, _ = attend(query, key, value, mask=mask, bias=bias if with_bias else None, scale=0.3)
        return (out * weight).sum().astype(jnp.float32), out

    with attention_kernel(kernel), jax.default_matmul_precision("highest"):
        grad = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))
        gradients, out = grad(query, key, value, bias)
    return out * tokens, gradients


CASES = [(name, T) for name in MASKS] + [("none", ODD), ("padding, causal window", ODD)]


@pytest.mark.parametrize(("name", "length"), CASES)
def test_the_fused_call_is_the_plain_attention(name: str, length: int) -> None:
    plain = outputs_and_gradients("plain", name, jnp.float32, length)
    composed = outputs_and_gradients("xla", name, jnp.float32, length)
    chex.assert_trees_all_close(plain, composed, rtol=1e-5, atol=2e-6)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")
@pytest.mark.parametrize(("name", "length"), CASES)
def test_cudnn_is_the_plain_attention(name: str, length: int) -> None:
    assert fused(*operands(jnp.bfloat16)[:3]) == "cudnn"
    exact = outputs_and_gradients("plain", name, jnp.float32, length)
    ours = outputs_and_gradients(None, name, jnp.bfloat16, length)
    plain = outputs_and_gradients("plain", name, jnp.bfloat16, length)
    for reference, one, other in zip(*map(jax.tree.leaves, (exact, ours, plain)), strict=True):
        scale = jnp.abs(reference).max()
        # Both round to 8 bits, at different places: neither is to be further from float32.
        error, least = (jnp.abs(x.astype(jnp.float32) - reference).max() for x in (one, other))
        assert error <= 2 * least + 4e-3 * scale


def test_it_is_chosen_where_the_operands_suit_it() -> None:
    low = operands(jnp.bfloat16)[:3]
    if jax.default_backend() == "cpu":
        assert fused(*low) is None
    with attention_kernel("cudnn"):
        assert fused(*low) == "cudnn"
        assert fused(*operands()[:3]) is None  # float32
        assert fused(*operands(jnp.bfloat16, size=12)[:3]) is None
        assert fused(*operands(jnp.bfloat16, size=512)[:3]) is None
        assert fused(*operands(jnp.bfloat16, length=1)[:3]) is None
    with pytest.raises(ValueError, match="kernel='flash'; choose"), attention_kernel("flash"):  # pyright: ignore[reportArgumentType]
        pass


def test_masks_keep_their_reasons_only_where_they_hold() -> None:
    assert made("none") is None
    mask = made("window")
    assert mask is not None
    assert (mask.causal, mask.window, mask.padding) == (True, 4, None)
    mask = made("padding, both ways")
    assert mask is not None
    assert mask.padding is not None
    assert (mask.causal, mask.window) == (False, 3)
    for start, length in ((jnp.int32(0), T), (0, T - 2)):  # with a cache
        mask = make_attention_mask(
            None, query_length=length, key_length=T, causal=True, start=start
        )
        assert mask is not None
        assert not mask.causal


def test_a_model_says_that_it_is_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    config = llama.Config(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model, variables = fmjax.create("llama", config, head="causal_lm", rng=jax.random.key(0))
    calls, composition = [], jax.nn.dot_product_attention

    def recorded(*args, **kwargs):
        calls.append(kwargs)
        return composition(*args, **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    ids = jnp.arange(6)[None]
    plain = model.apply(variables, ids).logits
    assert not calls
    with attention_kernel("xla"):
        composed = model.apply(variables, ids).logits
    assert [(call["is_causal"], call["mask"]) for call in calls] == [(True, None)] * 2
    chex.assert_trees_all_close(plain, composed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 5), (4,)])
def test_a_mask_that_does_not_fit_is_refused(shape, causal):
    with pytest.raises(ValueError, match=r"must be \[B, 4\] or \[B, 4, 4\]"):
        make_attention_mask(jnp.ones(shape), query_length=4, key_length=4, causal=causal)
