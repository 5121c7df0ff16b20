"""Attention that never holds the scores of all pairs in memory: a platform's fused kernel.

On an NVIDIA GPU that is cuDNN's (`jax.nn.dot_product_attention`), for operands in bfloat16 or
float16, on a TPU the one of `fmjax.nn.splash_attention`, for bfloat16: the algorithm of Dao 2023,
arXiv:2307.08691. They have first derivatives alone, by `jax.grad` and `jax.vjp`; take gradients of
gradients, and `jax.jvp`, with the plain one. On CPUs it is `fmjax.nn.blocked_attention`, for long
rows, which has them all.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.nn import blocked_attention
from fmjax.nn.mask import Mask, keep_of

Fused = Literal["xla", "cudnn", "splash", "interpreted", "blocked"]
Kernel = Literal["plain"] | Fused
_CHOSEN: ContextVar[Kernel | None] = ContextVar("attention_kernel", default=None)


@contextlib.contextmanager
def attention_kernel(kernel: Kernel | None) -> Iterator[None]:
    """Chooses how attention is computed by what is traced in the ``with`` block.

    A function that was compiled before keeps what it was compiled with.

    Args:
        kernel: "plain" for products and a softmax; "cudnn", where the operands suit it; "xla" for
            JAX's own composition in place of cuDNN's, on any device and in any dtype (it checks
            that the two are called alike); "splash" for the kernel on TPUs, where the operands suit
            it, and "interpreted" for the same computed step by step, slowly, on any device and in
            any dtype; "blocked" for that on CPUs, on any device and however short rows are; None to
            choose by device, which is the default.

    Raises:
        ValueError: another kernel.
    """
    known = ("plain", *get_args(Fused))
    if kernel is not None and kernel not in known:
        raise ValueError(f"kernel={kernel!r}; choose {', '.join(map(repr, known))} or None")
    token = _CHOSEN.set(kernel)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def fused(
    query: Array,
    key: Array,
    value: Array,
    mask: Mask | Array | None = None,
    bias: Array | None = None,
    *,
    drops_or_caps: bool = False,
) -> Fused | None:
    """The fused kernel for these operands of `fmjax.nn.attention.attend`; None for the plain way.

    cuDNN takes heads of up to 128 features (256 since Hopper) that are a multiple of 8, keys and
    values alike. One query, as in decoding, reads each key once whatever the kernel. What splash
    takes says `fmjax.nn.splash_attention.suits`, and `fmjax.nn.blocked_attention.suits` what that
    on CPUs does, which alone drops probabilities and caps scores.
    """
    chosen = _CHOSEN.get()
    if chosen is None:
        chosen = _of_device(query, key)
    if chosen == "plain":
        return None
    batch, length, _, size = query.shape
    if length == 1 or batch == 0 or key.shape != value.shape:
        return None
    if drops_or_caps and chosen != "blocked":
        return None
    if chosen == "xla":
        return "xla"
    if chosen == "blocked":
        return "blocked" if blocked_attention.suits(query, key, value, mask, bias) else None
    if chosen in ("splash", "interpreted"):
        return chosen if _splashes(query, key, value, mask, bias, chosen) else None
    if (
        query.dtype not in (jnp.bfloat16, jnp.float16)
        or not query.dtype == key.dtype == value.dtype
    ):
        return None
    return "cudnn" if size % 8 == 0 and size <= _widest_head() else None


def _of_device(query: Array, key: Array) -> Kernel:
    """The kernel of the device at hand.

    XLA does not divide those of TPUs and CPUs over devices by itself: of several, the program has
    to be traced under ``jax.set_mesh``, as `fmjax.train.jit_step` does, or inside ``jax.shard_map``
    or a pmap.
    """
    backend = jax.default_backend()
    if backend == "gpu":
        return "cudnn"
    if jax.device_count() > 1 and jax.sharding.get_abstract_mesh().empty:
        return "plain"
    if backend == "tpu":
        return "splash"
    shortest = min(query.shape[1], key.shape[2])
    return "blocked" if backend == "cpu" and shortest >= blocked_attention.SHORTEST else "plain"


def _splashes(
    query: Array,
    key: Array,
    value: Array,
    mask: Mask | Array | None,
    bias: Array | None,
    chosen: Kernel,
) -> bool:
    from fmjax.nn.splash_attention import SHORTEST, suits  # Pallas takes a second to import

    if chosen == "splash" and (
        key.shape[2] < SHORTEST or not query.dtype == key.dtype == value.dtype == jnp.bfloat16
    ):
        return False
    return suits(query, key, mask, bias)


def _widest_head() -> int:
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    return 256 if float(capability) >= 9.0 else 128


def fused_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Mask | Array | None,
    bias: Array | None,
    scale: float | Array | None,
    kernel: Fused,
    softcap: float | None = None,
    rng: Array | None = None,
    dropout_rate: float = 0.0,
) -> Array:
    """What `fmjax.nn.attention.attend` computes of the same arguments, [B, T, H, K].

    Where a mask with padding is causal, a query whose visible keys are all padding attends to
    those alike, and not to the later ones too; "blocked" has it attend to all, as the plain way.

    Args:
        query: [B, T, H, K].
        key, value: [B, G, S, K].
        mask, bias, scale: as there.
        kernel: from `fused`.
        softcap, rng, dropout_rate: as there, of a kernel that caps and drops.
    """
    if scale is not None and not isinstance(scale, int | float):
        query, scale = (query * scale).astype(query.dtype), 1.0
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    if kernel == "blocked":
        return blocked_attention.blocked_attention(
            query, key, value, mask=mask, bias=bias, scale=scale, softcap=softcap,
            rng=rng, dropout_rate=dropout_rate,
        )  # fmt: skip
    if kernel in ("splash", "interpreted"):
        from fmjax.nn.splash_attention import splash_attention

        return splash_attention(
            query, key, value, mask=mask, scale=scale, interpret=kernel == "interpreted"
        )
    batch, length, keys = query.shape[0], query.shape[1], key.shape[2]
    causal, window = False, None
    if isinstance(mask, Mask) and mask.causal:
        causal = True
        window = None if mask.window is None else (mask.window - 1, 0)
        mask = mask.padding

    def whole(part: Array | None) -> Array | None:  # cuDNN wants T and S in full
        if part is None:
            return None
        part = part.reshape(*(1 for _ in range(4 - part.ndim)), *part.shape)
        return jnp.broadcast_to(part, (*part.shape[:2], length, keys))

    keep, bias = whole(keep_of(mask)), whole(bias)
    query_lengths = key_lengths = None
    if length % 2 or keys % 2:  # cuDNN's gradients are for even lengths
        query, key, value = (
            _evened(part, (axis,)) for part, axis in ((query, 1), (key, 2), (value, 2))
        )
        keep, bias = (None if part is None else _evened(part, (2, 3)) for part in (keep, bias))
        query_lengths = jnp.full(batch, length, jnp.int32)
        key_lengths = jnp.full(batch, keys, jnp.int32)
    if bias is not None and keep is not None and bias.shape[0] != batch:
        bias = jnp.broadcast_to(bias, (batch, *bias.shape[1:]))
    out = jax.nn.dot_product_attention(
        query,
        jnp.swapaxes(key, 1, 2),
        jnp.swapaxes(value, 1, 2),
        bias=None if bias is None else bias.astype(query.dtype),
        mask=keep,
        scale=scale,
        is_causal=causal,
        local_window_size=window,
        implementation=kernel,
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_lengths,
    )
    return out[:, :length]


def _evened(x: Array, axes: tuple[int, ...]) -> Array:
    """x with a row of zeros at the end of each of these axes whose length is odd."""
    return jnp.pad(x, [(0, size % 2 if axis in axes else 0) for axis, size in enumerate(x.shape)])
