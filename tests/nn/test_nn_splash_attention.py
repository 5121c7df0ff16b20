"""The TPU's attention kernel: equal to the plain one, chosen where it may be, and compiled."""

import importlib.util
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_kernels import assert_nothing_is_sent, check_in_a_model, laid_over, rows_of

from fmjax.config import config_to_json, write_json
from fmjax.models import gpt2
from fmjax.nn.attention import attend
from fmjax.nn.fused_attention import attention_kernel, fused
from fmjax.nn.mask import Mask, make_attention_mask
from fmjax.nn.splash_attention import SHORTEST
from fmjax.perf.flops import count_flops
from fmjax.perf.targets import parse_target
from fmjax.recipes.planned_step import Work, compile_step, describe
from fmjax.train import make_mesh

B, T, H, G, K = 2, 150, 4, 2, 8  # two blocks of the kernel, the second in part
PADDING = np.ones((B, T), bool)
PADDING[1, 100:] = False
MASKS = {
    "none": {"causal": False},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 20},
    "padding": {"causal": False, "mask": jnp.asarray(PADDING)},
    "padding, causal window": {"causal": True, "window": 140, "mask": jnp.asarray(PADDING)},
}
QUICK = ("padding", "padding, causal window")


def made(name: str, length: int = T) -> Mask | None:
    return make_attention_mask(**{"mask": None} | MASKS[name], query_length=length, key_length=T)


def operands(dtype=jnp.float32, size=K, length=T, keys=T, batch=B):
    drawn = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(drawn[0], (batch, length, H, size), dtype)
    key, value = (jax.random.normal(k, (batch, G, keys, size), dtype) for k in drawn[1:])
    return query, key, value


def outputs_and_gradients(kernel, mask, query, key, value):
    """Of a weighted sum."""

    def total(query, key, value):
        out, _ = attend(query, key, value, mask=mask, scale=0.3)
        return (out * jnp.cos(jnp.arange(out.shape[-1]))).sum(), out

    with attention_kernel(kernel), jax.default_matmul_precision("highest"):
        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(query, key, value)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in MASKS]
)
def test_it_is_the_plain_attention(name):
    """With heads in groups, and lengths that do not divide by its blocks."""
    mask, given = made(name), operands()
    assert fused_by("interpreted", *given, mask) == "interpreted"
    plain = outputs_and_gradients("plain", mask, *given)
    ours = outputs_and_gradients("interpreted", mask, *given)
    # Measured: 4e-6 at the most.
    chex.assert_trees_all_close(plain, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("length", [40, 300])
def test_other_states(length):
    """Of an encoder, whose length is its own, some of it padding."""
    mask, given = made("padding", length), operands(length=length)
    plain = outputs_and_gradients("plain", mask, *given)
    ours = outputs_and_gradients("interpreted", mask, *given)
    chex.assert_trees_all_close(plain, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 20])
def test_queries_that_see_no_key_that_counts(window):
    """In padding to the left: they see the hidden ones, in the gradients too."""
    keep = np.ones((B, T), bool)
    keep[1, :60] = False
    mask = make_attention_mask(
        jnp.asarray(keep), query_length=T, key_length=T, causal=True, window=window
    )
    place = np.arange(T)
    seen = place[:, None] >= place
    if window is not None:
        seen &= place[:, None] - place < window
    sees = (seen & keep[:, None]).any(-1)  # [B, T]
    assert 0 < sees[1].sum() < T
    same = jnp.asarray((seen & (sees[:, :, None] == keep[:, None]))[:, None])
    plain = outputs_and_gradients("plain", same, *operands())
    ours = outputs_and_gradients("interpreted", mask, *operands())
    chex.assert_trees_all_close(plain, ours, rtol=1e-5, atol=1e-5)


def fused_by(kernel, *args):
    with attention_kernel(kernel):
        return fused(*args)


def test_it_is_chosen_where_the_operands_suit_it():
    low = operands(jnp.bfloat16, length=SHORTEST, keys=SHORTEST)
    assert fused_by("splash", *low) == "splash"
    with parse_target("v5e:2x2").compiling():
        assert fused(*low) == "splash"
    with parse_target("cpu").compiling():
        assert fused(*low) is None
    for mask in (
        make_attention_mask(None, query_length=SHORTEST, key_length=SHORTEST, causal=True),
        jnp.ones((B, 1, 1, SHORTEST), bool),
        None,
    ):
        assert fused_by("splash", *low, mask) == "splash"
    for mask in (
        jnp.ones((B, 1, SHORTEST, SHORTEST), bool),
        make_attention_mask(
            None, query_length=SHORTEST, key_length=SHORTEST, causal=False, window=4
        ),
        make_attention_mask(
            jnp.ones((B, SHORTEST, SHORTEST)), query_length=SHORTEST, key_length=SHORTEST,
            causal=True,
        ),
    ):  # fmt: skip
        assert fused_by("splash", *low, mask) is None
    assert fused_by("splash", *low, None, jnp.zeros((1, H, SHORTEST, SHORTEST))) is None
    assert fused_by("splash", *operands(length=SHORTEST, keys=SHORTEST)) is None  # float32
    assert fused_by("splash", *operands(jnp.bfloat16)) is None  # too short
    assert fused_by("splash", *operands(jnp.bfloat16, length=1, keys=SHORTEST)) is None
    assert fused_by("splash", *operands(jnp.bfloat16, 12, SHORTEST, SHORTEST)) is None
    assert fused_by("splash", *operands(jnp.bfloat16, 264, SHORTEST, SHORTEST)) is None


def test_of_several_tpus_it_needs_a_mesh(monkeypatch):
    low = operands(jnp.bfloat16, length=SHORTEST, keys=SHORTEST)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert jax.device_count() == 4
    assert fused(*low) is None
    with jax.set_mesh(make_mesh(data=2)):
        assert fused(*low) == "splash"
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert fused(*low) == "splash"


MESHES = [{"data": 2, "tensor": 2}, {"tensor": 2}, {"fsdp": 2}]


@pytest.mark.parametrize(
    "axes", [MESHES[0], *(pytest.param(axes, marks=pytest.mark.slow) for axes in MESHES[1:])]
)
def test_each_device_computes_its_own(axes):
    """Examples and heads are divided, and nothing is sent."""
    mask = made("padding, causal window")
    query, key, value = operands()
    plain = outputs_and_gradients("plain", mask, query, key, value)
    mesh, given = laid_over(axes, (query, key, value))

    def total(query, key, value):
        out, _ = attend(query, key, value, mask=mask, scale=0.3)
        return (out * jnp.cos(jnp.arange(K))).sum(), out

    with jax.set_mesh(mesh), attention_kernel("interpreted"):
        grad = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))
        ours = grad(*given)
        text = grad.lower(*given).compile().as_text()
        assert fused_by("interpreted", *operands(batch=3)) == (
            "interpreted" if not rows_of(axes) else None  # three examples do not divide by two
        )
    chex.assert_trees_all_close(plain, ours, rtol=1e-5, atol=1e-5)
    assert_nothing_is_sent(text)


@pytest.mark.slow
def test_in_a_model():
    check_in_a_model("interpreted", 140, "pallas_call", jax.grad)


def test_its_products_are_counted():
    """As those of the plain way, of lengths that are not padded."""
    query, key, value = operands(length=256, keys=128)

    def counted(kernel):
        with attention_kernel(kernel):
            out = count_flops(lambda *args: attend(*args)[0].sum(), query, key, value)
            grad = jax.grad(lambda *args: attend(*args)[0].sum(), argnums=(0, 1, 2))
            return out, count_flops(grad, query, key, value)

    plain, ours = counted("plain"), counted("interpreted")
    assert [one.total for one in plain] == [one.by_primitive["splash_attention"] for one in ours]
    assert plain[1].total == 6 * 2 * query.size * 128
    # Beside its kernels the gradient sums each query's output times its gradient.
    assert ours[1].total - plain[1].total == 2 * query.size
    assert not ours[1].opaque


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"data": 2, "tensor": 2}])
def test_a_train_step_for_a_tpu(axes, tmp_path):
    """Compiled with the kernel, forward, recomputed and backward; without the scores in memory."""
    config = gpt2.Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=512)
    extra = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    write_json(tmp_path / "config.json", config_to_json(config, extra))
    target = parse_target("v5e:2x2")
    devices = target.devices()
    texts = {}
    for dropout in ("none", "config"):  # of probabilities, which the kernel cannot drop
        step = describe(str(tmp_path), Work(batch=8, length=512, dropout=dropout))
        texts[dropout] = compile_step(step, target, devices, axes, "block").run.as_text()
    assert len(re.findall(r'custom_call_target="tpu_custom_call"', texts["none"])) == 4
    assert "tpu_custom_call" not in texts["config"]
    scores = re.compile(r"\[(\d+,)*512,512\]")
    assert scores.search(texts["config"])
    assert not scores.search(texts["none"])
